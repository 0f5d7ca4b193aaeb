"""The context phi: a few numbers about a row that the exit head has all but computed already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..task import SEEN, Task
from .base import View

EXIT_FEATURES = 2 + SEEN
"""bias, log length and what the task reads of an exit: confidence, its square, doubt, margin, agreement with the exit
before, and a number on that one."""


def features(view: View, projection: Tensor, task: Task) -> Tensor:
    """The context of every active row, float64 [R, 8 + P].

    Before layer 1 there is no exit: its features are zero, and a random projection of the mean embedding speaks.
    Once there is an exit the projection stays out: it adds noise to every estimate and says less than the exit does.

    Args:
        view: what the policy sees.
        projection: float [P, D], fixed random directions.
        task: reads the exit.
    """
    length = view.lengths.float().log() / math.log(512)
    if view.logits is None:
        phi = torch.zeros(len(length), EXIT_FEATURES + projection.shape[0], device=length.device)
        phi[:, 0], phi[:, 1] = 1.0, length
        if projection.shape[0] and view.layer == 0:
            unit = torch.nn.functional.normalize(view.packed.mean().float(), dim=-1)
            phi[:, EXIT_FEATURES:] = unit @ projection.float().T
        return phi.to(torch.float64)
    seen = task.context(view.logits, view.previous)
    known = torch.cat([torch.ones_like(seen[:, :1]), length[:, None], seen], -1)
    return torch.nn.functional.pad(known.to(torch.float64), (0, projection.shape[0]))
