"""The clock: contenders take turns on the same batches, and each one's seconds, FLOPs and memory become a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..measure import autocast
from ..plan import Trace
from .memory import peak_bytes

DENSE = ("transformers", "dense")
"""The contenders that rows are measured against: the faster of them is the denominator."""


@dataclass
class Call:
    """What one call did: the trace (None for `transformers`) and the seconds that the policy took of it."""

    trace: Trace | None = None
    policy_seconds: float = 0.0


@dataclass
class Contender:
    """Something to time.

    Attributes:
        name: unique in its cell; "transformers", "dense", or that of a row.
        run: runs batch number i in turn t (0 = warm-up).
        plan, fraction: of the row; the fraction of dense FLOPs that was asked for.
        learned: True if a policy decides while the clock runs.
    """

    name: str
    run: Callable[[int, int], Call]
    plan: str = "dense"
    fraction: float = 1.0
    learned: bool = False


@dataclass
class Times:
    """What was measured of a contender over all batches of a cell.

    Attributes:
        batch_seconds: median seconds of each batch.
        calls: seconds of every timed call.
        policy_seconds: sum over batches of the median. flops, dense_flops: sums over timed calls.
        peak: bytes; see `memory`.
    """

    batch_seconds: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    policy_seconds: float = 0.0
    flops: float = 0.0
    dense_flops: float = 0.0
    peak: int = 0

    @property
    def seconds(self) -> float:
        """Seconds for all batches once."""
        return sum(self.batch_seconds)

    def quantile_ms(self, share: float) -> float:
        """Latency of a call in ms, the smallest that `share` of the calls do not exceed."""
        ordered = sorted(self.calls)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def take_turns(
    contenders: Sequence[Contender],
    tokens: Sequence[int],
    repeats: int,
    device: torch.device,
    *,
    inference_dtype: torch.dtype | None,
) -> dict[str, Times]:
    """Times of every contender: one warm-up turn a batch, then `repeats`; the order moves on by one every turn.

    Args:
        tokens: number of tokens (padding included) of each batch; memory is taken on the largest batch.
        inference_dtype: inference under autocast of this type; None = the contenders see to gradients and autocast.
    """
    times = {contender.name: Times() for contender in contenders}
    largest = max(range(len(tokens)), key=tokens.__getitem__)
    inference = inference_dtype is not None
    with torch.inference_mode(inference), autocast(device, inference_dtype or torch.float32):
        for index in range(len(tokens)):
            taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
            deciding: dict[str, list[float]] = {contender.name: [] for contender in contenders}
            for turn in range(repeats + 1):
                first = turn % len(contenders)
                for contender in (*contenders[first:], *contenders[:first]):
                    seconds, call = _timed(contender, index, turn, device)
                    if turn:
                        taken[contender.name].append(seconds)
                        deciding[contender.name].append(call.policy_seconds)
                        _count(times[contender.name], call.trace)
            for name, measured in times.items():
                measured.batch_seconds.append(statistics.median(taken[name]))
                measured.calls += taken[name]
                measured.policy_seconds += statistics.median(deciding[name])
        for contender in contenders:
            turn = repeats + 1
            times[contender.name].peak = peak_bytes(lambda c=contender, t=turn: c.run(largest, t), device)  # type: ignore[misc]
    return times


def _timed(contender: Contender, index: int, turn: int, device: torch.device) -> tuple[float, Call]:
    _wait(device)
    started = time.perf_counter()
    call = contender.run(index, turn)
    _wait(device)
    return time.perf_counter() - started, call


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count(times: Times, trace: Trace | None) -> None:
    if trace is not None:
        times.flops += float(trace.flops.sum())
        times.dense_flops += float(trace.dense_flops.sum())


def rows_of(
    contenders: Sequence[Contender], times: dict[str, Times], batch: int, cell: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row for every contender but the dense denominators; our dense path has a row of its own.

    `measured` = seconds / the faster dense seconds; `theoretical` = FLOPs / dense FLOPs of the very calls that were
    timed; `realised` = theoretical / measured. All seconds are means of one batch.

    Args:
        batch: rows a batch.
        cell: model, what, dtype, batch, tokens; copied into every row.
    """
    fastest = min((name for name in DENSE if name in times), key=lambda name: times[name].seconds)
    dense, own, plain = times[fastest], times["dense"], times.get("transformers")
    batches = len(dense.batch_seconds)
    rows = []
    for contender in contenders:
        if contender.name == "transformers":
            continue
        mine = times[contender.name]
        theoretical, measured = mine.flops / mine.dense_flops, mine.seconds / dense.seconds
        rows.append(
            cell
            | {
                "plan": contender.plan,
                "fraction": contender.fraction,
                "theoretical": theoretical,
                "transformers_seconds": plain.seconds / batches if plain else None,
                "own_dense_seconds": own.seconds / batches,
                "seconds": mine.seconds / batches,
                "measured": measured,
                "realised": theoretical / measured,
                "own_over_transformers": own.seconds / plain.seconds if plain else None,
                "policy_share": mine.policy_seconds / mine.seconds if contender.learned else None,
                "peak_mb": mine.peak / 1e6,
                "transformers_peak_mb": plain.peak / 1e6 if plain else None,
                "own_dense_peak_mb": own.peak / 1e6,
                "p50_ms": mine.quantile_ms(0.5),
                "p95_ms": mine.quantile_ms(0.95),
                "p50_fraction": mine.quantile_ms(0.5) / dense.quantile_ms(0.5),
                "examples_per_second": batch * batches / mine.seconds,
                "batches": batches,
            }
        )
    return rows
