"""Combinatorial Thompson sampling: sampled scores, the k best of them, and a small codebook of sets for a batch.

Feedback is semi-bandit: `posterior.update` with the chosen mask as weight and one target per chosen arm.

Shape letters: B rows, M arms, m selected arms, F features, G sets, C candidate sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dht.bandit.posterior import Arms, LinearPosterior
from dht.errors import NonFiniteError


def sample_scores(
    posterior: LinearPosterior, context: Tensor, sigma: float, generator: torch.Generator, arms: Arms = None
) -> Tensor:
    """Scores theta_tilde^T phi with one theta_tilde per arm for the whole batch, float64 [B, m].

    One joint draw, so that rows with the same context get the same scores and share a group.

    Args:
        posterior: its target 0 is scored.
        context: phi, any float dtype and device, [B, F].
        sigma: scale of the exploration, >= 0.
        generator: the only randomness.
        arms: which arms; see `Arms`.

    Raises:
        ValueError: context is not [B, F], or sigma is negative or not finite.

    Source: Agrawal & Goyal 2013, algorithm 1, with one posterior per arm; sets as in Wen, Kveton & Ashkan 2015.
    """
    theta = posterior.sample(sigma, generator, arms)
    return posterior._context(context) @ theta.T


def mean_scores(posterior: LinearPosterior, context: Tensor, arms: Arms = None) -> Tensor:
    """Scores theta_hat^T phi without exploration, float64 [B, m].

    Args:
        posterior: its target 0 is scored.
        context: phi, any float dtype and device, [B, F].
        arms: which arms; see `Arms`.

    Raises:
        ValueError: context is not [B, F].
    """
    return posterior.predict(context, arms)[..., 0]


def top_k(scores: Tensor, k: Tensor) -> Tensor:
    """Which arms are among the k[b] best of row b, bool [B, M], exactly k[b] True; ties go to the lowest arm.

    Args:
        scores: any float dtype, [B, M], no NaN.
        k: int64 [B], each in [0, M].

    Raises:
        ValueError: a wrong shape, a k outside [0, M], or a NaN score; the message names the row.

    >>> top_k(torch.tensor([[0.1, 0.9, 0.9]]), torch.tensor([1]))
    tensor([[False,  True, False]])
    """
    _check_matrix(scores)
    rows, arms = scores.shape
    if k.shape != (rows,) or k.is_floating_point() or k.dtype == torch.bool:
        raise ValueError(f"k must be integers [B] = [{rows}], got {k.dtype} {list(k.shape)}")
    k = k.to(scores.device)
    outside = (k < 0) | (k > arms)
    undefined = scores.isnan().any(dim=1)
    bad = outside | undefined
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        if outside[row]:
            raise ValueError(f"row {row}: k must be in [0, {arms}], got {int(k[row])}")
        raise NonFiniteError(f"row {row}: a score is NaN")
    order = scores.argsort(dim=1, descending=True, stable=True)
    taken = torch.arange(arms, device=scores.device) < k.unsqueeze(1)
    return torch.zeros_like(taken).scatter(1, order, taken)


def codebook(scores: Tensor, k: int, max_sets: int) -> Tensor:
    """At most max_sets sets of k arms, chosen so that every row finds a good one, bool [G, M], 1 <= G <= max_sets.

    Greedy facility location: maximise sum_b max_g score(b, g), where score(b, g) is the sum of row b's scores over
    set g. The first set is the top-k of the mean score, which no other single set of k arms can beat. Then comes,
    again and again, the row's own top-k that raises the objective the most, until none does. The objective is
    monotone and submodular, so over the sets considered its rise above the worst set of each row is at least
    1 - 1/e of the best possible.

    Args:
        scores: any float dtype, [B, M], finite. With B = 0 the codebook is empty, G = 0.
        k: arms per set, in [0, M].
        max_sets: >= 1.

    Raises:
        ValueError: a wrong shape, k outside [0, M], max_sets below 1, or a score that is not finite.

    Source: Nemhauser, Wolsey & Fisher 1978, "An analysis of approximations for maximizing submodular set functions",
        section 4; the candidates are restricted to the rows' own best sets and that of the mean.
    """
    _check_matrix(scores)
    rows, arms = scores.shape
    if not 0 <= k <= arms:
        raise ValueError(f"k must be in [0, {arms}], got {k}")
    if max_sets < 1:
        raise ValueError(f"max_sets must be at least 1, got {max_sets}")
    _check_finite(scores)
    if rows == 0:
        return torch.zeros(0, arms, dtype=torch.bool, device=scores.device)
    scores = scores.to(torch.float64)
    own = top_k(scores, torch.full((rows,), k, device=scores.device))
    candidates: Tensor = torch.unique(own, dim=0)
    chosen = [top_k(scores.mean(dim=0, keepdim=True), torch.tensor([k], device=scores.device))]
    best = (scores @ chosen[0].T.to(scores.dtype)).squeeze(1)
    value = scores @ candidates.T.to(scores.dtype)  # [B, C]
    # A gain below the rounding of the sums is a tie, not a reason to split a group.
    noise = 1e-12 * float(scores.abs().sum())
    while len(chosen) < max_sets:
        gain = (value - best.unsqueeze(1)).clamp_min(0.0).sum(dim=0)
        winner = int(gain.argmax())
        if float(gain[winner]) <= noise:
            break
        chosen.append(candidates[winner : winner + 1])
        best = torch.maximum(best, value[:, winner])
    return torch.cat(chosen)


def nearest_in_codebook(scores: Tensor, sets: Tensor) -> Tensor:
    """The set with the highest total score for every row, int64 [B]; ties go to the lowest set.

    Args:
        scores: any float dtype, [B, M], finite.
        sets: bool [G, M]; G >= 1 unless B = 0.

    Raises:
        ValueError: a wrong shape, no set to choose from, or a score that is not finite.
    """
    _check_matrix(scores)
    if sets.ndim != 2 or sets.shape[1] != scores.shape[1]:
        raise ValueError(f"sets must be [G, M] with M = {scores.shape[1]}, got {list(sets.shape)}")
    if sets.shape[0] == 0 and scores.shape[0] > 0:
        raise ValueError(f"sets is empty, but there are {scores.shape[0]} rows to serve")
    _check_finite(scores)
    if scores.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    return (scores.to(torch.float64) @ sets.to(device=scores.device, dtype=torch.float64).T).argmax(dim=1)


def _check_matrix(scores: Tensor) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores must be [B, M], got {list(scores.shape)}")


def _check_finite(scores: Tensor) -> None:
    bad = ~scores.isfinite().all(dim=1)
    if bool(bad.any()):
        raise NonFiniteError(f"row {int(bad.nonzero()[0])}: a score is not finite")
