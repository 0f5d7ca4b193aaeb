"""What a policy costs and what it is worth: accuracy, FLOPs and seconds against the dense model, in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._labels import IGNORED
from .hf.convert import FAMILIES, export
from .hf.modeling import DHTForSequenceClassification
from .plan import Trace
from .policy.base import Policy
from .policy.baselines import DensePolicy
from .task import SINGLE_LABEL, Task, TokenTags

Batch = dict[str, Tensor]


@dataclass
class Outcome:
    """What a policy did on a set of batches, in the rows' original order of the batches.

    Attributes:
        labels, predictions: [n, ...], as the task has them; int64 [n] of single labels. Tags are int64 [n, T], -100 at
            places without one.
        layers: int64 [n]. units: bool [n, N, H]. flops, dense_flops: float64 [n].
        exit_logits: float [n, N, C] (of a tagger [n, N, T, C]), zeros where not visited; visited: bool [n, N].
        at_once: float [n, C], logits of the lexical exit; [n, 0] if it was not read.
    """

    labels: Tensor
    predictions: Tensor
    layers: Tensor
    units: Tensor
    flops: Tensor
    dense_flops: Tensor
    exit_logits: Tensor
    visited: Tensor
    at_once: Tensor
    task: Task = field(default=SINGLE_LABEL, kw_only=True)

    @property
    def accuracy(self) -> float:
        """Share of rows answered right in everything."""
        right = (self.labels == self.predictions).view(*self.labels.shape, 1)
        return float(right.flatten(1).all(-1).double().mean())

    @property
    def metrics(self) -> dict[str, float | None]:
        """The report's fields on how good the answers are."""
        return self.task.metrics(self.labels, self.predictions)

    @property
    def flops_fraction(self) -> float:
        """Executed FLOPs over dense FLOPs, all rows together."""
        return float(self.flops.sum() / self.dense_flops.sum())


def run_policy(
    model: DHTForSequenceClassification,
    batches: Sequence[Batch],
    policy: Policy | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[], None] | None = None,
) -> Outcome:
    """The outcome of `policy` (None = the learned one) on `batches`, weights and policy frozen.

    Args:
        batches: inputs with `labels`, on any device.
        dtype: bfloat16 runs under autocast.
        progress: called after every batch.
    """
    parts: list[tuple[Tensor, ...]] = []
    model.eval()
    with torch.inference_mode(), autocast(model.device, dtype):
        for batch in batches:
            labels, inputs = split_labels(batch, model.device)
            trace: Trace = model(**inputs, policy=policy).trace
            logits, visited = trace.exit_table()
            answer = model.task.answers(trace.logits)
            if isinstance(model.task, TokenTags):
                answer = torch.where(labels == IGNORED, labels, answer)
            first = trace.exits[0]
            at_once = first.logits.float() if not first.layer else logits.new_zeros(len(labels), 0)
            row = (
                labels, answer, trace.layers, trace.units, trace.flops, trace.dense_flops, logits.float(), visited,
                at_once,
            )  # fmt: skip
            parts.append(tuple(part.cpu() for part in row))
            if progress:
                progress()
    return Outcome(*(_joined(column) for column in zip(*parts, strict=True)), task=model.task)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The batches end to end; those of a tagger, of different numbers of tokens, padded to the longest."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if all(list(part.shape[1:]) == shape for part in parts):
        return torch.cat(list(parts))
    fill = -torch.inf if parts[0].is_floating_point() else IGNORED
    whole = parts[0].new_full((sum(map(len, parts)), *shape), fill)
    for rows, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
        rows[tuple(slice(size) for size in part.shape)] = part
    return whole


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """The autocast context of `dtype`; none for float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def split_labels(batch: Batch, device: torch.device) -> tuple[Tensor, Batch]:
    """The labels and the other inputs of a batch, on `device`."""
    moved = {key: value.to(device) for key, value in batch.items()}
    return moved.pop("labels"), moved


@dataclass
class Timing:
    """Seconds of each contender over the same batches; each batch's figure is the median of its repeats.

    Attributes:
        batches: those figures. policy_seconds: of all batches together. examples: rows in them.
    """

    batches: dict[str, list[float]] = field(default_factory=dict)
    policy_seconds: float = 0.0
    examples: int = 0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of all batches together."""
        return {name: sum(taken) for name, taken in self.batches.items()}

    @property
    def dense_seconds(self) -> float:
        """Of the fastest dense contender."""
        return min(seconds for name, seconds in self.seconds.items() if name != "dht")

    def fields(self) -> dict[str, Any]:
        """The report's fields on seconds."""
        seconds = self.seconds
        return {
            "time_fraction": seconds["dht"] / self.dense_seconds,
            "seconds": seconds["dht"],
            "dense_seconds": self.dense_seconds,
            "own_dense_seconds": seconds["dense"],
            "transformers_seconds": seconds.get("transformers"),
            "policy_time_fraction": self.policy_seconds / seconds["dht"],
            "timed_examples": self.examples,
        }


def time_policy(
    model: DHTForSequenceClassification,
    batches: Sequence[Batch],
    policy: Policy | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
    most: int = 24,
) -> Timing:
    """Seconds of the policy, of our dense path and of the same model in `transformers`, taken in turn, batch by batch.

    Args:
        repeats: timed runs of each batch after one warm-up; medians are summed.
        most: time at most this many batches, spread evenly over the set (all contenders the same ones).
    """
    step = max(1, math.ceil(len(batches) / most))
    timed = [batch for i, batch in enumerate(batches) if i % step == step // 2 or step == 1]
    dense = DensePolicy(model.config.num_attention_heads).to(model.device)
    contenders: dict[str, Callable[[Batch], Any]] = {
        "dht": lambda inputs: model(**inputs, policy=policy),
        "dense": lambda inputs: model(**inputs, policy=dense),
    }
    if model.config.source in FAMILIES:  # a from-scratch preset has no counterpart there
        plain = export(model).eval()
        plain.to(model.device)
        contenders["transformers"] = lambda inputs: plain(**inputs)
    timing = Timing({name: [] for name in contenders}, examples=sum(len(batch["labels"]) for batch in timed))
    model.eval()
    with torch.inference_mode(), autocast(model.device, dtype):
        for index, batch in enumerate(timed):
            _, inputs = split_labels(batch, model.device)
            taken: dict[str, list[float]] = {name: [] for name in contenders}
            deciding = []
            for _ in range(repeats + (index == 0)):
                for name, run in contenders.items():
                    _wait(model.device)
                    started = time.perf_counter()
                    output = run(inputs)
                    _wait(model.device)
                    taken[name].append(time.perf_counter() - started)
                    if name == "dht":
                        deciding.append(output.trace.policy_seconds)
            for name in contenders:
                timing.batches[name].append(statistics.median(taken[name][-repeats:]))
            timing.policy_seconds += statistics.median(deciding[-repeats:])
    return timing


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report_of(outcome: Outcome, timing: Timing | None, **settings: Any) -> dict[str, Any]:
    """The report's inference fields (the contract of `dht evaluate --json`).

    Args:
        settings: budget, policy, search, seed and whatever else is to be kept.
    """
    rows, layers, _ = outcome.units.shape
    ran = outcome.units.any(-1)
    widths = outcome.units.sum(-1)[ran].double()
    histogram = torch.bincount(outcome.layers, minlength=layers + 1)
    share = histogram[histogram > 0].double() / rows
    report = {
        **outcome.metrics,
        "task": outcome.task.name,
        "metric": outcome.task.metric,
        "num_examples": rows,
        **settings,
        "flops_fraction": outcome.flops_fraction,
        "mean_layers": float(outcome.layers.double().mean()),
        "mean_heads": float(widths.mean()) if len(widths) else 0.0,
        "layers_histogram": histogram.tolist(),
        "head_usage": outcome.units.double().mean(0).tolist(),
        "arm_entropy": float(-(share * share.log()).sum()),
        "flops_fraction_p95": float((outcome.flops / outcome.dense_flops).quantile(0.95)),
    }
    if outcome.at_once.shape[-1]:  # what words alone would have answered
        report["lexical_accuracy"] = float((outcome.at_once.argmax(-1) == outcome.labels).double().mean())
    return report if timing is None else report | timing.fields()
