"""The price of compute: raised while the policy spends more than its budget, lowered while it spends less."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Budget during training: `start` at step 0, falling along a half cosine to `budget` at `settle` of all steps.

    Args:
        budget: the target fraction of dense FLOPs, in (0, 1].
        start: fraction at the first step.
        settle: share of training after which the budget holds, in [0, 1].
    """

    budget: float
    start: float = 1.0
    settle: float = 0.5

    def spent(self, progress: float = 1.0) -> float:
        """The scheduled fraction summed up over training until `progress` in [0, 1]; over all of it, its mean."""
        above = max(self.start - self.budget, 0.0)
        if not self.settle:
            return self.budget * progress
        falling = min(progress, self.settle)
        turn = math.pi / self.settle
        return self.budget * progress + above * (falling + math.sin(turn * falling) / turn) / 2

    def at(self, progress: float) -> float:
        """The scheduled fraction at `progress` in [0, 1]."""
        if self.settle <= 0 or progress >= self.settle:
            return self.budget
        blend = 0.5 * (1 + math.cos(math.pi * progress / self.settle))
        return self.budget + max(self.start - self.budget, 0.0) * blend


LOWEST, HIGHEST = -1.0, 10.0
"""Bounds of the price, in units of quality per dense forward."""


BLIND_RATE = 4.0
"""Steps below zero in units of those above it: there the price is a share of rows, which moves the mean slowly."""


def dual_ascent(price: float, fraction: float, target: float, rate: float) -> float:
    """The next price: up by `rate` * (fraction - target), `BLIND_RATE` times that below zero.

    The price may turn negative: a budget has to be spent. Early in training all exits are about equally good, a policy
    that may underspend leaves at once, the deep layers never learn, and leaving at once becomes right. Within
    `LOWEST`..`HIGHEST`; at `LOWEST` every training row runs to the end.
    """
    step = rate * (fraction - target) * (BLIND_RATE if price < 0 else 1.0)
    return min(max(price + step, LOWEST), HIGHEST)


def price_for(budget: float, prices: Tensor, fractions: Tensor) -> float:
    """The price whose measured fraction is `budget`, linear between measured points.

    Args:
        prices, fractions: float64 [P], measured pairs in any order; noise is ironed out by a running minimum. A budget
            beyond the curve gets the price at its end.
    """
    order = prices.argsort()
    price: list[float] = prices[order].tolist()
    fraction: list[float] = fractions[order].cummin(0).values.tolist()
    for i, here in enumerate(fraction):
        if here <= budget:
            if i == 0 or fraction[i - 1] == here:
                return price[i]
            share = (fraction[i - 1] - budget) / (fraction[i - 1] - here)
            return price[i - 1] + share * (price[i] - price[i - 1])
    return price[-1]
