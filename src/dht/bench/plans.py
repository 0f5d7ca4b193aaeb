"""The plans that are timed: how deep, how wide, and which head sets, at a fraction of the dense FLOPs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cost import CostModel
from ..errors import DHTError
from ..plan import Decision, Plan
from ..policy.base import Policy, View

REACHED = 0.04
"""How far from the fraction asked for a plan may be; one that is further off is left out, and that is said."""


@dataclass(frozen=True)
class Shape:
    """Mean depth of the rows and head units of each layer.

    Attributes:
        depth: mean layers a row, in [1, N]; rows get the whole number below or above it, in turn.
        widths: head units of layers 1..N.
    """

    depth: float
    widths: tuple[int, ...]

    def layers(self, row: int) -> int:
        """Layers that row number `row` of the run executes.

        >>> [Shape(1.5, (4, 4)).layers(row) for row in range(4)]
        [1, 2, 1, 2]
        """
        return math.floor((row + 1) * self.depth + 1e-9) - math.floor(row * self.depth + 1e-9)


def shape_for(kind: str, fraction: float, cost: CostModel, length: int) -> Shape:
    """The shape whose FLOPs on rows of `length` tokens are nearest to `fraction` of dense.

    Args:
        kind: "depth" (all units, fewer layers), "heads" and "worst" (all layers, fewer units), or "both" (the same
            share of each).

    Raises:
        DHTError: no such plan comes within `REACHED` of the fraction.
    """
    lengths = torch.tensor([length])
    dense = float(cost.dense(lengths))
    exit_share = float(cost.embedding(lengths) + cost.exit(lengths)) / dense
    whole = float(cost.layer(lengths, cost.heads, length)) / dense
    unit = (whole - float(cost.layer(lengths, 0, length)) / dense) / cost.heads
    fixed = whole - cost.heads * unit
    spend = fraction - exit_share
    if kind == "depth":
        depth, widths = spend / whole, (cost.heads,) * cost.layers
    elif kind in ("heads", "worst"):
        depth, widths = float(cost.layers), _spread((spend - cost.layers * fixed) / unit, cost.layers, cost.heads)
    else:
        # A layer's own share, so that depth and width shrink alike where a layer has a fixed part too.
        width = _within((math.sqrt(max(spend, 0.0) * whole / cost.layers) - fixed) / unit, 1, cost.heads)
        depth, widths = spend / (fixed + round(width) * unit), (round(width),) * cost.layers
    shape = Shape(_within(depth, 1.0, float(cost.layers)), widths)
    reached = exit_share + shape.depth * (fixed + sum(widths) / cost.layers * unit)
    if abs(reached - fraction) > REACHED:
        raise DHTError(f"{kind} at {fraction:g}: the nearest that {cost.layers} layers x {cost.heads} units give is "
                       f"{reached:.2f}")  # fmt: skip
    return shape


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _spread(units: float, layers: int, heads: int) -> tuple[int, ...]:
    """`units` head units dealt evenly to the layers, 1..`heads` each."""
    total = round(_within(units, layers, layers * heads))
    return tuple(total // layers + (layer < total % layers) for layer in range(layers))


def plan_of(shape: Shape, rows: range, heads: int, generator: torch.Generator, *, worst: bool = False) -> Plan:
    """The plan of rows number `rows`, bool [B, N, H].

    Args:
        shape: depth and widths.
        rows: numbers of the batch's rows within the run.
        generator: draws the head sets.
        worst: True gives every row a head set of its own in every layer (as far as there are enough), False one set a
            layer to all rows.
    """
    layers = len(shape.widths)
    units = torch.zeros(len(rows), layers, heads, dtype=torch.bool)
    for layer, width in enumerate(shape.widths):
        units[:, layer] = _distinct_sets(len(rows) if worst else 1, width, heads, generator)
    depth = torch.tensor([shape.layers(row) for row in rows], dtype=torch.long)
    return Plan(units & (torch.arange(layers) < depth[:, None])[..., None])


def _distinct_sets(rows: int, width: int, heads: int, generator: torch.Generator) -> Tensor:
    """Bool [rows, H], random sets of `width` units, all different while there are enough of them."""
    count = math.comb(heads, width)
    if count > 20_000:  # so many that random ones hardly ever meet
        chosen = torch.rand(rows, heads, generator=generator).topk(width, -1).indices
    else:
        every = torch.tensor(list(itertools.combinations(range(heads), width)))
        order = torch.randperm(count, generator=generator)
        chosen = every[order[torch.arange(rows) % count]]
    return torch.zeros(rows, heads, dtype=torch.bool).scatter_(1, chosen, True)


class PreparedPlan(Policy):
    """Executes a plan whose groups were worked out beforehand, so that deciding costs next to nothing.

    `FixedPlan` finds the groups while it decides, which would be timed as execution.
    """

    name = "plan"

    def __init__(self, plan: Plan, lasting: bool = True) -> None:
        super().__init__()
        self.plan, self.lasting = plan, lasting
        self.sets: list[Tensor] = []
        self.choices: list[Tensor] = []
        for layer in range(plan.units.shape[1]):
            wanted = plan.units[:, layer]
            sets, choice = wanted.unique(dim=0, return_inverse=True)
            self.sets.append(sets)
            self.choices.append(torch.where(wanted.any(-1), choice, -1))

    def decide(self, view: View) -> Decision:
        return Decision(self.sets[view.layer], self.choices[view.layer][view.packed.host_rows], lasting=self.lasting)
