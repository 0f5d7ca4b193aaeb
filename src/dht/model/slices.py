"""The weights that a set of head units needs of a block: as they are stored, sliced for one use, or kept.

With gradients they are sliced at every call. Without, casts and the slices of lasting sets are kept until a weight
changes, and those of passing sets live in scratch memory.
"""

from __future__ import annotations

import threading
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .block import Block

Units = tuple[int, ...]
"""Head units to run, in rising order."""

QKV, QKV_BIAS, OUT, UP, UP_BIAS, DOWN = range(6)
"""Places of a block's weights among those that units own."""

KEPT_SLICES = 384
"""Sliced copies of weights that a block keeps: six for each head set and dtype."""

_STEPS = [0]
"""Optimizer steps taken in this process. Fused optimizers change weights without raising their version counter, so kept
slices have to be thrown away by this one too."""


def _count_step(*_: object) -> None:
    _STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)


class Kept:
    """Casts and slices of a block's weights, good for as long as the weights are what they were."""

    def __init__(self) -> None:
        self.casts: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self.slices: dict[tuple[int, Units, torch.dtype], Tensor] = {}
        self.version: tuple[float, ...] = ()

    def follow(self, stored: tuple[Tensor, ...]) -> None:
        """Forgets everything if one of the weights was changed or replaced."""
        version = (_STEPS[0], *(x for weight in stored for x in (weight.data_ptr(), _version(weight), _probe(weight))))
        if self.version != version:
            self.version = version
            self.slices.clear()
            self.casts.clear()


class Slices:
    """The matrices of units during one forward of a block.

    Args:
        lasting: keep what is sliced; otherwise it is valid until the next set's matrix of the same place is asked for.
    """

    def __init__(self, block: Block, lasting: bool) -> None:
        stored: tuple[Tensor, ...]
        stored = (block.qkv_weight, block.qkv_bias, block.out_weight, block.up_weight, block.up_bias, block.down_weight)
        self.lasting, self.kept, self.all_heads = lasting, block._kept, block.heads
        self.owned = len(stored) if block.coupled else UP
        self.passing, self.rooms = _keeps_nothing(block), dict[int, Tensor]()
        if not self.passing:
            self.kept.follow(stored)
            stored = self._as_autocast_wants(stored)
        self.stored = stored

    def _as_autocast_wants(self, stored: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kind = stored[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stored[0].dtype
        if dtype == stored[0].dtype:
            return stored
        if dtype not in self.kept.casts:
            self.kept.casts[dtype] = tuple(weight.to(dtype) for weight in stored)
        return self.kept.casts[dtype]

    def of(self, place: int, units: Units | None) -> Tensor:
        """The matrix [k * rows of a unit, D], or the bias [k * rows of a unit], at `place`."""
        weight = self.stored[place]
        if units is None or place >= self.owned:
            return _flat(weight, place)
        index = index_of(units, weight.device)
        if self.passing or not (self.lasting or isinstance(weight, Tensor)):  # an int8 weight knows no scratch memory
            return _flat(weight.index_select(0, index), place)
        if not self.lasting:
            if place not in self.rooms:
                self.rooms[place] = _SCRATCH.room(weight, place)
            return _flat(torch.index_select(weight, 0, index, out=self.rooms[place][: len(units)]), place)
        key = (place, units, weight.dtype)
        if key not in self.kept.slices:
            if len(self.kept.slices) >= KEPT_SLICES:
                self.kept.slices.pop(next(iter(self.kept.slices)))
            self.kept.slices[key] = _flat(weight.index_select(0, index), place)
        return self.kept.slices[key]

    def units_of(self, place: int, units: Units | None) -> Tensor:
        """What `of` gives, by unit, as it is stored."""
        weight = self.stored[place]
        return self.of(place, units).view(-1, *weight.shape[1:])

    def again(self) -> Slices:
        """The same for another thread, which finds scratch memory of its own."""
        other = copy(self)
        other.rooms = {}
        return other

    def heads(self, units: Units | None) -> int:
        """How many they are."""
        return self.all_heads if units is None else len(units)


class Given:
    """The weights of one group, already sliced; to be asked as `Slices` is."""

    def __init__(self, weights: tuple[Tensor, ...]) -> None:
        self.weights = weights

    def of(self, place: int, _: Units | None) -> Tensor:
        """As of `Slices`."""
        return _flat(self.weights[place], place)

    def heads(self, _: Units | None) -> int:
        """How many units they are."""
        return self.weights[QKV].shape[0]


class _Scratch(threading.local):
    """Memory for weights that are sliced for one use: writing to it again and again beats asking for new pages."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[object, ...], Tensor] = {}

    def room(self, weight: Tensor, place: int) -> Tensor:
        """Memory of the size of `weight`, the same at every call with this `place`."""
        key = (place, weight.shape, weight.dtype, weight.device, torch.is_inference_mode_enabled())
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(weight)
        return self.buffers[key]


_SCRATCH = _Scratch()


def _keeps_nothing(block: Block) -> bool:
    """True where weights belong to a graph (of gradients, of a compiler, of an export) or are other tensors at every
    call: an adapter's, gathered shards.
    """
    in_a_graph = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return in_a_graph or "parametrizations" in block._modules or isinstance(block, FSDPModule)


@lru_cache(maxsize=4096)
def index_of(units: Units, device: torch.device) -> Tensor:
    """int64 [k], kept."""
    with torch.inference_mode(False):  # backward may hold it
        return torch.tensor(units, device=device)


def _flat(weight: Tensor, place: int) -> Tensor:
    """A unit-major weight as a matrix, or a bias as a vector; nothing is copied."""
    return weight.flatten() if place in (QKV_BIAS, UP_BIAS) else weight.flatten(0, -2)


def _version(weight: Tensor) -> int:
    """How often `weight` was changed in place, as far as torch counts; inference tensors are not counted."""
    return 0 if weight.is_inference() else weight._version


def _probe(weight: Tensor) -> float:
    """One entry of every unit's part of a frozen weight: adapters are merged into it by a change that torch counts not.

    Weights that train, as those of every loaded model, are not looked at: it is a matter of microseconds.
    """
    if weight.requires_grad or not isinstance(weight, nn.Parameter):
        return 0.0
    parts = weight.detach().flatten(1) if weight.ndim > 1 else weight.detach()[None]
    return float(parts[:, parts.shape[1] // 2].sum())
