"""The price curve: which fraction of dense FLOPs the learned policy spends at which price, from one pass over rows.

Each held-out row runs to the end once, at the narrowest widths. At any price the rule then says where it would have
left, and what it would have spent is a sum over the layers before: every row counts at every price, at no further cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .hf.modeling import DHTForSequenceClassification
from .plan import Decision, Trace
from .policy.base import Policy, View
from .policy.budget import HIGHEST, LOWEST
from .policy.learned import LearnedPolicy

FRACTIONS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.33, 0.26, 0.2, 0.15, 0.1, 0.05)
"""Budgets whose prices are looked up; the trained one is added."""


class ToTheEnd(Policy):
    """Runs every row to the end with the learned policy's narrowest widths and the sets it serves with."""

    name = "to the end"

    def __init__(self, learned: LearnedPolicy) -> None:
        super().__init__()
        self.run_on = learned.run_on
        self.num_features, self.reads_exits = learned.num_features, learned.reads_exits

    def decide(self, view: View) -> Decision:
        return self.run_on(view)


def measure_curve(model: DHTForSequenceClassification, batches: Sequence[dict[str, Tensor]], budget: float) -> float:
    """Keeps the curve in the policy, sets the price of `budget`, and returns the FLOPs that this took.

    A row that would run a wider set is taken to see what it saw at the narrowest; its cost is that of the wider set.

    Args:
        batches: inputs; labels are ignored.
    """
    policy, onward = model.policy, ToTheEnd(model.policy)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        traces = [model(**{k: v for k, v in batch.items() if k != "labels"}, policy=onward).trace for batch in batches]
        keep_curve(policy, traces, budget)
    model.train(was_training)
    return sum(float(trace.flops.sum()) for trace in traces)


class _Together(Trace):
    """Several traces as one, as far as `would_spend` looks: hundreds of prices are tried, each on all rows at once."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        super().__init__(traces[0].account)
        self._columns = {
            name: torch.cat([getattr(trace, name) for trace in traces]) for name in ("units", "context", "layer_cost")
        }

    @property
    def units(self) -> Tensor:
        return self._columns["units"]

    @property
    def context(self) -> Tensor:
        return self._columns["context"]

    @property
    def layer_cost(self) -> Tensor:
        return self._columns["layer_cost"]


def keep_curve(policy: LearnedPolicy, traces: Sequence[Trace], budget: float) -> None:
    """Keeps the curve of traces in which every row ran to the end at its narrowest, and sets the price of `budget`."""
    dense, together = torch.cat([trace.dense_flops for trace in traces]), _Together(traces)

    def fraction_at(price: float) -> float:
        spent = policy.would_spend(together, price)
        return float((spent * dense).sum() / dense.sum())

    wanted = sorted({*FRACTIONS, budget}, reverse=True)
    prices = [_price_of(fraction, fraction_at) for fraction in wanted]
    fractions = [fraction_at(price) for price in prices]
    policy.fix_curve(torch.tensor(prices, dtype=torch.float64), torch.tensor(fractions, dtype=torch.float64))
    policy.set_budget(budget)


def _price_of(fraction: float, fraction_at: Callable[[float], float]) -> float:
    """The lowest price at which no more than `fraction` is spent, to 2^-20 of the range."""
    low, high = LOWEST, HIGHEST
    for _ in range(24):
        middle = (low + high) / 2
        if fraction_at(middle) > fraction:
            low = middle
        else:
            high = middle
    return high
