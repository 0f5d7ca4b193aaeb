"""The context phi: a few numbers about a row that the exit head has all but computed already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..task import SEEN, Task
from .base import View

LOG_LONGEST = math.log(512)
EXIT_FEATURES = 2 + SEEN
"""bias, log length and what the task reads of an exit: confidence, its square, doubt, margin, agreement with the exit
before, and a number on that one."""

FEW = 48
"""Numbers in the logits of a batch up to which Python's arithmetic takes less time than launching tensor operations."""


def features(view: View, projection: Tensor, task: Task) -> Tensor:
    """The context of every active row, float64 [R, 8 + P].

    Before layer 1 there is no exit: its features are zero, and a random projection of the mean embedding speaks.
    Once there is an exit the projection stays out: it adds noise to every estimate and says less than the exit does.

    Args:
        view: what the policy sees.
        projection: float [P, D], fixed random directions.
        task: reads the exit.
    """
    logits, rest = view.logits, projection.shape[0]
    if logits is not None and task.reads_rows and logits.numel() <= FEW and logits.device.type == "cpu":
        return _features_of_few(view, rest, task)
    length = view.lengths.double().log() / LOG_LONGEST
    if logits is None:
        phi = torch.zeros(len(length), EXIT_FEATURES + rest, dtype=torch.float64, device=length.device)
        phi[:, 0], phi[:, 1] = 1.0, length
        if rest and view.layer == 0:
            unit = torch.nn.functional.normalize(view.packed.mean().float(), dim=-1)
            phi[:, EXIT_FEATURES:] = unit @ projection.float().T
        return phi
    seen = task.context(logits, view.previous)
    known = torch.cat([torch.ones_like(length)[:, None], length[:, None], seen], -1)
    return torch.nn.functional.pad(known, (0, rest))


def _features_of_few(view: View, rest: int, task: Task) -> Tensor:
    """The same, row by row: with one row or two the tensor operations would take longer than what they work out."""
    assert view.logits is not None
    now = view.logits.tolist()
    then = [None] * len(now) if view.previous is None else view.previous.tolist()
    rows = [
        features_of_row(length, logits, previous, task) + [0.0] * rest
        for logits, previous, length in zip(now, then, view.lengths.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def features_of_row(length: int, logits: list[float] | None, previous: list[float] | None, task: Task) -> list[float]:
    """The context of one row without the projection's part, in plain numbers."""
    seen = [0.0] * SEEN if logits is None else task.context_of_row(logits, previous)
    return [1.0, math.log(length) / LOG_LONGEST, *seen]
