"""The vocabulary everything shares: what to run (`Decision`, `Plan`) and what was run (`Trace`).

Shape letters used throughout the package:
    B batch rows, R rows still active, T tokens, S tokens of all active rows (packed), D width, N layers,
    H head units, F context features, A arms, G head sets, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["exploit", "explore", "probe", "survey"]
"""exploit: the policy's best guess, the same for a row whatever its batch. explore: as in training, optimism and
exploration floor on. probe: every row runs all layers, so that every exit's quality is seen. survey: every row runs all
layers with all units, so that every unit's gate gradient is seen too."""


@dataclass
class Decision:
    """What the active rows do next.

    Attributes:
        sets: bool [G, H], the distinct head sets to run in the next layer.
        choice: int64 [R], index into `sets` for each active row; -1 = the row stops here.
        arm: int64 [R], the numeric arm taken (policy bookkeeping); None for policies that do not learn.
        context: float64 [R, F], what the decision saw; None for policies that do not learn.
        wants_stop: bool [R], True where the greedy rule would have stopped although the row runs on.
    """

    sets: Tensor
    choice: Tensor
    arm: Tensor | None = None
    context: Tensor | None = None
    wants_stop: Tensor | None = None


@dataclass
class Plan:
    """Head units to run for each row and layer: bool [B, N, H]. A layer with no unit ends the row there."""

    units: Tensor

    def __post_init__(self) -> None:
        runs = self.units.any(-1)
        gap = (~runs[:, :-1] & runs[:, 1:]).any(-1)
        if bool(gap.any()):
            row = int(gap.nonzero()[0])
            raise ValueError(
                f"row {row} of the plan runs a layer after one that it skips: rows leave, they do not return"
            )

    @property
    def layers(self) -> Tensor:
        """int64 [B], layers run by each row."""
        return self.units.any(-1).sum(-1)


@dataclass
class Exit:
    """Logits of one exit: `layer` in 1..N, `rows` int64 [R], `logits` [R, C]."""

    layer: int
    rows: Tensor
    logits: Tensor


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass
class Trace:
    """What was executed for each row of a batch; reports, rewards and pictures all read it.

    Attributes:
        units: bool [B, N, H], head units executed.
        flops: float64 [B], executed FLOPs: attention (padding included), FFN, exit heads, policy arithmetic.
        dense_flops: float64 [B], FLOPs of the full model without exits on the same tokens.
        exits: every exit that was computed, in order of depth.
        logits: [B, C], each row's answer: the logits of the last exit that it reached.
        decisions: of policies that learn, one entry a layer: the rows (int64 [R]) and what was decided for them. The
            tables `arm`, `context` and `wants_stop` are made of it when somebody asks: serving seldom does.
        layer_cost: float64 [B, N], executed FLOPs of each layer (its exit included) as a fraction of `dense_flops`.
        gate_grads: per layer, (rows [R], set [k], d loss / d gate [R, k]) of each executed group; filled by backward.
        policy_seconds: wall time spent deciding.
    """

    units: Tensor
    flops: Tensor
    dense_flops: Tensor
    exits: list[Exit] = field(default_factory=list)
    logits: Tensor = field(default_factory=_empty)
    decisions: list[tuple[Tensor, Decision]] = field(default_factory=list)
    layer_cost: Tensor = field(default_factory=_empty)
    gate_grads: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    policy_seconds: float = 0.0

    def __getitem__(self, row: int) -> Trace:
        """What ran for one row, as a batch of that row; without what the policy learns from.

        Raises:
            IndexError: no such row.
        """
        if not -len(self.units) <= row < len(self.units):
            raise IndexError(f"row {row} of a trace of {len(self.units)} rows")
        at = torch.arange(len(self.units), device=self.units.device)[[row]]
        exits = [Exit(e.layer, torch.zeros_like(at), e.logits[e.rows == at]) for e in self.exits if at in e.rows]
        return Trace(
            self.units[at], self.flops[at], self.dense_flops[at], exits, self.logits[at],
            layer_cost=self.layer_cost[at], policy_seconds=self.policy_seconds / len(self.units),
        )  # fmt: skip

    @property
    def layers(self) -> Tensor:
        """int64 [B], layers run by each row."""
        return self.units.any(-1).sum(-1)

    @property
    def arm(self) -> Tensor:
        """int64 [B, N], numeric arm taken before each layer; -1 where none was."""
        return self._table(lambda decision: decision.arm, -1)

    @property
    def context(self) -> Tensor:
        """float64 [B, N, F], what each decision saw; zeros where there was none."""
        return self._table(lambda decision: decision.context, 0)

    @property
    def wants_stop(self) -> Tensor:
        """Bool [B, N], where the greedy rule would have stopped before that layer."""
        return self._table(lambda decision: decision.wants_stop, False)

    def _table(self, part: Callable[[Decision], Tensor | None], empty: float) -> Tensor:
        batch, layers = self.units.shape[:2]
        table = torch.empty(0)
        for layer, (rows, decision) in enumerate(self.decisions):
            values = part(decision)
            assert values is not None, "a policy that learns says what it did"
            if not layer:
                table = values.new_full((batch, layers, *values.shape[1:]), empty)
            table[rows, layer] = values
        return table

    @property
    def flops_fraction(self) -> float:
        """Executed FLOPs of the batch as a fraction of the dense model's."""
        return float(self.flops.sum() / self.dense_flops.sum().clamp_min(1.0))

    def exit_table(self) -> tuple[Tensor, Tensor]:
        """Returns all exits as one table: logits [B, N, C] (zeros where not visited) and visited, bool [B, N]."""
        rows, num_layers = self.units.shape[:2]
        first = self.exits[0].logits
        table = first.new_zeros(rows, num_layers, first.shape[-1])
        visited = torch.zeros(rows, num_layers, dtype=torch.bool, device=first.device)
        for exit_ in self.exits:
            table[exit_.rows, exit_.layer - 1] = exit_.logits.detach()
            visited[exit_.rows, exit_.layer - 1] = True
        return table, visited
