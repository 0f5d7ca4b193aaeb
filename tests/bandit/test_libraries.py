"""Agreement with two bandit libraries that share no code with ours, at a ridge that is not 1."""

import numpy as np
import pytest
import torch
from bayesianbandits import NormalRegressor, StabilizedForgetting
from mabwiser.mab import MAB, LearningPolicy

from dht.bandit import LinearPosterior, mean_scores, sample_scores, ucb_index

RIDGE, ARMS, FEATURES = 2.5, 3, 4


def history(rows: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts, the arm chosen in each row (every arm is), and its reward."""
    random = np.random.default_rng(0)
    context = random.normal(size=(rows, FEATURES))
    arm = np.arange(rows) % ARMS
    return context, arm, context @ np.array([1.0, -2.0, 0.5, 0.0]) + arm + random.normal(size=rows)


QUERY = np.random.default_rng(1).normal(size=(5, FEATURES))


def ours(forgetting: float = 1.0) -> LinearPosterior:
    context, arm, reward = history()
    posterior = LinearPosterior(ARMS, FEATURES, 2, ridge=RIDGE, forgetting=forgetting)
    target = torch.zeros(len(arm), ARMS, 2, dtype=torch.float64)
    target[:, :, 0] = torch.from_numpy(reward)[:, None]
    posterior.update(torch.from_numpy(context), torch.nn.functional.one_hot(torch.from_numpy(arm), ARMS), target)
    return posterior


def mabwiser(policy) -> MAB:
    context, arm, reward = history()
    mab = MAB(arms=list(range(ARMS)), learning_policy=policy, seed=3)
    mab.fit(decisions=arm[:40], rewards=reward[:40], contexts=context[:40])
    mab.partial_fit(decisions=arm[40:], rewards=reward[40:], contexts=context[40:])
    return mab


def test_ucb_index_equals_mabwiser() -> None:
    # Only touched arms: mabwiser starts an untouched arm's inverse at ridge * I.
    expectations = mabwiser(LearningPolicy.LinUCB(alpha=1.4, l2_lambda=RIDGE)).predict_expectations(QUERY)
    theirs = np.array([[row[a] for a in range(ARMS)] for row in expectations])
    np.testing.assert_allclose(ucb_index(ours(), torch.from_numpy(QUERY), 1.4, 0.0), theirs, rtol=1e-10)


def test_thompson_scores_have_the_distribution_of_mabwiser() -> None:
    draws, sigma, query = 5_000, 0.7, QUERY[:1]
    mab = mabwiser(LearningPolicy.LinTS(alpha=sigma, l2_lambda=RIDGE))
    expectations = mab.predict_expectations(np.repeat(query, draws, axis=0))
    theirs = np.array([[row[a] for a in range(ARMS)] for row in expectations])
    posterior, context = ours(), torch.from_numpy(query)
    generator = torch.Generator().manual_seed(0)
    arms = torch.arange(ARMS).repeat(draws)
    scores = sample_scores(posterior, context, sigma, generator, arms).view(draws, ARMS).numpy()
    # Five standard errors of the difference of two means, and of two standard deviations.
    error = theirs.std(0) * np.sqrt(2 / draws)
    assert (np.abs(theirs.mean(0) - scores.mean(0)) < 5 * error).all()
    assert (np.abs(theirs.std(0) - scores.std(0)) < 5 * error / np.sqrt(2)).all()
    # And both are the formula's.
    assert (np.abs(theirs.mean(0) - mean_scores(posterior, context)[0].numpy()) < 5 * error).all()
    assert (np.abs(theirs.std(0) - sigma * posterior.width(context)[0].numpy()) < 5 * error).all()


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_posterior_equals_bayesianbandits(forgetting: float) -> None:
    context, arm, reward = history()
    posterior = ours(forgetting)
    for a in range(ARMS):
        model = NormalRegressor(alpha=RIDGE, beta=1.0)
        # That library ages a prior which has met no row yet; a row of zeros adds nothing and ends that.
        model.fit(np.zeros((1, FEATURES)), np.zeros(1))
        model.set_params(forgetting=StabilizedForgetting(forgetting) if forgetting < 1 else None)
        # One row a call, and 0 for the rows of other arms: the clock is global.
        for phi, chosen, r in zip(context, arm == a, reward, strict=True):
            model.partial_fit(phi[None], np.array([r]), sample_weight=np.array([float(chosen)]))
        np.testing.assert_allclose(posterior.mean()[a, :, 0], model.coef_, rtol=1e-9, atol=1e-11)
        # It keeps the upper triangle only.
        upper = np.triu(model.cov_inv_)
        np.testing.assert_allclose(np.triu(posterior.precision[a]), upper, rtol=1e-10, atol=1e-12)
        covariance = np.linalg.inv(upper + np.triu(upper, 1).T)
        width = np.sqrt(np.einsum("bf,fg,bg->b", QUERY, covariance, QUERY))
        np.testing.assert_allclose(posterior.width(torch.from_numpy(QUERY))[:, a], width, rtol=1e-10)
