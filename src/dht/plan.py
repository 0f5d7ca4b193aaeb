"""The vocabulary everything shares: what to run (`Decision`, `Plan`) and what was run (`Trace`).

Shape letters used throughout the package:
    B batch rows, R rows still active, T tokens, S tokens of all active rows (packed), D width, N layers,
    H head units, F context features, A arms, G head sets, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .cost import CostModel

Mode = Literal["exploit", "explore", "probe", "survey"]
"""exploit: the policy's best guess, the same for a row whatever its batch. explore: as in training, optimism and
exploration floor on. probe: every row runs all layers, so that every exit's quality is seen. survey: every row runs all
layers with all units, so that every unit's gate gradient is seen too."""


@dataclass
class Decision:
    """What the active rows do next.

    `sets` and `choice` may lie on the host whatever the model runs on: then nobody waits for an accelerator.

    Attributes:
        sets: bool [G, H], the distinct head sets to run in the next layer.
        choice: int64 [R], index into `sets` for each active row; -1 = the row stops here.
        arm: int64 [R], the numeric arm taken (policy bookkeeping); None for policies that do not learn.
        context: float64 [R, F], what the decision saw, or the same in plain numbers where a tensor would take too long
            to make; None for policies that do not learn.
        wants_stop: bool [R], True where the greedy rule would have stopped although the row runs on.
        lasting: True if later batches will ask for the same `sets`: their weights are then worth keeping sliced.
    """

    sets: Tensor
    choice: Tensor
    arm: Tensor | None = None
    context: Tensor | list[list[float]] | None = None
    wants_stop: Tensor | None = None
    lasting: bool = False


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
    """Logits of one exit: `layer` in 0..N (0 = the lexical one), `rows` int64 [R], `logits` [R, C].

    Of a tagger they are [R, T, C], -inf at places without a token. `own`: the same before earlier exits were added.
    """

    layer: int
    rows: Tensor
    logits: Tensor
    own: Tensor | None = None


def _as_tensor(context: Tensor | list[list[float]] | None) -> Tensor | None:
    return torch.tensor(context, dtype=torch.float64) if isinstance(context, list) else context


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass
class Ran:
    """One layer as it was executed.

    Attributes:
        layer: 0..N-1.
        rows: int64 [R], rows of the batch, group by group. lengths: int64 [R], their tokens.
        groups: of each group its head set bool [H], how many units that is, and its number of rows. Neighbours of the
            same size attend in one call, padded to the longest of their rows.
        exits: None, or whether the exit after the layer, which ran too, scored every token.
    """

    layer: int
    rows: Tensor
    lengths: Tensor
    groups: list[tuple[Tensor, int, int]]
    exits: bool | None = None


class Account:
    """What was executed, noted while it runs and added up when somebody asks afterwards: serving seldom does.

    Args:
        cost: FLOPs of the parts.
        lengths: int64 [B], tokens of each row.
        deciding: FLOPs of the policy's decision before each layer, or None if it decides for nothing.
    """

    def __init__(self, cost: CostModel, lengths: Tensor, deciding: list[float] | None = None) -> None:
        self.cost, self.lengths, self.deciding = cost, lengths, deciding
        self.ran: list[Ran] = []
        self.left: list[tuple[Tensor, Tensor, bool]] = []
        """Rows and lengths of exits computed on leaving, outside of a layer, and whether they scored every token."""
        self.lexical = False
        """Whether the exit before layer 1 was read."""

    @cached_property
    def units(self) -> Tensor:
        """Bool [B, N, H], head units executed."""
        shape = (len(self.lengths), self.cost.layers, self.cost.heads)
        units = torch.zeros(shape, dtype=torch.bool, device=self.lengths.device)
        for ran in self.ran:
            sets = torch.stack([mask for mask, *_ in ran.groups]).to(units.device)
            units[ran.rows, ran.layer] = sets[_group_of(ran)]
        return units

    @cached_property
    def dense_flops(self) -> Tensor:
        """float64 [B], FLOPs of the full model without exits on the same tokens."""
        return self.cost.dense(self.lengths)

    @cached_property
    def layer_flops(self) -> Tensor:
        """float64 [B, N], FLOPs of each layer and of the exit after it."""
        flops = torch.zeros(len(self.lengths), self.cost.layers, dtype=torch.float64, device=self.lengths.device)
        for ran in self.ran:
            group = _group_of(ran)
            size = torch.tensor([size for _, size, _ in ran.groups], device=flops.device)
            band = torch.nn.functional.pad(size.diff() != 0, (1, 0)).cumsum(0)[group]
            longest = torch.zeros_like(size).scatter_reduce(0, band, ran.lengths, "amax")[band]
            spent = self.cost.layer(ran.lengths, size[group], longest)
            if ran.exits is not None:
                spent = spent + self.cost.exit(ran.lengths, ran.exits)
            flops[ran.rows, ran.layer] = spent
        return flops

    @cached_property
    def flops(self) -> Tensor:
        """float64 [B], executed FLOPs: embedding projection, attention (padding included), FFN, exits, policy."""
        flops = self.cost.embedding(self.lengths) + self.layer_flops.sum(-1)
        if self.lexical:
            flops += self.cost.lexical(self.lengths)
        for rows, lengths, attends in self.left:
            flops[rows] += self.cost.exit(lengths, attends)
        if self.deciding is not None:  # a row that ran a layer decided before it, and once more if there was another
            spent = torch.tensor([0.0, *self.deciding], dtype=torch.float64, device=flops.device).cumsum(0)
            flops += spent[(self.units.any(-1).sum(-1) + 1).clamp_max(self.cost.layers)]
        return flops

    def of(self, rows: Tensor) -> Account:
        """The account of some rows (int64 [R]) alone."""
        part = Account(self.cost, self.lengths[rows])
        sums = {name: getattr(self, name)[rows] for name in ("units", "dense_flops", "layer_flops", "flops")}
        part.__dict__.update(sums)
        return part


def _group_of(ran: Ran) -> Tensor:
    """int64 [R], the group of each row."""
    counts = torch.tensor([count for *_, count in ran.groups], device=ran.rows.device)
    return torch.repeat_interleave(counts, output_size=len(ran.rows))


@dataclass
class Trace:
    """What was executed for each row of a batch; reports, rewards and pictures all read it.

    Attributes:
        account: what ran; `units`, `flops`, `dense_flops` and `layer_cost` are read off it.
        exits: every exit that was computed, in order of depth.
        logits: [B, C], each row's answer: the logits of the last exit that it reached. Of a tagger [B, T, C], as its
            exits have them.
        decisions: of policies that learn, one entry a layer: the rows (int64 [R]) and what was decided for them. The
            tables `arm`, `context` and `wants_stop` are made of it when somebody asks.
        gate_grads: per layer, (rows [R], set [k], d loss / d gate [R, k]) of each executed group; filled by backward.
        policy_seconds: wall time spent deciding.
    """

    account: Account
    exits: list[Exit] = field(default_factory=list)
    logits: Tensor = field(default_factory=_empty)
    decisions: list[tuple[Tensor, Decision]] = field(default_factory=list)
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
        return Trace(self.account.of(at), exits, self.logits[at], policy_seconds=self.policy_seconds / len(self.units))

    @property
    def units(self) -> Tensor:
        """Bool [B, N, H], head units executed."""
        return self.account.units

    @property
    def flops(self) -> Tensor:
        """float64 [B], executed FLOPs: attention (padding included), FFN, exit heads, policy arithmetic."""
        return self.account.flops

    @property
    def dense_flops(self) -> Tensor:
        """float64 [B], FLOPs of the full model without exits on the same tokens."""
        return self.account.dense_flops

    @property
    def layer_cost(self) -> Tensor:
        """float64 [B, N], executed FLOPs of each layer (its exit included) as a fraction of `dense_flops`."""
        return self.account.layer_flops / self.dense_flops[:, None]

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
        return self._table(lambda decision: _as_tensor(decision.context), 0)

    @property
    def wants_stop(self) -> Tensor:
        """Bool [B, N], where the greedy rule would have stopped before that layer."""
        return self._table(lambda decision: decision.wants_stop, False)

    def _table(self, part: Callable[[Decision], Tensor | None], empty: float) -> Tensor:
        batch, layers = len(self.account.lengths), self.account.cost.layers
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
        """Returns exits 1 to N as one table: logits [B, N, C] (zeros where not visited) and visited, bool [B, N].

        Of a tagger the logits are [B, N, T, C].
        """
        rows, num_layers = len(self.account.lengths), self.account.cost.layers
        first = self.exits[0].logits
        table = first.new_zeros(rows, num_layers, *first.shape[1:])
        visited = torch.zeros(rows, num_layers, dtype=torch.bool, device=first.device)
        for exit_ in self.exits:
            if not exit_.layer:
                continue
            table[exit_.rows, exit_.layer - 1] = exit_.logits.detach().to(table.dtype)
            visited[exit_.rows, exit_.layer - 1] = True
        return table, visited
