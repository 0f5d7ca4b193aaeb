"""UCB with a price: the index, the choice, and what moving the price alone does."""

import numpy as np
import pytest
import torch

from dht.bandit import LinearPosterior, choose, ucb_index


def trained(seed: int = 0, arms: int = 3, ridge: float = 2.5) -> LinearPosterior:
    generator = torch.Generator().manual_seed(seed)
    posterior = LinearPosterior(arms, 4, 2, ridge=ridge)
    context = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    chosen = torch.nn.functional.one_hot(torch.randint(arms, (40,), generator=generator), arms)
    posterior.update(context, chosen, torch.randn(40, arms, 2, generator=generator, dtype=torch.float64))
    return posterior


QUERY = torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_index_equals_the_textbook(textbook: type) -> None:
    generator = torch.Generator().manual_seed(1)
    posterior, book = LinearPosterior(3, 4, 2, ridge=0.6), textbook(3, 4, 2, np.full(3, 0.6))
    context = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(30, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(30, 3, 2, generator=generator, dtype=torch.float64)
    posterior.update(context, weight, target)
    book.update(context.numpy(), weight.numpy(), target.numpy())
    quality, cost = np.einsum("bf,mfo->obm", QUERY.numpy(), book.mean())
    expected = quality + 1.3 * book.width(QUERY.numpy()) - 0.4 * cost
    index = ucb_index(posterior, QUERY, alpha=1.3, price=0.4)
    np.testing.assert_allclose(index, expected, rtol=1e-9, atol=1e-10)
    picked = ucb_index(posterior, QUERY, 1.3, 0.4, arms=torch.tensor([2, 0]))
    np.testing.assert_allclose(picked, expected[:, [2, 0]], rtol=1e-9, atol=1e-10)


def test_price_may_be_a_tensor_or_one_a_row() -> None:
    posterior = trained()
    by_row = torch.linspace(0.0, 2.0, 6)
    together = ucb_index(posterior, QUERY, 1.0, by_row)
    for b, price in enumerate(by_row.tolist()):
        torch.testing.assert_close(together[b], ucb_index(posterior, QUERY, 1.0, price)[b])
    torch.testing.assert_close(
        ucb_index(posterior, QUERY, 1.0, torch.tensor(0.5)), ucb_index(posterior, QUERY, 1.0, 0.5)
    )


def test_price_moved_after_training_changes_the_choice_without_new_data() -> None:
    posterior = LinearPosterior(3, 1, 2, ridge=1e-6)
    # Arms ordered by cost: quality 0.6, 0.8, 0.9 at cost 0.1, 0.5, 1.0. The margins are 0.2 / 0.4 and 0.1 / 0.5,
    # so the dearest arm is worth it below 0.2, the middle one up to 0.5, the cheapest above.
    truth = torch.tensor([[0.6, 0.1], [0.8, 0.5], [0.9, 1.0]])
    posterior.update(torch.ones(100, 1), torch.ones(100, 3), truth.expand(100, 3, 2))
    before = posterior.snapshot()
    choices = [
        choose(ucb_index(posterior, torch.ones(1, 1), 0.1, price)).item() for price in (0.0, 0.19, 0.21, 0.49, 0.51)
    ]
    assert choices == [2, 2, 1, 1, 0]
    assert all(torch.equal(value, before[name]) for name, value in posterior.snapshot().items())


def test_more_optimism_prefers_the_arm_less_seen() -> None:
    posterior = LinearPosterior(2, 1, 2)
    posterior.update(torch.ones(50, 1), torch.tensor([[1.0, 0.0]]).expand(50, 2), torch.ones(50, 2, 2))
    query = torch.ones(1, 1)
    # Arm 0: mean 50/51, width 1/sqrt(51). Arm 1: mean 0, width 1. They cross at alpha = (50/51) / (1 - 1/sqrt(51)).
    crossing = (50 / 51) / (1 - 51**-0.5)
    assert choose(ucb_index(posterior, query, crossing - 0.01, 0.0)).item() == 0
    assert choose(ucb_index(posterior, query, crossing + 0.01, 0.0)).item() == 1


def test_ties_go_to_the_cheapest_arm() -> None:
    index = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0], [0.0, -1.0, 0.0]])
    assert choose(index).tolist() == [1, 0, 0]
    assert choose(torch.zeros(2, 1000)).tolist() == [0, 0]
    allowed = torch.tensor([[True, False, True], [False, True, True], [False, False, True]])
    assert choose(index, allowed).tolist() == [2, 1, 2]
    assert choose(index, torch.tensor([False, True, True])).tolist() == [1, 1, 2]


def test_forbidden_arms_are_never_chosen() -> None:
    inf, nan = float("inf"), float("nan")
    index = torch.tensor([[-inf, -inf, -inf], [inf, 1.0, 0.0], [nan, 0.0, 1.0]])
    assert choose(index, torch.tensor([False, True, True])).tolist() == [1, 1, 2]


def test_infinite_indices_are_no_reason_to_complain() -> None:
    inf = float("inf")
    assert choose(torch.tensor([[0.0, inf, inf], [-inf, -inf, -inf]])).tolist() == [1, 0]


def test_no_rows_no_choices() -> None:
    index = ucb_index(trained(), torch.zeros(0, 4), 1.0, 0.5)
    assert index.shape == (0, 3)
    assert choose(index).shape == (0,)


def test_choice_of_a_row_does_not_depend_on_its_mates() -> None:
    posterior = trained()
    together = ucb_index(posterior, QUERY, 0.8, 0.3)
    for b in range(len(QUERY)):
        alone = ucb_index(posterior, QUERY[b : b + 1], 0.8, 0.3)
        torch.testing.assert_close(alone[0], together[b], rtol=1e-12, atol=1e-12)


def test_wrong_index_arguments() -> None:
    with pytest.raises(ValueError, match=r"posterior must have 2 targets \(0 quality, 1 cost\), got 1"):
        ucb_index(LinearPosterior(3, 4), QUERY, 1.0, 0.0)
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"alpha must be finite and >= 0, got {alpha}"):
            ucb_index(trained(), QUERY, alpha, 0.0)
    with pytest.raises(ValueError, match=r"price must have one element or shape \[B\] = \[6\], got \[3\]"):
        ucb_index(trained(), QUERY, 1.0, torch.zeros(3))


def test_wrong_choices() -> None:
    with pytest.raises(ValueError, match=r"index must be \[B, M\] with M >= 1, got \[3\]"):
        choose(torch.zeros(3))
    with pytest.raises(ValueError, match=r"index must be \[B, M\] with M >= 1, got \[3, 0\]"):
        choose(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"allowed must be bool \[2, 3\], got torch.float32 \[2, 3\]"):
        choose(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"allowed must be bool \[2, 3\], got torch.bool \[2, 1\]"):
        choose(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="row 1: no arm is allowed"):
        choose(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="row 1: the index of an allowed arm is NaN"):
        choose(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]))
