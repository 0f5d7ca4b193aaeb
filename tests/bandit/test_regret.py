"""Does it learn: cumulative regret against epsilon-greedy and uniform play, and under drift.

The margins were fixed before the first run: at most 0.8 of epsilon-greedy's regret and 0.3 of uniform's, as means over
ten seeds. All learners share the posterior; only the choice differs.
"""

from collections.abc import Callable

import pytest
import torch

from dht.bandit import LinearPosterior, choose, mean_scores, sample_scores, top_k, ucb_index

SEEDS, FEATURES, BATCH, NOISE = range(10), 5, 20, 0.3
VERSUS_GREEDY, VERSUS_UNIFORM, FORGETTING_HELPS = 0.8, 0.3, 0.8

Chooser = Callable[[LinearPosterior, torch.Tensor, torch.Generator], torch.Tensor]


def play(
    seed: int, arms: int, steps: int, choice: Chooser, forgetting: float = 1.0, switch: int | None = None
) -> float:
    """Summed gap between the best arms and the chosen ones, for a Chooser that returns a mask bool [B, M].

    Rewards are theta_a^T phi plus noise; after `switch` steps the arms' theta are drawn anew.
    """
    world = torch.Generator().manual_seed(seed)
    mind = torch.Generator().manual_seed(seed + 1000)
    theta = torch.randn(arms, FEATURES, generator=world, dtype=torch.float64)
    posterior = LinearPosterior(arms, FEATURES, 2, forgetting=forgetting)
    regret = 0.0
    for step in range(steps):
        if step == switch:
            theta = torch.randn(arms, FEATURES, generator=world, dtype=torch.float64)
        context = torch.randn(BATCH, FEATURES, generator=world, dtype=torch.float64)
        expected = context @ theta.T
        noise = NOISE * torch.randn(BATCH, arms, generator=world, dtype=torch.float64)
        chosen = choice(posterior, context, mind)
        best = top_k(expected, chosen.sum(dim=1))
        regret += float((expected * (best.double() - chosen.double())).sum())
        feedback = torch.where(chosen, expected + noise, torch.nan)
        posterior.update(context, chosen, torch.stack([feedback, torch.zeros_like(feedback)], dim=-1))
    return regret


def mean_regret(arms: int, steps: int, choice: Chooser, **world: float) -> float:
    return sum(play(seed, arms, steps, choice, **world) for seed in SEEDS) / len(SEEDS)


def ucb(posterior: LinearPosterior, context: torch.Tensor, mind: torch.Generator) -> torch.Tensor:
    arm = choose(ucb_index(posterior, context, alpha=1.0, price=0.0))
    return torch.nn.functional.one_hot(arm, posterior.num_arms).bool()


def thompson(k: int) -> Chooser:
    def choice(posterior: LinearPosterior, context: torch.Tensor, mind: torch.Generator) -> torch.Tensor:
        return top_k(sample_scores(posterior, context, NOISE, mind), torch.full((BATCH,), k))

    return choice


def uniform(k: int) -> Chooser:
    def choice(posterior: LinearPosterior, context: torch.Tensor, mind: torch.Generator) -> torch.Tensor:
        return top_k(torch.rand(BATCH, posterior.num_arms, generator=mind), torch.full((BATCH,), k))

    return choice


def epsilon_greedy(k: int, epsilon: float = 0.1) -> Chooser:
    def choice(posterior: LinearPosterior, context: torch.Tensor, mind: torch.Generator) -> torch.Tensor:
        greedy = top_k(mean_scores(posterior, context), torch.full((BATCH,), k))
        explore = torch.rand(BATCH, 1, generator=mind) < epsilon
        return torch.where(explore, uniform(k)(posterior, context, mind), greedy)

    return choice


@pytest.mark.parametrize(("learner", "arms", "k"), [(ucb, 6, 1), (thompson(1), 6, 1), (thompson(3), 8, 3)])
def test_regret_is_below_epsilon_greedy_and_uniform(learner: Chooser, arms: int, k: int) -> None:
    steps = 100
    regret = mean_regret(arms, steps, learner)
    assert regret <= VERSUS_GREEDY * mean_regret(arms, steps, epsilon_greedy(k))
    assert regret <= VERSUS_UNIFORM * mean_regret(arms, steps, uniform(k))


@pytest.mark.parametrize(("learner", "arms"), [(ucb, 6), (thompson(3), 8)])
def test_forgetting_wins_when_the_world_changes(learner: Chooser, arms: int) -> None:
    # 0.998 a row remembers about 500 rows, a quarter of the run.
    remembers = mean_regret(arms, 100, learner, switch=50)
    forgets = mean_regret(arms, 100, learner, switch=50, forgetting=0.998)
    assert forgets <= FORGETTING_HELPS * remembers
