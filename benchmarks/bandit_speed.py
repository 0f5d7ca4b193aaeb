"""Decisions and updates per second of our bandits, of `mabwiser`'s LinUCB and of `vowpalwabbit`, on one stream.

    python benchmarks/bandit_speed.py --json benchmarks/results/bandit_speed.json

12 arms, 32 features, batches of 64 rows: decide for all rows of a batch, then learn from the rewards of the chosen
arms. The rewards are linear in the context plus noise, the same for all contenders; regret is the mean gap to the best
arm over the stream. Contenders take turns, seed by seed; seconds are medians over seeds, after a warm-up. Needs the
`bench` extra; a library that is not there is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dht._files import write_json
from dht.bandit import LinearPosterior, choose, sample_scores, ucb_index
from dht.bench.header import commit

ARMS, FEATURES, BATCH = 12, 32, 64
NOISE = 0.1
ALPHA = 0.1
"""Optimism of both UCBs, in the scale of the noise."""

ONE_HOT = np.eye(ARMS)

Decide = Callable[[np.ndarray], np.ndarray]
Learn = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


class Stream:
    """Unit contexts `[batches, BATCH, FEATURES]` and the rewards of every arm `[batches, BATCH, ARMS]`, around 0."""

    def __init__(self, batches: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        context = random.normal(size=(batches, BATCH, FEATURES))
        self.context = context / np.linalg.norm(context, axis=-1, keepdims=True)
        weights = random.normal(size=(ARMS, FEATURES))
        self.expected = 0.15 * self.context @ weights.T
        self.reward = self.expected + NOISE * random.normal(size=self.expected.shape)


def ours_ucb(seed: int) -> tuple[Decide, Learn]:
    posterior = LinearPosterior(ARMS, FEATURES, 2)

    def decide(context: np.ndarray) -> np.ndarray:
        return choose(ucb_index(posterior, torch.from_numpy(context), ALPHA, 0.0)).numpy()

    return decide, _learning(posterior)


def ours_thompson(seed: int) -> tuple[Decide, Learn]:
    posterior, generator = LinearPosterior(ARMS, FEATURES, 2), torch.Generator().manual_seed(seed)

    def decide(context: np.ndarray) -> np.ndarray:
        return sample_scores(posterior, torch.from_numpy(context), ALPHA, generator).argmax(-1).numpy()

    return decide, _learning(posterior)


def _learning(posterior: LinearPosterior) -> Learn:
    """Two targets, as the policies have them (quality and cost); the second is zero here."""

    def learn(context: np.ndarray, arm: np.ndarray, reward: np.ndarray) -> None:
        target = np.zeros((len(arm), ARMS, 2))
        target[:, :, 0] = reward[:, None]
        weight = ONE_HOT[arm]
        posterior.update(torch.from_numpy(context), torch.from_numpy(weight), torch.from_numpy(target))

    return learn


def mabwiser(seed: int) -> tuple[Decide, Learn]:
    from mabwiser.mab import MAB, LearningPolicy

    bandit = MAB(list(range(ARMS)), LearningPolicy.LinUCB(alpha=ALPHA, l2_lambda=1.0), seed=seed)
    # It wants to be fitted before it predicts; a row of zeros says nothing.
    bandit.fit([0], [0.0], np.zeros((1, FEATURES)))

    def learn(context: np.ndarray, arm: np.ndarray, reward: np.ndarray) -> None:
        bandit.partial_fit(arm, reward, context)

    return lambda context: np.asarray(bandit.predict(context)), learn


def vowpalwabbit(seed: int) -> tuple[Decide, Learn]:
    """Its contextual bandit over context x arm features, explored with squarecb; of a dozen settings the best here."""
    from vowpalwabbit import Workspace

    vw = Workspace(f"--cb_explore_adf -q sa --squarecb --gamma_scale 100 --cb_type mtr --quiet --random_seed {seed}")
    random = np.random.default_rng(seed)
    actions = [f"|a a{arm}" for arm in range(ARMS)]
    chances: list[float] = []

    def lines(row: np.ndarray) -> list[str]:
        return ["shared |s " + " ".join(f"f{i}:{value:.6f}" for i, value in enumerate(row)), *actions]

    def decide(context: np.ndarray) -> np.ndarray:
        chances.clear()
        arms = []
        for row in context:
            share = np.asarray(vw.predict(lines(row)))
            arms.append(int(random.choice(ARMS, p=share / share.sum())))
            chances.append(float(share[arms[-1]]))
        return np.asarray(arms)

    def learn(context: np.ndarray, arm: np.ndarray, reward: np.ndarray) -> None:
        for row, chosen, gain, chance in zip(context, arm, reward, chances, strict=True):
            example = lines(row)
            example[chosen + 1] = f"0:{-gain:.6f}:{chance:.6f} {example[chosen + 1]}"
            vw.learn(example)

    return decide, learn


CONTENDERS = {
    "dht UCB": (ours_ucb, None),
    "dht Thompson": (ours_thompson, None),
    "mabwiser LinUCB": (mabwiser, "mabwiser"),
    "vowpalwabbit": (vowpalwabbit, "vowpalwabbit"),
}


def play(make: Callable[[int], tuple[Decide, Learn]], stream: Stream, seed: int) -> dict[str, float]:
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


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    regrets = [run["regret"] for run in runs]
    return {
        "rows_per_second": statistics.median(run["rows_per_second"] for run in runs),
        "regret": statistics.fmean(regrets),
        "regret_sd": statistics.stdev(regrets) if len(regrets) > 1 else math.nan,
        "last_regret": statistics.fmean(run["last_regret"] for run in runs),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60, help=f"of {BATCH} rows")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="the result")
    asked = parser.parse_args()
    there = {n: m for n, (m, needs) in CONTENDERS.items() if needs is None or importlib.util.find_spec(needs)}
    left_out = [name for name in CONTENDERS if name not in there]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in there}
    for make in there.values():
        play(make, Stream(2, 0), 0)
    for seed in range(asked.seeds):
        stream = Stream(asked.batches, seed)
        for name, make in there.items():
            runs[name].append(play(make, stream, seed))
    chance = [float((s := Stream(asked.batches, i)).expected.max(-1).mean() - s.expected.mean()) for i in range(3)]
    results = {name: summary(found) for name, found in runs.items()}
    speed = results["dht UCB"]["rows_per_second"]
    result = {
        "setting": {
            "arms": ARMS, "features": FEATURES, "batch": BATCH, "batches": asked.batches, "seeds": asked.seeds,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
        },
        "random_regret": statistics.fmean(chance),
        "results": results,
        "times_as_fast": {n: speed / r["rows_per_second"] for n, r in results.items() if not n.startswith("dht")},
        "left_out": left_out,
    }  # fmt: skip
    if asked.json:
        write_json(asked.json, result)
    for name, found in results.items():
        print(
            f"{name:16} {found['rows_per_second']:>12,.0f} rows/s   regret {found['regret']:.4f} ±"
            f" {found['regret_sd']:.4f}, last quarter {found['last_regret']:.4f}",
            file=sys.stderr,
        )
    if left_out:
        print(f"left out, not installed: {', '.join(left_out)}", file=sys.stderr)
    print(
        json.dumps({"times_as_fast": result["times_as_fast"], "regret": {n: r["regret"] for n, r in results.items()}})
    )


if __name__ == "__main__":
    main()
