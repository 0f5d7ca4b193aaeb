"""The context phi: a few numbers about a row that the exit head has all but computed already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import View

LOG_LONGEST = math.log(512)
EXIT_FEATURES = 8
"""bias, log length, confidence, its square, entropy, margin, agreement with the previous exit, previous confidence."""


def exit_features(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence, its square, entropy in [0, 1] and margin, [R, 4], and the answer [R], of probabilities [R, C]."""
    top, label = probs.topk(2, -1)
    sure, second = top.unbind(-1)
    entropy = torch.special.entr(probs).sum(-1) / math.log(probs.shape[-1])
    return torch.stack([sure, sure.square(), entropy, sure - second], -1), label[:, 0]


FEW = 48
"""Numbers in the logits of a batch up to which Python's arithmetic takes less time than launching tensor operations."""


def features(view: View, projection: Tensor) -> Tensor:
    """The context of every active row, float64 [R, 8 + P].

    Before layer 1 there is no exit: its features are zero, and a random projection of the mean embedding speaks.
    Once there is an exit the projection stays out: it adds noise to every estimate and says less than the exit does.

    Args:
        view: what the policy sees.
        projection: float [P, D], fixed random directions.
    """
    logits, rest = view.logits, projection.shape[0]
    if logits is not None and logits.numel() <= FEW and logits.device.type == "cpu":
        return _features_of_few(view, rest)
    length = view.lengths.double().log() / LOG_LONGEST
    if logits is None:
        phi = torch.zeros(len(length), EXIT_FEATURES + rest, dtype=torch.float64, device=length.device)
        phi[:, 0], phi[:, 1] = 1.0, length
        if rest and view.layer == 0:
            unit = torch.nn.functional.normalize(view.packed.mean().float(), dim=-1)
            phi[:, EXIT_FEATURES:] = unit @ projection.float().T
        return phi
    both = logits[None] if view.previous is None else torch.stack([logits, view.previous])
    probs = both.double().softmax(-1)
    top, label = probs.topk(2, -1)
    sure, second = top[0].unbind(-1)
    entropy = torch.special.entr(probs[0]).sum(-1) / math.log(probs.shape[-1])
    same = before = torch.zeros_like(sure)
    if view.previous is not None:
        same, before = (label[0, :, 0] == label[1, :, 0]).double(), top[1, :, 0]
    known = [torch.ones_like(sure), length, sure, sure * sure, entropy, sure - second, same, before]
    return torch.nn.functional.pad(torch.stack(known, -1), (0, rest))


def _features_of_few(view: View, rest: int) -> Tensor:
    """The same, row by row: with one row or two the tensor operations would take longer than what they work out."""
    assert view.logits is not None
    now = view.logits.tolist()
    then = [None] * len(now) if view.previous is None else view.previous.tolist()
    rows = []
    for logits, previous, length in zip(now, then, view.lengths.tolist(), strict=True):
        probs, answer = _softmax(logits)
        sure, second = sorted(probs)[:-3:-1]
        entropy = -sum(p * math.log(p) for p in probs if p > 0.0) / math.log(len(probs))
        same = before = 0.0
        if previous is not None:
            others, other = _softmax(previous)
            same, before = float(other == answer), max(others)
        known = [1.0, math.log(length) / LOG_LONGEST, sure, sure * sure, entropy, sure - second, same, before]
        rows.append(known + [0.0] * rest)
    return torch.tensor(rows, dtype=torch.float64)


def _softmax(logits: list[float]) -> tuple[list[float], int]:
    """Probabilities and the answer; not-a-numbers stay what they are."""
    highest = max(logits)
    powers = [math.exp(logit - highest) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers], logits.index(highest) if highest == highest else 0
