"""Quality in [0, 1] of every visited exit: what the numeric arms are paid in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import Trace
from ..task import SINGLE_LABEL, Task


def quality(trace: Trace, labels: Tensor, task: Task = SINGLE_LABEL) -> Tensor:
    """float64 [B, N], quality of each visited exit; 0 where a row did not pass.

    Args:
        labels: [B, ...], the truth as the task takes it.
        task: says what an answer is worth.
    """
    logits, visited = trace.exit_table()
    return task.quality(logits, labels[:, None]) * visited


def quality_at_once(trace: Trace, labels: Tensor, task: Task = SINGLE_LABEL) -> Tensor | None:
    """float64 [B], quality of the lexical exit, if it was read.

    Args:
        labels: as for `quality`.
    """
    first = trace.exits[0]
    return None if first.layer else task.quality(first.logits, labels)


def returns(trace: Trace, quality: Tensor) -> tuple[Tensor, Tensor]:
    """Final quality and cost-to-go of running on at each decision, both float64 [B, N].

    A row that was made to run on (probing) is credited with the exit where the greedy rule would have left: full depth
    is seen, yet the value is that of the policy.

    Args:
        quality: float64 [B, N], of every visited exit.
    """
    num_layers = quality.shape[1]
    final, cost = torch.zeros_like(quality), torch.zeros_like(quality)
    last, wants_stop, spent = trace.layers, trace.wants_stop, trace.layer_cost
    for layer in range(num_layers - 1, -1, -1):
        final[:, layer] = quality[:, layer]
        cost[:, layer] = spent[:, layer]
        if layer + 1 < num_layers:
            goes_on = (last > layer + 1) & ~wants_stop[:, layer + 1]
            final[:, layer] = torch.where(goes_on, final[:, layer + 1], final[:, layer])
            cost[:, layer] += torch.where(goes_on, cost[:, layer + 1], 0.0)
    return final, cost
