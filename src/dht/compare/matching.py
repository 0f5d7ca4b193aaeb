"""Matched costs: the price, threshold or list of plans at which a policy spends what it may, found on validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..hf.modeling import DHTForSequenceClassification
from ..measure import Batch, Outcome, run_policy
from ..policy.base import Policy
from ..policy.baselines import PriorPolicy
from ..policy.budget import HIGHEST, LOWEST

WITHIN = 0.01
"""How near is near enough, relative to the budget."""

MOST_RUNS = 12
"""Passes over the validation split that a search may take."""


def nearest(fraction_at: Callable[[float], float], start: float, budget: float) -> tuple[float, float]:
    """The price whose measured fraction is nearest to `budget`, and that fraction.

    The fraction falls with the price, in steps. From `start` the search walks in doubling steps until it has the budget
    between two prices, then halves the gap.

    Args:
        fraction_at: measures the fraction at a price.
    """
    seen: dict[float, float] = {}
    price, step = start, 0.02
    while len(seen) < MOST_RUNS:
        seen[price] = fraction_at(price)
        if abs(seen[price] - budget) <= WITHIN * budget:
            break
        above = max((p for p, f in seen.items() if f > budget), default=None)
        below = min((p for p, f in seen.items() if f <= budget and (above is None or p > above)), default=None)
        if below is None:
            price, step = min(price + step, HIGHEST), 2 * step
        elif above is None:
            price, step = max(price - step, LOWEST), 2 * step
        else:
            price = (above + below) / 2
        if price in seen:
            break
    best = min(seen, key=lambda p: abs(seen[p] - budget))
    return best, seen[best]


def match_price(
    model: DHTForSequenceClassification, policy: Policy | None, batches: Sequence[Batch], budget: float,
    dtype: torch.dtype,
) -> float:  # fmt: skip
    """Sets the learned policy's price so that `policy` (None = it itself) meets `budget`; returns the fraction met.

    Args:
        policy: one that decides by the learned policy's price, such as the shuffled one.
        batches: validation batches.
    """
    price = model.policy.price

    def fraction_at(value: float) -> float:
        price.fill_(value)
        return run_policy(model, batches, policy, dtype=dtype).flops_fraction

    model.policy.set_budget(budget)
    best, met = nearest(fraction_at, float(price), budget)
    price.fill_(best)
    return met


def match_plans(
    model: DHTForSequenceClassification, kind: str, batches: Sequence[Batch], outcome: Outcome, budget: float,
    dtype: torch.dtype, seed: int = 0,
) -> PriorPolicy:  # fmt: skip
    """A policy that ignores content, with the arm frequencies of `outcome`, tilted so that the mean FLOPs are `budget`.

    Frequencies count by the FLOPs of the rows and are multiplied by exp(tilt * fraction), the smallest change that
    moves the mean; what that leaves (chance) is corrected by measuring.

    Args:
        kind: "random", "hash" or "length".
        batches: of validation. outcome: of the learned policy on them.
        budget: fraction of dense FLOPs to meet.
    """
    lengths = torch.cat([batch["attention_mask"].sum(-1) for batch in batches]).cpu()
    aim = budget
    for _ in range(4):
        policy = PriorPolicy(outcome.units, kind, _tilted(outcome, aim), lengths, seed).to(model.device)
        spent = run_policy(model, batches, policy, dtype=dtype).flops_fraction
        if abs(spent - budget) <= WITHIN * budget:
            break
        aim *= budget / spent
    return policy


def _tilted(outcome: Outcome, budget: float) -> Tensor:
    """Float64 [n], how often each row's plan counts so that the mean fraction is `budget`, or as near as can be."""
    fraction = outcome.units.double().mean((1, 2))
    low, high = -100.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        weight = outcome.dense_flops * (middle * (fraction - fraction.mean())).clamp(-300, 300).exp()
        spent = float((weight * fraction).sum() / weight.sum())
        low, high = (middle, high) if spent < budget else (low, middle)
    return weight


def match_confidence(outcome: Outcome, extra: float, budget: float) -> float:
    """The threshold at which a cascade meets `budget`: rows at most that sure cost `extra` of dense more.

    Args:
        outcome: of the small model on validation.
        extra: FLOPs of the second model as a fraction of dense.

    Returns:
        0 if the small model alone spends the budget, infinity if all rows can go on.
    """
    sure = outcome.exit_logits.gather(
        1, (outcome.layers - 1).clamp_min(0)[:, None, None].expand(-1, 1, outcome.exit_logits.shape[-1])
    )[:, 0].softmax(-1).amax(-1)  # fmt: skip
    order = sure.argsort()
    spent = (outcome.flops.sum() + extra * outcome.dense_flops[order].cumsum(0)) / outcome.dense_flops.sum()
    passed = int((spent <= budget).sum())
    if passed == len(sure):
        return math.inf
    return float(sure[order[passed - 1]]) if passed else 0.0
