"""Seconds of finished cells: taken when all else is done, one cell at a time; work side by side would spoil them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch

from ..bench.memory import peak_bytes
from ..hf.modeling import DHTForSequenceClassification
from ..measure import Timing, autocast, split_labels, time_policy
from ..policy.baselines import DensePolicy
from .cells import Bench, Cell, Served, conditions

LARGE = 128
"""Rows of the large batches that are timed beside those of the comparison's size and single rows."""

SINGLES, LARGE_BATCHES = 24, 2
"""Single rows and large batches that are timed."""


def seconds_of(cell: Cell, bench: Bench, serve: Callable[[Bench, float, int], Served]) -> dict[str, Any]:
    """The row's fields on seconds and memory: ratios within this process, medians of repeats. Nothing of the oracle.

    `latency_*` are seconds of one row alone, `throughput*` rows a second, `peak_bytes` what a batch of the comparison's
    size needs beside the weights. `dense_*` is the fastest dense contender (of memory: our own dense path).
    """
    settings, seed = bench.settings, cell.seed
    served = serve(bench, cell.budget, seed)
    if served.outcome is not None:
        return {}
    model, policy = cast(DHTForSequenceClassification, served.model), served.policy

    def timed(size: int, most: int) -> Timing:
        batches = bench.batches(seed, bench.held_out(seed), size)
        return time_policy(model, batches, policy, dtype=bench.dtype, repeats=settings.repeats, most=most)

    timing = timed(settings.batch_size, settings.timed_batches)
    single, large = timed(1, SINGLES), timed(LARGE, LARGE_BATCHES)
    ours, dense = single.batches["dht"], min((t for n, t in single.batches.items() if n != "dht"), key=sum)
    held = bench.batches(seed, bench.held_out(seed), settings.batch_size)
    _, inputs = split_labels(held[len(held) // 2], model.device)
    full = DensePolicy(model.config.num_attention_heads).to(model.device)
    with torch.inference_mode(), autocast(model.device, bench.dtype):
        peaks = [peak_bytes(partial(model, **inputs, policy=one), model.device) for one in (policy, full)]
    return timing.fields() | {
        "latency_p50": statistics.median(ours), "latency_p95": statistics.quantiles(ours, n=20)[-1],
        "dense_latency_p50": statistics.median(dense), "dense_latency_p95": statistics.quantiles(dense, n=20)[-1],
        "latency_fraction": statistics.median(ours) / statistics.median(dense),
        "throughput": timing.examples / timing.seconds["dht"],
        "dense_throughput": timing.examples / timing.dense_seconds,
        f"throughput_{LARGE}": large.examples / large.seconds["dht"],
        f"dense_throughput_{LARGE}": large.examples / large.dense_seconds,
        f"time_fraction_{LARGE}": large.seconds["dht"] / large.dense_seconds,
        "peak_bytes": peaks[0], "dense_peak_bytes": peaks[1],
        "timing": conditions() | {"batches": settings.timed_batches, "repeats": settings.repeats},
    }  # fmt: skip
