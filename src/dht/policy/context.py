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
    phi = torch.zeros(view.rows.numel(), EXIT_FEATURES + projection.shape[0], device=view.rows.device)
    phi[:, 0] = 1.0
    phi[:, 1] = view.lengths.float().log() / math.log(512)
    if view.logits is not None:
        phi[:, 2:6], label = exit_features(view.logits.float().softmax(-1))
        if view.previous is not None:
            before = view.previous.float().softmax(-1).max(-1)
            phi[:, 6] = before.indices == label
            phi[:, 7] = before.values
    if projection.shape[0] and view.layer == 0:
        unit = torch.nn.functional.normalize(view.packed.mean().float(), dim=-1)
        phi[:, EXIT_FEATURES:] = unit @ projection.float().T
    return phi.to(torch.float64)
