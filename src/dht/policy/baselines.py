"""The rivals, as policies: they go through the same loop and the same executor as the learned one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import Decision, Plan
from ..task import SINGLE_LABEL, Task
from .base import Policy, View, run_all


class DensePolicy(Policy):
    """Runs everything; one exit, at the end."""

    name = "dense"
    trains_exits = False

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def decide(self, view: View) -> Decision:
        return run_all(view, self.heads)


class StaticPolicy(Policy):
    """Every row runs the first L layers, each with its K best units.

    Args:
        layers: L.
        units: K.
        ranking: int64 [N, H], head units of each layer, best first.
    """

    name = "static"
    trains_exits = False

    def __init__(self, layers: int, units: int, ranking: Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.sets = torch.zeros(ranking.shape, dtype=torch.bool).scatter_(1, ranking[:, :units].cpu(), True)

    def decide(self, view: View) -> Decision:
        runs = 0 if view.layer < self.layers else -1
        choice = torch.full((view.rows.numel(),), runs)
        return Decision(self.sets[view.layer][None], choice, lasting=True)


class FixedPlan(Policy):
    """Executes a given plan: any head set for any row (the exact per-sample path)."""

    name = "plan"

    def __init__(self, plan: Plan, reads_exits: bool = True) -> None:
        super().__init__()
        self.plan, self.reads_exits = plan, reads_exits
        self.units = plan.units.cpu()

    def decide(self, view: View) -> Decision:
        wanted = self.units[view.packed.host_rows, view.layer]
        sets, choice = wanted.unique(dim=0, return_inverse=True)
        return Decision(sets, torch.where(wanted.any(-1), choice, -1))


class DepthPolicy(Policy):
    """Rivals that choose only when to leave; the head sets are the same for all rows.

    Args:
        sets: bool [N, H], units to run in each layer; at a layer without any all rows leave.
    """

    leaves_at_once = False
    """True if a row may leave before layer 1, where there is a lexical exit."""

    def __init__(self, sets: Tensor) -> None:
        super().__init__()
        self.sets = sets.cpu()

    def stops(self, view: View) -> Tensor:
        """Bool [R], which rows leave before the next layer."""
        raise NotImplementedError

    def decide(self, view: View) -> Decision:
        choice = torch.zeros_like(view.rows)
        if not bool(self.sets[view.layer].any()):
            choice = torch.full_like(choice, -1)
        elif view.layer or (self.leaves_at_once and view.logits is not None):
            choice = torch.where(self.stops(view), -1, choice)
        return Decision(self.sets[view.layer][None], choice, lasting=True)


class ConfidencePolicy(DepthPolicy):
    """Leaves once the exit's confidence (of single labels, the largest probability) passes `threshold`."""

    name = "confidence"
    reads_exits = True
    leaves_at_once = True

    def __init__(self, sets: Tensor, threshold: float, task: Task = SINGLE_LABEL) -> None:
        super().__init__(sets)
        self.threshold, self.task = threshold, task

    def stops(self, view: View) -> Tensor:
        assert view.logits is not None, "reads_exits is set"
        return self.task.confidence(view.logits) > self.threshold


class PatiencePolicy(DepthPolicy):
    """Leaves once `patience` + 1 exits in a row agree (PABEE, arXiv 2006.04152).

    Args:
        patience: agreements needed. With a fraction f, a share f of the rows (by position in a fixed hash of their
            tokens) needs one more, so that any mean depth can be matched.
    """

    name = "patience"
    reads_exits = True

    def __init__(self, sets: Tensor, patience: float, task: Task = SINGLE_LABEL) -> None:
        super().__init__(sets)
        self.patience, self.task = patience, task

    def stops(self, view: View) -> Tensor:
        table, _ = view.trace.exit_table()
        passed = table[view.rows, : view.layer]
        same = self.task.agree(passed[:, 1:], passed[:, :-1]).flip(-1).long().cumprod(-1).sum(-1)
        whole = int(self.patience)
        need = whole + (token_hash(view)[view.rows] < self.patience - whole).long()
        return same >= need


class PriorPolicy(Policy):
    """Rivals that ignore the content: plans drawn from a list of executed ones, so that arm frequencies match.

    Frequencies count by weight. With the rows' dense FLOPs as weights the mean FLOPs fraction matches too, although the
    list's rows were of other lengths than those that now get their plans.

    Args:
        plans: bool [P, N, H], plans that the learned policy executed.
        kind: "random" draws one per row; "hash" picks by a hash of the tokens; "length" gives longer rows dearer plans,
            rows of one length by a hash those that such rows span.
        weights: float [P], how often each plan counts; None = once.
        lengths: int64 [P], tokens of the rows that the plans were executed on (for "length").
    """

    reads_exits = True  # its answers add up, as ours do
    plans: Tensor
    share_of_plan: Tensor
    lengths: Tensor
    share_of_length: Tensor

    def __init__(
        self, plans: Tensor, kind: str, weights: Tensor | None = None, lengths: Tensor | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.name, self.kind, self.seed = kind, kind, seed
        weights = torch.ones(len(plans), device=plans.device) if weights is None else weights
        by_cost = plans.sum((1, 2)).argsort(stable=True)
        ordered = torch.zeros(0) if lengths is None else lengths.sort().values
        for name, tensor in (
            ("plans", plans[by_cost]), ("share_of_plan", _cumulative(weights[by_cost])),
            ("lengths", ordered), ("share_of_length", _cumulative(ordered)),
        ):  # fmt: skip
            self.register_buffer(name, tensor, persistent=False)

    def decide(self, view: View) -> Decision:
        share = token_hash(view, salt=self.seed + 1 if self.kind == "random" else 0)
        if self.kind == "length":
            tokens = view.attention_mask.sum(-1)
            edges = torch.nn.functional.pad(self.share_of_length, (1, 0))
            ends = [torch.searchsorted(self.lengths, tokens, right=right) for right in (False, True)]
            share = torch.lerp(edges[ends[0]], edges[ends[1]], share)
        pick = torch.searchsorted(self.share_of_plan, share, right=True).clamp_max(len(self.plans) - 1)
        wanted = self.plans[pick[view.rows], view.layer]
        sets, choice = wanted.unique(dim=0, return_inverse=True)
        return Decision(sets, torch.where(wanted.any(-1), choice, -1))


def _cumulative(weights: Tensor) -> Tensor:
    """Float64 [P], running share of the total, ending at 1."""
    running = weights.to(torch.float64).cumsum(0)
    return running / running[-1:]


def token_hash(view: View, salt: int = 0) -> Tensor:
    """Uniform-looking value in [0, 1) of each batch row's tokens, float64 [B]; padding does not change it."""
    ids = view.input_ids * view.attention_mask.long()
    place = view.attention_mask.long().cumsum(-1)
    mixed = ((ids + 1) * (place * 2_654_435_761 + 97 + salt * 7_919) % 2_147_483_647) * view.attention_mask.long()
    return ((mixed.sum(-1) * 48_271 + salt * 69_621) % 2_147_483_647).double() / 2_147_483_647
