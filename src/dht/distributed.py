"""Ranks of a distributed run: sums over all of them and one policy for all of them.

Without a process group every function leaves its argument as it is.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

if TYPE_CHECKING:
    from .policy.learned import LearnedPolicy


def join(cpu: bool) -> None:
    """Returns nothing; joins the process group if `accelerate launch` or `torchrun` started several processes.

    Args:
        cpu: use gloo even if there is a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=cpu)


def wait() -> None:
    """Returns nothing, once every rank has come here."""
    if ranks() > 1:
        dist.barrier()


def ranks() -> int:
    """Processes that train together; 1 if there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def total(values: Tensor) -> Tensor:
    """The sum over ranks, elementwise."""
    if ranks() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def merge_policy(policy: LearnedPolicy, base: dict[str, Tensor]) -> None:
    """Returns nothing; adds up what every rank has learned since `base`: equal to the bit on all of them.

    One gather of the statistics (0.2 MB at 6 layers of 12 heads); every rank then adds them in the same order.

    Args:
        base: `policy.snapshot()` from when the policies were last equal.
    """
    if ranks() == 1:
        return
    own = policy.delta_since(base)
    flat = torch.cat([value.to(torch.float64).flatten() for value in own.values()])
    gathered = [torch.empty_like(flat) for _ in range(ranks())]
    dist.all_gather(gathered, flat)
    sizes = [value.numel() for value in own.values()]
    deltas = [
        {
            name: part.view_as(like).to(like.dtype)
            for (name, like), part in zip(own.items(), each.split(sizes), strict=True)
        }
        for each in gathered
    ]
    policy.merge(base, deltas)
