"""How cost grows: seconds against one size at a time, for the executor and for the bandit alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ..bandit.posterior import LinearPosterior
from ..bandit.ucb import choose, ucb_index
from ..hf.configuration import DHTConfig
from ..hf.modeling import DHTForSequenceClassification
from ..load import device_of
from ..policy.base import Policy
from ..policy.baselines import DensePolicy
from .contend import planned
from .header import header
from .settings import BenchSettings

FRACTION = 0.26
BANDIT_ROWS = 32
"""Rows decided for, and learned from, at once."""


@dataclass(frozen=True)
class Encoder:
    """Sizes at which the executor is timed; the FFN is four times the width."""

    layers: int = 6
    heads: int = 12
    width: int = 384
    batch: int = 8
    tokens: int = 64


@dataclass(frozen=True)
class Bandit:
    """Sizes at which the bandit is timed; `seen` = rows that it has learned from."""

    arms: int = 12
    features: int = 32
    seen: int = 1_000


EXECUTOR_SWEEPS: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "heads": (4, 6, 12, 24),
    "width": (96, 192, 384, 768),
    "batch": (1, 4, 16, 64),
    "tokens": (16, 64, 256),
}
BANDIT_SWEEPS: dict[str, tuple[int, ...]] = {
    "arms": (2, 8, 32, 128),
    "features": (8, 16, 32, 64, 128),
    "seen": (0, 1_000, 10_000, 100_000),
}


def measure_growth(settings: BenchSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """`header` and `points`: part, size (its name), value, and milliseconds of each series.

    The executor's series are `dense` and `plan` (depth and heads at a quarter of the FLOPs), a forward of a batch. The
    bandit's are `decide` (UCB index of all arms and the best of them, factors kept) and `learn` (one update of the
    statistics and one new factorisation), each for `BANDIT_ROWS` rows, with the bytes of its state.

    Args:
        settings: device, repeats and seed count; the sizes are fixed.
    """
    device = device_of(settings.device)
    points: list[dict[str, Any]] = []
    for size, values in EXECUTOR_SWEEPS.items():
        say(f"executor against {size}")
        points += [
            {"part": "executor", "size": size, "value": value}
            | _executor_ms(replace(Encoder(), **{size: value}), settings, device)
            for value in values
        ]
    for size, values in BANDIT_SWEEPS.items():
        say(f"bandit against {size}")
        points += [
            {"part": "bandit", "size": size, "value": value} | _bandit_ms(replace(Bandit(), **{size: value}), settings)
            for value in values
        ]
    return {"header": header(settings, device), "points": points}


def _executor_ms(sizes: Encoder, settings: BenchSettings, device: torch.device) -> dict[str, float]:
    torch.manual_seed(settings.seed)
    config = DHTConfig(
        vocab_size=1_000, hidden_size=sizes.width, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
    )  # fmt: skip
    model = DHTForSequenceClassification(config).eval()
    cast(nn.Module, model).to(device)
    batch = {
        "input_ids": torch.randint(5, 1_000, (sizes.batch, sizes.tokens), device=device),
        "attention_mask": torch.ones(sizes.batch, sizes.tokens, dtype=torch.long, device=device),
    }
    policies: dict[str, Policy] = {
        "dense": DensePolicy(sizes.heads).to(device),
        "plan": planned("both", FRACTION, model, [batch], 1, settings.seed)(0, 0),
    }

    def forward(policy: Policy) -> Callable[[], Any]:
        return lambda: model(**batch, policy=policy)

    with torch.inference_mode():
        return _median_ms({name: forward(policy) for name, policy in policies.items()}, settings.repeats, device)


def _bandit_ms(sizes: Bandit, settings: BenchSettings) -> dict[str, float]:
    generator = torch.Generator().manual_seed(settings.seed)
    posterior = LinearPosterior(sizes.arms, sizes.features, 2)

    def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        context = torch.randn(rows, sizes.features, generator=generator, dtype=torch.float64)
        weight = torch.nn.functional.one_hot(torch.randint(sizes.arms, (rows,), generator=generator), sizes.arms)
        return context, weight.double(), torch.rand(rows, sizes.arms, 2, generator=generator, dtype=torch.float64)

    for start in range(0, sizes.seen, 1_000):
        posterior.update(*draw(min(1_000, sizes.seen - start)))
    rows = draw(BANDIT_ROWS)
    context = rows[0]

    def update() -> None:
        posterior.update(*rows)
        posterior.mean()

    def decide() -> None:
        choose(ucb_index(posterior, context, 0.1, 0.02))

    # Learning moves the sum of rows on by a few hundred: nothing beside the sizes of the sweep.
    taken = _median_ms({"learn": update, "decide": decide}, 4 * settings.repeats, torch.device("cpu"))
    return taken | {"state_bytes": float(sum(b.numel() * b.element_size() for b in posterior.buffers()))}


def _median_ms(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call; they take turns, after one warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            taken[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(seconds[1:]) for name, seconds in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
