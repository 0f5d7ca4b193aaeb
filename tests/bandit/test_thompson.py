"""Thompson sampling of sets: scores, the k best, and the codebook against brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.bandit import LinearPosterior, codebook, mean_scores, nearest_in_codebook, sample_scores, top_k


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(arms: int = 5) -> LinearPosterior:
    posterior = LinearPosterior(arms, 3, ridge=0.5)
    posterior.update(randn(0, 30, 3), randn(1, 30, arms) > 0, randn(2, 30, arms))
    return posterior


def objective(scores: torch.Tensor, sets: torch.Tensor) -> float:
    return float((scores @ sets.T.to(scores)).amax(dim=1).sum())


def test_one_draw_serves_the_whole_batch() -> None:
    posterior, context = trained(), randn(3, 6, 3)
    context[4] = context[1]
    scores = sample_scores(posterior, context, 0.5, torch.Generator().manual_seed(1))
    theta = posterior.sample(0.5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(scores, context @ theta.T)
    torch.testing.assert_close(scores[4], scores[1], rtol=0.0, atol=0.0)
    some = sample_scores(posterior, context, 0.0, torch.Generator(), arms=slice(1, 3))
    torch.testing.assert_close(some, mean_scores(posterior, context)[:, 1:3])


def test_scores_without_exploration_are_the_mean() -> None:
    posterior, context = trained(), randn(3, 6, 3)
    torch.testing.assert_close(
        sample_scores(posterior, context, 0.0, torch.Generator()), mean_scores(posterior, context)
    )
    torch.testing.assert_close(mean_scores(posterior, context), posterior.predict(context)[..., 0])
    arms = torch.tensor([3, 1])
    torch.testing.assert_close(mean_scores(posterior, context, arms), mean_scores(posterior, context)[:, arms])


def test_choosing_leaves_the_posterior_alone() -> None:
    posterior, context = trained(), randn(3, 6, 3)
    before = posterior.snapshot()
    scores = sample_scores(posterior, context, 1.0, torch.Generator().manual_seed(0))
    nearest_in_codebook(scores, codebook(scores, 2, 3))
    assert all(torch.equal(value, before[name]) for name, value in posterior.snapshot().items())


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(-2, 2), min_size=6, max_size=6), st.integers(0, 6)), min_size=1, max_size=5
    )
)
@settings(max_examples=80, deadline=None)
def test_top_k_equals_brute_force(rows: list[tuple[list[int], int]]) -> None:
    # Small integers, so that most rows have ties.
    mask = top_k(torch.tensor([values for values, _ in rows]).float(), torch.tensor([k for _, k in rows]))
    for got, (values, k) in zip(mask, rows, strict=True):
        best = sorted(range(6), key=lambda arm: (-values[arm], arm))[:k]
        assert got.nonzero().flatten().tolist() == sorted(best)


def test_top_k_can_forbid_with_minus_infinity() -> None:
    scores = torch.tensor([[-math.inf, 0.0, -1.0]])
    assert top_k(scores, torch.tensor([2])).tolist() == [[False, True, True]]
    assert top_k(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), k=st.integers(1, 3), size=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_greedy_codebook_is_near_the_optimum(seed: int, rows: int, k: int, size: int) -> None:
    scores = randn(seed, rows, 5)
    got = codebook(scores, k, size)
    assert got.dtype == torch.bool
    assert 1 <= got.shape[0] <= size
    assert (got.sum(dim=1) == k).all()
    assert torch.unique(got, dim=0).shape[0] == got.shape[0]

    mean_best = top_k(scores.mean(dim=0, keepdim=True), torch.tensor([k]))
    pool = torch.cat([mean_best, top_k(scores, torch.full((rows,), k))])
    optimum = (
        max(objective(scores, pool[list(some)]) for some in itertools.combinations(range(len(pool)), size))
        if len(pool) >= size
        else objective(scores, pool)
    )
    # The guarantee is for what rises from 0 with no set at all; a row's worst set is that zero.
    zero = float(scores.topk(k, dim=1, largest=False).values.sum())
    assert objective(scores, got) - zero >= (1 - 1 / math.e) * (optimum - zero) - 1e-9
    assert objective(scores, got) <= optimum + 1e-9


@given(seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_more_sets_never_serve_worse(seed: int) -> None:
    scores = randn(seed, 7, 6)
    books = [codebook(scores, 2, size) for size in range(1, 9)]
    values = [objective(scores, book) for book in books]
    assert all(later >= earlier for earlier, later in itertools.pairwise(values))
    # A larger codebook extends the smaller one, and enough sets give every row its own best.
    assert all(torch.equal(later[: len(earlier)], earlier) for earlier, later in itertools.pairwise(books))
    own = float(scores.topk(2, dim=1).values.sum())
    assert values[-1] == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_single_set_is_the_best_of_all_sets(k: int) -> None:
    scores = randn(k, 9, 5)
    sets = torch.zeros(math.comb(5, k), 5, dtype=torch.bool)
    for row, some in zip(sets, itertools.combinations(range(5), k), strict=True):
        row[list(some)] = True
    best = max(objective(scores, one.unsqueeze(0)) for one in sets)
    assert objective(scores, codebook(scores, k, 1)) == pytest.approx(best, rel=1e-12)


def test_codebook_stops_when_nothing_is_gained() -> None:
    scores = torch.tensor([[3.0, 2.0, 0.0, 0.0]]).expand(8, 4)
    assert codebook(scores, 2, 5).tolist() == [[True, True, False, False]]
    assert codebook(scores, 0, 5).tolist() == [[False] * 4]
    assert codebook(scores, 4, 5).tolist() == [[True] * 4]
    two_kinds = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.9, 0.0], [0.0, 0.5, 1.0]])
    # The mean is (0.67, 0.77, 0.33): arms 0 and 1 first, then what the third row misses.
    assert codebook(two_kinds, 2, 9).tolist() == [[True, True, False], [False, True, True]]
    assert codebook(torch.zeros(0, 3), 2, 4).shape == (0, 3)


def test_nearest_is_the_best_total_score_and_ties_go_low() -> None:
    sets = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
    scores = torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 5.0], [1.0, 1.0, 1.0], [-9.0, -1.0, -5.0]])
    assert nearest_in_codebook(scores, sets).tolist() == [1, 2, 0, 1]
    assert nearest_in_codebook(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0,)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_nearest_equals_brute_force(seed: int) -> None:
    scores = randn(seed, 8, 6)
    sets = codebook(scores, 3, 4)
    expected = [max(range(len(sets)), key=lambda g, row=row: (float(row[sets[g]].sum()), -g)) for row in scores]
    assert nearest_in_codebook(scores, sets).tolist() == expected


def test_semi_bandit_feedback_teaches_only_the_chosen_arms() -> None:
    posterior = LinearPosterior(3, 2)
    chosen = torch.tensor([[True, False, True]])
    posterior.update(torch.tensor([[1.0, 2.0]]), chosen, torch.tensor([[1.0, torch.nan, -1.0]]))
    # ridge 1: theta = phi r / (1 + phi^T phi) = phi r / 6.
    expected = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, -2.0]], dtype=torch.float64) / 6
    torch.testing.assert_close(posterior.mean()[..., 0], expected)
    assert posterior.pulls.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("scores", "k", "text"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"scores must be \[B, M\], got \[3\]"),
        (torch.zeros(2, 3), torch.tensor([1]), r"k must be integers \[B\] = \[2\], got torch.int64 \[1\]"),
        (torch.zeros(2, 3), torch.tensor([1.0, 1.0]), r"k must be integers \[B\] = \[2\], got torch.float32 \[2\]"),
        (torch.zeros(2, 3), torch.tensor([3, 4]), r"row 1: k must be in \[0, 3\], got 4"),
        (torch.zeros(2, 3), torch.tensor([-1, 4]), r"row 0: k must be in \[0, 3\], got -1"),
        (torch.tensor([[0.0], [torch.nan]]), torch.tensor([1, 1]), "row 1: a score is NaN"),
    ],
)
def test_wrong_top_k(scores: torch.Tensor, k: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        top_k(scores, k)


def test_wrong_codebooks() -> None:
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"scores must be \[B, M\], got \[3\]"):
        codebook(scores[0], 1, 1)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=rf"k must be in \[0, 3\], got {k}"):
            codebook(scores, k, 1)
    with pytest.raises(ValueError, match="max_sets must be at least 1, got 0"):
        codebook(scores, 1, 0)
    with pytest.raises(ValueError, match="row 1: a score is not finite"):
        codebook(torch.tensor([[0.0], [torch.inf]]), 1, 1)


def test_wrong_nearest() -> None:
    sets = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"scores must be \[B, M\], got \[3\]"):
        nearest_in_codebook(torch.zeros(3), sets)
    with pytest.raises(ValueError, match=r"sets must be \[G, M\] with M = 3, got \[1, 2\]"):
        nearest_in_codebook(torch.zeros(2, 3), sets[:, :2])
    with pytest.raises(ValueError, match="sets is empty, but there are 2 rows to serve"):
        nearest_in_codebook(torch.zeros(2, 3), sets[:0])
    with pytest.raises(ValueError, match="row 0: a score is not finite"):
        nearest_in_codebook(torch.full((2, 3), torch.nan), sets)
