"""Decisions and updates per second of our bandits, of `mabwiser`'s LinUCB and of `vowpalwabbit`, on one stream.

Decide for all rows of a batch, then learn from the rewards of the chosen arms. The rewards are linear in the context
plus noise, the same for all contenders; regret is the mean gap to the best arm over the stream. Contenders take turns,
seed by seed; rows per second are medians over seeds, after a warm-up. The libraries come with the `bench` extra.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..bandit import LinearPosterior, choose, sample_scores, ucb_index

ARMS, FEATURES, BATCH, BATCHES = 12, 32, 64, 60
NOISE = 0.1
ALPHA = 0.1
"""Optimism of both UCBs, in the scale of the noise."""

ONE_HOT = np.eye(ARMS)

Array = NDArray[Any]
Decide = Callable[[Array], Array]
Learn = Callable[[Array, Array, Array], None]


class _Stream:
    """Unit contexts `[batches, BATCH, FEATURES]` and the rewards of every arm `[batches, BATCH, ARMS]`, around 0."""

    def __init__(self, batches: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        context = random.normal(size=(batches, BATCH, FEATURES))
        self.context = context / np.linalg.norm(context, axis=-1, keepdims=True)
        weights = random.normal(size=(ARMS, FEATURES))
        self.expected = 0.15 * self.context @ weights.T
        self.reward = self.expected + NOISE * random.normal(size=self.expected.shape)


def _ours_ucb(seed: int) -> tuple[Decide, Learn]:
    posterior = LinearPosterior(ARMS, FEATURES, 2)

    def decide(context: Array) -> Array:
        return choose(ucb_index(posterior, torch.from_numpy(context), ALPHA, 0.0)).numpy()

    return decide, _learning(posterior)


def _ours_thompson(seed: int) -> tuple[Decide, Learn]:
    posterior, generator = LinearPosterior(ARMS, FEATURES, 2), torch.Generator().manual_seed(seed)

    def decide(context: Array) -> Array:
        return sample_scores(posterior, torch.from_numpy(context), ALPHA, generator).argmax(-1).numpy()

    return decide, _learning(posterior)


def _learning(posterior: LinearPosterior) -> Learn:
    """Two targets, as the policies have them (quality and cost); the second is zero here."""

    def learn(context: Array, arm: Array, reward: Array) -> None:
        target = np.zeros((len(arm), ARMS, 2))
        target[:, :, 0] = reward[:, None]
        weight = ONE_HOT[arm]
        posterior.update(torch.from_numpy(context), torch.from_numpy(weight), torch.from_numpy(target))

    return learn


def _mabwiser(seed: int) -> tuple[Decide, Learn]:
    from mabwiser.mab import MAB, LearningPolicy

    bandit = MAB(list(range(ARMS)), LearningPolicy.LinUCB(alpha=ALPHA, l2_lambda=1.0), seed=seed)
    # It wants to be fitted before it predicts; a row of zeros says nothing.
    bandit.fit([0], [0.0], np.zeros((1, FEATURES)))

    def learn(context: Array, arm: Array, reward: Array) -> None:
        bandit.partial_fit(arm, reward, context)

    return lambda context: np.asarray(bandit.predict(context)), learn


def _vowpalwabbit(seed: int) -> tuple[Decide, Learn]:
    """Its contextual bandit over context x arm features, explored with squarecb; of a dozen settings the best here."""
    from vowpalwabbit import Workspace

    vw = Workspace(f"--cb_explore_adf -q sa --squarecb --gamma_scale 100 --cb_type mtr --quiet --random_seed {seed}")
    random = np.random.default_rng(seed)
    actions = [f"|a a{arm}" for arm in range(ARMS)]
    chances: list[float] = []

    def lines(row: Array) -> list[str]:
        return ["shared |s " + " ".join(f"f{i}:{value:.6f}" for i, value in enumerate(row)), *actions]

    def decide(context: Array) -> Array:
        chances.clear()
        arms = []
        for row in context:
            share = np.asarray(vw.predict(lines(row)))
            arms.append(int(random.choice(ARMS, p=share / share.sum())))
            chances.append(float(share[arms[-1]]))
        return np.asarray(arms)

    def learn(context: Array, arm: Array, reward: Array) -> None:
        for row, chosen, gain, chance in zip(context, arm, reward, chances, strict=True):
            example = lines(row)
            example[chosen + 1] = f"0:{-gain:.6f}:{chance:.6f} {example[chosen + 1]}"
            vw.learn(example)

    return decide, learn


CONTENDERS: dict[str, tuple[Callable[[int], tuple[Decide, Learn]], str | None]] = {
    "dht UCB": (_ours_ucb, None),
    "dht Thompson": (_ours_thompson, None),
    "mabwiser LinUCB": (_mabwiser, "mabwiser"),
    "vowpalwabbit": (_vowpalwabbit, "vowpalwabbit"),
}
"""By name: what makes the two halves of a bandit, and the module that it needs."""


def measure_bandits(seeds: int, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """`setting`, `random_regret`, `results` by contender, `times_as_fast` (ours over each library) and `left_out`.

    Args:
        seeds: streams of `BATCHES` batches each.
        say: called with a line of news.
    """
    there = {n: make for n, (make, needs) in CONTENDERS.items() if needs is None or importlib.util.find_spec(needs)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in there}
    chance = []
    for make in there.values():
        _play(make, _Stream(2, 0), 0)
    for seed in range(seeds):
        say(f"bandits: stream {seed + 1} of {seeds}")
        stream = _Stream(BATCHES, seed)
        chance.append(float(stream.expected.max(-1).mean() - stream.expected.mean()))
        for name, make in there.items():
            runs[name].append(_play(make, stream, seed))
    results = {name: _summary(found) for name, found in runs.items()}
    speed = results["dht UCB"]["rows_per_second"]
    return {
        "setting": {"arms": ARMS, "features": FEATURES, "batch": BATCH, "batches": BATCHES, "seeds": seeds},
        "random_regret": statistics.fmean(chance),
        "results": results,
        "times_as_fast": {n: speed / r["rows_per_second"] for n, r in results.items() if not n.startswith("dht")},
        "left_out": [name for name in CONTENDERS if name not in there],
    }


def _play(make: Callable[[int], tuple[Decide, Learn]], stream: _Stream, seed: int) -> dict[str, float]:
    """Rows per second of deciding and learning together, and mean regret over the stream and its last quarter."""
    decide, learn = make(seed)
    seconds, regret = 0.0, []
    row = np.arange(BATCH)
    for context, expected, reward in zip(stream.context, stream.expected, stream.reward, strict=True):
        started = time.perf_counter()
        arm = decide(context)
        learn(context, arm, reward[row, arm])
        seconds += time.perf_counter() - started
        regret.append(float((expected.max(-1) - expected[row, arm]).mean()))
    return {
        "rows_per_second": BATCH * len(regret) / seconds,
        "regret": statistics.fmean(regret),
        "last_regret": statistics.fmean(regret[-len(regret) // 4 :]),
    }


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    regrets = [run["regret"] for run in runs]
    return {
        "rows_per_second": statistics.median(run["rows_per_second"] for run in runs),
        "regret": statistics.fmean(regrets),
        "regret_sd": statistics.stdev(regrets) if len(regrets) > 1 else None,
        "last_regret": statistics.fmean(run["last_regret"] for run in runs),
        "runs": runs,
    }
