"""The price of compute: raised while the policy spends more than its budget, lowered while it spends less."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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

    def at(self, progress: float) -> float:
        """The scheduled fraction at `progress` in [0, 1]."""
        if self.settle <= 0 or progress >= self.settle:
            return self.budget
        blend = 0.5 * (1 + math.cos(math.pi * progress / self.settle))
        return self.budget + max(self.start - self.budget, 0.0) * blend


def dual_ascent(price: float, fraction: float, target: float, rate: float, floor: float = 1e-3, cap: float = 20.0) -> float:
    """The next price: multiplied up when `fraction` is above `target`, down when below.

    The step is taken on log(price): useful prices span three orders of magnitude between a loose and a tight budget, and
    an additive step that suits one end is frozen or wild at the other.
    """
    step = rate * max(-1.0, min(1.0, fraction / target - 1.0))
    return min(max(price * math.exp(step), floor), cap)


def price_for(budget: float, prices: Tensor, fractions: Tensor) -> float:
    """The price whose measured fraction is `budget`, by interpolating log price over a measured curve.

    Args:
        prices, fractions: float64 [P], measured pairs in any order; noise is ironed out by a running minimum.
    """
    order = prices.argsort()
    log_price, fraction = prices[order].log(), fractions[order].cummin(0).values
    for i in range(1, len(fraction)):
        if fraction[i] <= budget:
            if fraction[i - 1] <= budget:
                return float(log_price[i - 1].exp())
            share = (fraction[i - 1] - budget) / (fraction[i - 1] - fraction[i])
            return float((log_price[i - 1] + share * (log_price[i] - log_price[i - 1])).exp())
    return float(torch.exp(log_price[-1]))
