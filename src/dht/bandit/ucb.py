"""Upper confidence bounds with a price on cost: which arm is worth what it costs.

Shape letters: B rows, M arms, m selected arms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dht.bandit.posterior import Arms, LinearPosterior
from dht.errors import NonFiniteError


def ucb_index(
    posterior: LinearPosterior, context: Tensor, alpha: float, price: float | Tensor, arms: Arms = None
) -> Tensor:
    """The value of every arm for every row, q_hat + alpha * width - price * c_hat, float64 [B, m].

    Quality (target 0) and cost (target 1) are separate regressions on the same A, so the price may change after
    learning, with no new data.

    Args:
        posterior: with at least two targets: 0 quality, 1 cost.
        context: phi, any float dtype and device, [B, F].
        alpha: optimism, finite and >= 0.
        price: units of quality per unit of cost; a float, a tensor of one element, or [B] for one price a row.
        arms: which arms; see `Arms`.

    Raises:
        ValueError: fewer than two targets, alpha negative or not finite, price or context of a wrong shape.

    Source: LinUCB, Li, Chu, Langford & Schapire 2010, equation 5, with the cost subtracted as a Lagrangian.
    """
    if posterior.num_targets < 2:
        raise ValueError(f"posterior must have 2 targets (0 quality, 1 cost), got {posterior.num_targets}")
    if not (math.isfinite(alpha) and alpha >= 0.0):
        raise ValueError(f"alpha must be finite and >= 0, got {alpha}")
    phi = posterior._context(context)
    quality, cost, *_ = posterior._predict(phi, arms).unbind(dim=-1)
    if isinstance(price, Tensor):
        rows = context.shape[0]
        if price.numel() != 1 and price.shape != (rows,):
            raise ValueError(f"price must have one element or shape [B] = [{rows}], got {list(price.shape)}")
        index = quality - price.detach().to(cost).reshape(-1, 1) * cost
    else:
        index = quality.sub(cost, alpha=price)
    return index.add_(posterior._width(phi, arms), alpha=alpha) if alpha else index


def choose(index: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The arm with the highest index in every row, int64 [B]; a tie goes to the lowest arm, the cheapest one.

    Args:
        index: any float dtype, [B, M]; arms ordered by cost, cheapest first.
        allowed: bool [B, M] or [M]; False forbids the arm. None allows all.

    Raises:
        ValueError: a wrong shape, a row without an allowed arm, or a NaN at an allowed arm; the message names the row.
    """
    if index.ndim != 2 or index.shape[1] < 1:
        raise ValueError(f"index must be [B, M] with M >= 1, got {list(index.shape)}")
    if allowed is None:
        # A NaN counts as the largest value; of equal ones the first is taken.
        best, arm = index.max(dim=1)
        if math.isnan(float(best.sum())) and bool(best.isnan().any()):
            row = int(best.isnan().nonzero()[0])
            raise NonFiniteError(f"row {row}: the index of an allowed arm is NaN")
        return arm
    if allowed.dtype != torch.bool or allowed.shape not in (index.shape, index.shape[1:]):
        raise ValueError(f"allowed must be bool {list(index.shape)}, got {allowed.dtype} {list(allowed.shape)}")
    permitted = allowed.to(index.device).expand(index.shape)
    empty = ~permitted.any(dim=1)
    undefined = (index.isnan() & permitted).any(dim=1)
    bad = empty | undefined
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        if empty[row]:
            raise ValueError(f"row {row}: no arm is allowed")
        raise NonFiniteError(f"row {row}: the index of an allowed arm is NaN")
    masked = index.masked_fill(~permitted, -math.inf)
    # Compared with the row's best and with `permitted`, so that a row of -inf cannot select a forbidden arm.
    best = (masked == masked.amax(dim=1, keepdim=True)) & permitted
    return best.to(torch.uint8).argmax(dim=1)
