"""The maths of the posterior: by hand, by the textbook, by high precision, and by its own invariants."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.bandit import LinearPosterior

EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDING = {"rtol": 1e-11, "atol": 1e-11}


def random_rows(seed: int, rows: int, arms: int, features: int, targets: int) -> tuple[torch.Tensor, ...]:
    """Context, weights with about half of them 0, and targets that are NaN where the weight is 0."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    weight = torch.rand(rows, arms, generator=generator, dtype=torch.float64)
    weight = torch.where(torch.rand(rows, arms, generator=generator) < 0.5, weight, 0.0)
    target = torch.randn(rows, arms, targets, generator=generator, dtype=torch.float64)
    return context, weight, torch.where(weight.unsqueeze(-1) != 0, target, torch.nan)


def assert_same_statistics(a: LinearPosterior, b: LinearPosterior, **tolerance: float) -> None:
    for (name, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_sufficient_statistics_worked_by_hand() -> None:
    posterior = LinearPosterior(num_arms=2, num_features=2, ridge=2.0)
    context = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    posterior.update(context, torch.tensor([[1.0, 0.0], [0.5, 0.0]]), torch.tensor([[3.0, 9.0], [-1.0, 9.0]]))
    # 1 * (1,2)(1,2)^T + 0.5 * (0,1)(0,1)^T and 1 * 3 * (1,2) + 0.5 * -1 * (0,1); arm 1 has weight 0 throughout.
    assert posterior.gram.tolist() == [[[1.0, 2.0], [2.0, 4.5]], [[0.0, 0.0], [0.0, 0.0]]]
    assert posterior.moment.tolist() == [[[3.0], [5.5]], [[0.0], [0.0]]]
    assert posterior.pulls.tolist() == [1.5, 0.0]
    assert posterior.clock.item() == 2
    assert posterior.precision[0].tolist() == [[3.0, 2.0], [2.0, 6.5]]
    # The determinant is 3 * 6.5 - 2 * 2 = 15.5 and the inverse [[6.5, -2], [-2, 3]] / 15.5.
    torch.testing.assert_close(
        posterior.mean()[0].flatten(), torch.tensor([8.5, 10.5], dtype=torch.float64) / 15.5, **ROUNDING
    )
    phi = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(
        posterior.width(phi), torch.tensor([[6.5 / 15.5, 1 / 2.0]], dtype=torch.float64).sqrt(), **ROUNDING
    )


def test_forgetting_worked_by_hand() -> None:
    posterior = LinearPosterior(num_arms=2, num_features=1, ridge=1.0, forgetting=0.5)
    # Arm 0 is chosen in rows 0 and 2, arm 1 in row 1; the clock ticks for both in every row.
    context = torch.tensor([[2.0], [1.0], [4.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    posterior.update(context, weight, torch.tensor([[8.0, 0.0], [0.0, 6.0], [1.0, 0.0]]))
    assert posterior.gram.flatten().tolist() == [4.0 / 4 + 16.0, 1.0 / 2]
    assert posterior.moment.flatten().tolist() == [16.0 / 4 + 4.0, 6.0 / 2]
    assert posterior.pulls.tolist() == [1.25, 0.5]
    # One more row that chooses nobody: everything halves, except the prior.
    posterior.update(torch.ones(1, 1), torch.zeros(1, 2), torch.zeros(1, 2))
    assert posterior.gram.flatten().tolist() == [8.5, 0.25]
    assert posterior.precision.flatten().tolist() == [9.5, 1.25]
    assert posterior.clock.item() == 4


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_prior_is_neither_forgotten_nor_added_twice(forgetting: float) -> None:
    posterior = LinearPosterior(2, 3, ridge=torch.tensor([0.25, 7.0]), forgetting=forgetting)
    for _ in range(50):
        posterior.update(torch.ones(4, 3), torch.zeros(4, 2), torch.zeros(4, 2))
    expected = torch.eye(3, dtype=torch.float64) * torch.tensor([0.25, 7.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(posterior.precision, expected, **EXACT)


@pytest.mark.parametrize("ridge", [0.03, 1.0, 40.0])
def test_untouched_arm_has_the_width_of_the_prior(ridge: float) -> None:
    # mabwiser starts A^-1 at ridge * I, where it must be I / ridge.
    posterior = LinearPosterior(3, 4, ridge=ridge)
    context, weight, target = random_rows(0, 20, 3, 4, 1)
    weight[:, 1] = 0.0
    posterior.update(context, weight, target)
    torch.testing.assert_close(posterior.width(context)[:, 1], (context.square().sum(1) / ridge).sqrt(), **ROUNDING)
    assert (posterior.width(context)[:, 0] < posterior.width(context)[:, 1]).all()
    torch.testing.assert_close(posterior.predict(context)[:, 1], torch.zeros(20, 1, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("forgetting", [1.0, 0.97])
@pytest.mark.parametrize("targets", [1, 3])
def test_equals_the_textbook(textbook: type, forgetting: float, targets: int) -> None:
    ridge = torch.tensor([0.3, 2.0, 5.0])
    posterior = LinearPosterior(3, 5, targets, ridge=ridge, forgetting=forgetting)
    book = textbook(3, 5, targets, ridge.double().numpy(), forgetting)
    for seed, rows in enumerate((1, 7, 16)):
        context, weight, target = random_rows(seed, rows, 3, 5, targets)
        posterior.update(context, weight, target)
        book.update(context.numpy(), weight.numpy(), target.numpy())
    query = torch.randn(6, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    np.testing.assert_allclose(posterior.gram, book.gram, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(posterior.moment, book.moment, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(posterior.pulls, book.pulls, rtol=1e-12)
    np.testing.assert_allclose(posterior.mean(), book.mean(), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(posterior.width(query), book.width(query.numpy()), rtol=1e-9)
    expected = np.einsum("bf,mfo->bmo", query.numpy(), book.mean())
    np.testing.assert_allclose(posterior.predict(query), expected, rtol=1e-9, atol=1e-11)


@given(
    seed=st.integers(0, 2**31),
    forgetting=st.sampled_from([1.0, 0.999, 0.9, 0.5]),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    targets=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_any_split_into_batches_is_the_same(seed: int, forgetting: float, sizes: list[int], targets: int) -> None:
    whole, parts, rows = (LinearPosterior(3, 4, targets, ridge=0.7, forgetting=forgetting) for _ in range(3))
    context, weight, target = random_rows(seed, sum(sizes), 3, 4, targets)
    whole.update(context, weight, target)
    for piece in zip(context.split(sizes), weight.split(sizes), target.split(sizes), strict=True):
        parts.update(*piece)
    for piece in zip(context.split(1), weight.split(1), target.split(1), strict=True):
        if len(piece[0]):
            rows.update(*piece)
    assert_same_statistics(whole, parts, **ROUNDING)
    assert_same_statistics(whole, rows, **ROUNDING)
    torch.testing.assert_close(whole.mean(), rows.mean(), rtol=1e-8, atol=1e-9)


@given(seed=st.integers(0, 2**31), rows=st.integers(0, 12), ridge=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_width_only_shrinks_as_rows_arrive(seed: int, rows: int, ridge: float) -> None:
    posterior = LinearPosterior(2, 3, ridge=ridge)
    context, weight, target = random_rows(seed, rows + 5, 2, 3, 1)
    before = posterior.width(context)
    posterior.update(context[:rows], weight[:rows], target[:rows])
    after = posterior.width(context)
    assert (after <= before * (1 + 1e-10)).all()
    assert (after > 0).all()


def test_empty_batch_changes_nothing() -> None:
    posterior = LinearPosterior(2, 3, 2, forgetting=0.5)
    posterior.update(*random_rows(0, 4, 2, 3, 2))
    before = posterior.snapshot()
    posterior.update(torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(0, 2, 2))
    for name, value in posterior.snapshot().items():
        torch.testing.assert_close(value, before[name], **EXACT)
    assert posterior.predict(torch.zeros(0, 3)).shape == (0, 2, 2)
    assert posterior.width(torch.zeros(0, 3)).shape == (0, 2)


def test_low_precision_and_boolean_inputs_are_accumulated_in_float64() -> None:
    context, weight, target = random_rows(3, 9, 2, 4, 1)
    chosen = weight > 0
    low = LinearPosterior(2, 4)
    low.update(context.bfloat16(), chosen, target.bfloat16()[..., 0])
    high = LinearPosterior(2, 4)
    high.update(context.bfloat16().double(), chosen.double(), target.bfloat16().double())
    assert_same_statistics(low, high, **EXACT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = LinearPosterior(2, 4)
        cast.update(context.bfloat16(), chosen, target.bfloat16())
        predicted = cast.predict(context)
    assert_same_statistics(cast, high, **EXACT)
    torch.testing.assert_close(predicted, high.predict(context), **EXACT)


def test_results_carry_no_gradient() -> None:
    posterior = LinearPosterior(2, 3)
    context = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    posterior.update(context, torch.ones(4, 2), context[:, :2])
    generator = torch.Generator().manual_seed(0)
    results = (posterior.predict(context), posterior.width(context), posterior.mean(), posterior.sample(1.0, generator))
    assert not any(result.requires_grad for result in (*results, *posterior.buffers()))


@pytest.mark.parametrize("arms", [slice(1, 4, 2), torch.tensor([4, 0, 0])])
def test_selected_arms_are_rows_of_all_arms(arms: slice | torch.Tensor) -> None:
    posterior = LinearPosterior(5, 3, 2, ridge=0.5)
    context, weight, target = random_rows(1, 12, 5, 3, 2)
    posterior.update(context, weight, target)
    torch.testing.assert_close(posterior.mean(arms), posterior.mean()[arms], **EXACT)
    torch.testing.assert_close(posterior.factor(arms), posterior.factor()[arms], **EXACT)
    torch.testing.assert_close(posterior.predict(context, arms), posterior.predict(context)[:, arms], **ROUNDING)
    torch.testing.assert_close(posterior.width(context, arms), posterior.width(context)[:, arms], **ROUNDING)


def test_factor_is_the_lower_cholesky_factor_of_the_precision() -> None:
    posterior = LinearPosterior(3, 4, ridge=0.5)
    posterior.update(*random_rows(1, 12, 3, 4, 1))
    factor = posterior.factor()
    torch.testing.assert_close(factor, factor.tril(), **EXACT)
    torch.testing.assert_close(factor @ factor.mT, posterior.precision, **ROUNDING)
    torch.testing.assert_close(posterior.precision, posterior.precision.mT, **EXACT)


def test_sample_has_the_mean_and_covariance_of_the_posterior() -> None:
    posterior = LinearPosterior(2, 3, 2, ridge=0.4)
    context, weight, target = random_rows(5, 30, 2, 3, 2)
    posterior.update(context * torch.tensor([1.0, 3.0, 0.3]), weight, target)
    sigma, draws = 0.7, 40_000
    # The same arm many times is as many independent draws.
    arms = torch.ones(draws, dtype=torch.int64)
    theta = posterior.sample(sigma, torch.Generator().manual_seed(0), arms, target=1).numpy()
    covariance = sigma**2 * np.linalg.inv(posterior.precision[1].numpy())
    mean = np.linalg.solve(posterior.precision[1].numpy(), posterior.moment[1, :, 1].numpy())
    std = np.sqrt(np.diag(covariance))
    # Five standard errors: std / sqrt(n) for a mean, sqrt((c_ij^2 + c_ii c_jj) / n) for a Gaussian covariance.
    assert (np.abs(theta.mean(0) - mean) < 5 * std / np.sqrt(draws)).all()
    error = np.sqrt((covariance**2 + np.outer(std, std) ** 2) / draws)
    assert (np.abs(np.cov(theta.T) - covariance) < 5 * error).all()
    # The correlation is what a draw from the marginals would lose.
    off_diagonal = ~np.eye(3, dtype=bool)
    assert (np.abs(covariance) > 10 * error)[off_diagonal].any()


def test_sample_follows_its_generator_alone() -> None:
    posterior = LinearPosterior(2, 3)
    posterior.update(*random_rows(5, 10, 2, 3, 1))
    generator = torch.Generator().manual_seed(7)
    saved = generator.get_state()
    torch.manual_seed(0)
    first, second = posterior.sample(1.0, generator), posterior.sample(1.0, generator)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    generator.set_state(saved)
    torch.testing.assert_close(posterior.sample(1.0, generator), first, **EXACT)
    torch.testing.assert_close(posterior.sample(0.0, generator), posterior.mean()[..., 0], **EXACT)


def test_reading_changes_nothing() -> None:
    posterior = LinearPosterior(3, 4, 2, ridge=0.5, forgetting=0.9)
    context, weight, target = random_rows(1, 12, 3, 4, 2)
    posterior.update(context, weight, target)
    before = {name: buffer.clone() for name, buffer in posterior.named_buffers()}
    random_state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        posterior.predict(context).add_(1.0)
        posterior.width(context).add_(1.0)
        posterior.sample(1.0, generator).add_(1.0)
        posterior.delta_since(posterior.snapshot())
    for name, buffer in posterior.named_buffers():
        torch.testing.assert_close(buffer, before[name], **EXACT)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("forgetting", [0.9, 0.999, 1.0])
def test_ill_conditioned_features_stay_near_the_exact_answer(forgetting: float) -> None:
    rows, batch, ridge = 100_000, 2_000, 1e-3
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    constant = torch.ones(rows, 1, dtype=torch.float64)
    # A duplicate, a near duplicate, and a constant: without the prior A is singular.
    near = free[:, :1] + 1e-9 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    context = torch.cat([free, free[:, :1], near, constant], dim=1)
    target = free[:, :1] - 2 * free[:, 1:] + 0.5 + 0.1 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    posterior = LinearPosterior(1, 5, ridge=ridge, forgetting=forgetting)
    for phi, r in zip(context.split(batch), target.split(batch), strict=True):
        posterior.update(phi, torch.ones(len(phi), 1), r)
        assert (torch.linalg.eigvalsh(posterior.factor() @ posterior.factor().mT) > 0).all()

    x, y = context.numpy().astype(np.longdouble), target.numpy().astype(np.longdouble)
    decay = np.longdouble(forgetting) ** np.arange(rows - 1, -1, -1, dtype=np.longdouble)[:, None]
    gram = (x * decay).T @ x
    with mpmath.workdps(40):
        exact = mpmath.matrix([[mpmath.mpf(str(v)) for v in row] for row in gram]) + ridge * mpmath.eye(5)
        inverse = exact**-1
        theta = inverse * mpmath.matrix([mpmath.mpf(str(v)) for v in ((x * decay).T @ y)[:, 0]])
        # A usual row, and the direction that no row has shown, where only the prior decides.
        queries = torch.tensor([[0.5, -1.0, 0.5, 0.5, 1.0], [1.0, 0.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
        columns = [mpmath.matrix(query.tolist()) for query in queries]
        width = [float(mpmath.sqrt((c.T * inverse * c)[0])) for c in columns]
        predicted = [float((c.T * theta)[0]) for c in columns]
    # The condition number is below 5 * rows / ridge = 5e8, so float64 keeps 7 digits.
    np.testing.assert_allclose(posterior.width(queries)[:, 0], width, rtol=1e-6)
    np.testing.assert_allclose(posterior.predict(queries)[:, 0, 0], predicted, rtol=1e-6, atol=1e-6)


def test_jitter_repairs_the_arm_that_needs_it_and_no_other() -> None:
    posterior = LinearPosterior(2, 2, ridge=1e-12)
    # 1e10 + 1e-12 rounds to 1e10, so that arm 0 is singular in float64.
    context = torch.tensor([[1e5, 1e5], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    posterior.update(context, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.ones(3, 2))
    assert torch.linalg.cholesky_ex(posterior.precision).info.tolist() == [2, 0]
    factor = posterior.factor()
    assert (factor.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(factor @ factor.mT, posterior.precision, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(factor[1], torch.linalg.cholesky(posterior.precision[1]), **EXACT)
    torch.testing.assert_close(posterior.predict(context[:1])[0, 0], torch.ones(1, dtype=torch.float64), **ROUNDING)
    assert posterior.width(context).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -5.0])
def test_corrupt_state_is_named(value: float) -> None:
    posterior = LinearPosterior(3, 2)
    posterior.gram[1].fill_diagonal_(value)
    with pytest.raises(ValueError, match=r"arm 1: the precision matrix is not finite or not positive definite"):
        posterior.width(torch.ones(1, 2))


BAD_ROWS = [
    ("context", float("nan"), r"row 3: context has a non-finite value"),
    ("context", float("-inf"), r"row 3: context has a non-finite value"),
    ("context", 1e200, r"row 3: context has .* one whose square overflows float64"),
    ("weight", float("nan"), r"row 3: weight has a negative or non-finite value; allowed: finite and >= 0"),
    ("weight", float("inf"), r"row 3: weight has a negative or non-finite value"),
    ("weight", -0.5, r"row 3: weight has a negative or non-finite value"),
    ("target", float("nan"), r"row 3: target has a non-finite value for an arm whose weight is not 0"),
    ("target", float("inf"), r"row 3: target has a non-finite value for an arm whose weight is not 0"),
]


@pytest.mark.parametrize(("which", "value", "text"), BAD_ROWS)
def test_bad_row_is_named_and_leaves_the_state_alone(which: str, value: float, text: str) -> None:
    posterior = LinearPosterior(2, 3, 2, forgetting=0.9)
    posterior.update(*random_rows(0, 4, 2, 3, 2))
    before = posterior.snapshot()
    rows = dict(zip(("context", "weight", "target"), random_rows(1, 6, 2, 3, 2), strict=True))
    rows["weight"][3, 1], rows["target"][3, 1] = 1.0, 1.0
    rows[which][3, 1] = value
    with pytest.raises(ValueError, match=text):
        posterior.update(**rows)
    for name, buffer in posterior.snapshot().items():
        torch.testing.assert_close(buffer, before[name], **EXACT)


def test_first_bad_row_is_the_one_named() -> None:
    context, weight, target = torch.ones(5, 1), torch.ones(5, 1), torch.ones(5, 1)
    context[4], weight[2], target[3] = torch.nan, -1.0, torch.nan
    with pytest.raises(ValueError, match=r"^row 2: weight"):
        LinearPosterior(1, 1).update(context, weight, target)


@pytest.mark.parametrize(
    ("context", "weight", "target", "text"),
    [
        ((4, 2), (4, 2), (4, 2, 2), r"context must be \[B, F\] with F = 3, got \[4, 2\]"),
        ((3,), (4, 2), (4, 2, 2), r"context must be \[B, F\] with F = 3, got \[3\]"),
        ((4, 3), (4, 1), (4, 2, 2), r"weight must be \[B, M\] = \[4, 2\], got \[4, 1\]"),
        ((4, 3), (4, 2), (4, 2), r"target must be \[B, M, O\] = \[4, 2, 2\], got \[4, 2\]"),
        ((0, 3), (1, 2), (0, 2, 2), r"weight must be \[B, M\] = \[0, 2\], got \[1, 2\]"),
    ],
)
def test_wrong_shapes(context: tuple[int], weight: tuple[int], target: tuple[int], text: str) -> None:
    posterior = LinearPosterior(2, 3, 2)
    with pytest.raises(ValueError, match=text):
        posterior.update(torch.zeros(context), torch.zeros(weight), torch.zeros(target))


@pytest.mark.parametrize("read", [LinearPosterior.predict, LinearPosterior.width])
def test_wrong_context_when_reading(read) -> None:
    with pytest.raises(ValueError, match=r"context must be \[B, F\] with F = 3, got \[5, 4\]"):
        read(LinearPosterior(2, 3), torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_arms": 0}, "num_arms must be at least 1, got 0"),
        ({"num_features": -1}, "num_features must be at least 1, got -1"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"ridge": 0.0}, r"ridge must be finite and > 0, got 0\.0"),
        ({"ridge": float("nan")}, "ridge must be finite and > 0, got nan"),
        ({"ridge": torch.tensor([1.0, -2.0])}, r"ridge must be finite and > 0, got -2\.0"),
        ({"ridge": torch.ones(3)}, r"ridge must have shape \[\] or \[M\] = \[2\], got \[3\]"),
        ({"forgetting": 0.0}, r"forgetting must be in \(0, 1\], got 0\.0"),
        ({"forgetting": 1.01}, r"forgetting must be in \(0, 1\], got 1\.01"),
        ({"forgetting": float("nan")}, r"forgetting must be in \(0, 1\], got nan"),
    ],
)
def test_wrong_construction(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LinearPosterior(**{"num_arms": 2, "num_features": 3, **arguments})


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_wrong_sigma(sigma: float) -> None:
    with pytest.raises(ValueError, match=rf"sigma must be finite and >= 0, got {sigma}"):
        LinearPosterior(2, 3).sample(sigma, torch.Generator())


def test_wrong_target_of_a_sample() -> None:
    with pytest.raises(ValueError, match=r"target must be in \[0, 2\), got 2"):
        LinearPosterior(2, 3, 2).sample(1.0, torch.Generator(), target=2)


def test_repr_names_the_sizes() -> None:
    assert "num_arms=2, num_features=3, num_targets=1, forgetting=0.5" in repr(LinearPosterior(2, 3, forgetting=0.5))


@pytest.mark.parametrize("forgetting", [1.0, 0.999])
def test_a_long_stream_does_not_drift(forgetting: float) -> None:
    # What is read after 2,000 updates, each read in between, is what the rows say when they are taken at once.
    context, weight, target = random_rows(11, 6_000, 3, 7, 2)
    stream = LinearPosterior(3, 7, 2, ridge=0.4, forgetting=forgetting)
    for piece in zip(context.split(3), weight.split(3), target.split(3), strict=True):
        stream.update(*piece)
        stream.width(piece[0])
        stream.predict(piece[0])
    aged = weight * forgetting ** torch.arange(5_999, -1, -1, dtype=torch.float64)[:, None]
    rewards = torch.where(weight.unsqueeze(-1) != 0, target, 0.0)
    precision = 0.4 * np.eye(7) + np.einsum("bm,bf,bg->mfg", aged, context, context)
    mean = np.linalg.solve(precision, np.einsum("bm,bf,bmo->mfo", aged, context, rewards))
    query = context[:5].numpy()
    width = np.sqrt(np.einsum("bf,mfg,bg->bm", query, np.linalg.inv(precision), query))
    np.testing.assert_allclose(stream.mean(), mean, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(stream.width(context[:5]), width, rtol=1e-10)
    np.testing.assert_allclose(
        stream.predict(context[:5]), np.einsum("bf,mfo->bmo", query, mean), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
@pytest.mark.parametrize(
    ("arms", "features", "targets", "rows"), [(1, 1, 1, 1), (1, 5, 2, 3), (7, 1, 3, 2), (5, 13, 2, 31)]
)
def test_odd_sizes_equal_the_textbook(
    textbook: type, forgetting: float, arms: int, features: int, targets: int, rows: int
) -> None:
    posterior = LinearPosterior(arms, features, targets, ridge=0.7, forgetting=forgetting)
    book = textbook(arms, features, targets, np.full(arms, 0.7), forgetting)
    for seed in range(3):
        batch = random_rows(seed, rows, arms, features, targets)
        posterior.update(*(values[:0] for values in batch))
        posterior.update(*batch)
        book.update(*(values.numpy() for values in batch))
    np.testing.assert_allclose(posterior.gram, book.gram, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(posterior.moment, book.moment, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(posterior.pulls, book.pulls, rtol=1e-12)
    np.testing.assert_allclose(posterior.mean(), book.mean(), rtol=1e-9, atol=1e-11)
    query = random_rows(9, 4, arms, features, targets)[0]
    np.testing.assert_allclose(posterior.width(query), book.width(query.numpy()), rtol=1e-9)
    one = slice(arms - 1, arms)
    np.testing.assert_allclose(posterior.width(query, one), book.width(query.numpy())[:, one], rtol=1e-9)


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_targets_that_nobody_reads_leave_no_trace(forgetting: float) -> None:
    context, weight, target = random_rows(4, 9, 3, 4, 2)
    unread, read = (LinearPosterior(3, 4, 2, forgetting=forgetting) for _ in range(2))
    assert target.isnan().any()
    unread.update(context, weight, target)
    read.update(context, weight, target.nan_to_num(nan=5.0))
    assert_same_statistics(unread, read, **EXACT)


def test_a_context_whose_square_overflows_is_refused_even_where_no_arm_was_chosen() -> None:
    posterior = LinearPosterior(2, 1)
    with pytest.raises(ValueError, match="row 1: context has .* one whose square overflows float64"):
        posterior.update(torch.tensor([[1.0], [1e200]], dtype=torch.float64), torch.zeros(2, 2), torch.zeros(2, 2))
    assert posterior.clock.item() == 0


def test_rows_are_not_bad_because_their_sum_overflows() -> None:
    # Each square is finite, their sum over the rows is not, the statistics are: small weights see to it.
    posterior = LinearPosterior(1, 1)
    context = torch.full((4, 1), 1e154, dtype=torch.float64)
    posterior.update(context, torch.full((4, 1), 1e-10), torch.zeros(4, 1))
    np.testing.assert_allclose(posterior.gram.item(), 4e298, rtol=1e-6)
