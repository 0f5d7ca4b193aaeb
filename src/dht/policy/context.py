"""The context phi: a few numbers about a row that the exit head has all but computed already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import View

EXIT_FEATURES = 8
"""bias, log length, confidence, its square, entropy, margin, agreement with the previous exit, previous confidence."""


def exit_features(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence, its square, entropy in [0, 1] and margin, [R, 4], and the answer [R], of probabilities [R, C]."""
    top, label = probs.topk(2, -1)
    sure, second = top.unbind(-1)
    entropy = torch.special.entr(probs).sum(-1) / math.log(probs.shape[-1])
    return torch.stack([sure, sure.square(), entropy, sure - second], -1), label[:, 0]


def features(view: View, projection: Tensor) -> Tensor:
    """The context of every active row, float64 [R, 8 + P].

    Before layer 1 there is no exit: its features are zero, and a random projection of the mean embedding speaks.
    Once there is an exit the projection stays out: it adds noise to every estimate and says less than the exit does.

    Args:
        view: what the policy sees.
        projection: float [P, D], fixed random directions.
    """
    length = view.lengths.float().log() / math.log(512)
    if view.logits is None:
        phi = torch.zeros(len(length), EXIT_FEATURES + projection.shape[0], device=length.device)
        phi[:, 0], phi[:, 1] = 1.0, length
        if projection.shape[0] and view.layer == 0:
            unit = torch.nn.functional.normalize(view.packed.mean().float(), dim=-1)
            phi[:, EXIT_FEATURES:] = unit @ projection.float().T
        return phi.to(torch.float64)
    # One pass over this exit and the one before: a single row's decision costs what its operations cost to launch.
    both = view.logits[None] if view.previous is None else torch.stack([view.logits, view.previous])
    probs = both.float().softmax(-1)
    (sure, before), second, (label, other) = _top(probs)
    entropy = torch.special.entr(probs[0]).sum(-1) / math.log(probs.shape[-1])
    if view.previous is None:
        before = same = torch.zeros_like(sure)
    else:
        same = (label == other).to(sure.dtype)
    known = torch.stack([torch.ones_like(sure), length, sure, sure * sure, entropy, sure - second, same, before], -1)
    return torch.nn.functional.pad(known.to(torch.float64), (0, projection.shape[0]))


def _top(probs: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """Of probabilities [1 or 2, R, C]: the highest of the first and the last, the first's second, and both answers."""
    top, label = probs.topk(2, -1)
    return (top[0, :, 0], top[-1, :, 0]), top[0, :, 1], (label[0, :, 0], label[-1, :, 0])
