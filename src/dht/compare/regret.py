"""Regret over training: what the policy lost, on held-out rows, against the best fixed depth and against the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Trace
from ..policy.reward import quality
from ..training import DHTTrainer


def probe_record(trace: Trace, labels: Tensor, step: int, price: float) -> dict[str, Any]:
    """Mean utility (right or wrong, minus price times cost) of the policy and of every depth on one probe's rows.

    A probe runs its rows to full depth and notes where the greedy rule would have left, so one pass shows them all.
    Widths are drawn at random in a probe, the same for the policy and for its rivals: only depth is judged.

    Args:
        trace: of a probe under tree search.
        labels: int64 [B].
        step: training step. price: the policy's price at that step.
    """
    right = quality(trace, labels)
    utility = right - price * trace.layer_cost.cumsum(-1)
    stops = trace.wants_stop[:, 1:]
    never = torch.ones_like(stops[:, :1])
    depth = torch.cat([stops, never], 1).int().argmax(-1)  # 0 = leaves after layer 1
    own = utility.gather(1, depth[:, None])
    return {
        "step": step,
        "policy": float(own.mean()),
        "fixed": utility.mean(0).tolist(),
        "oracle": float(utility.max(-1).values.mean()),
    }


def record_regret(trainer: DHTTrainer) -> list[dict[str, Any]]:
    """A list that grows by a record with every probe of the training; probes after the last step are not in it."""
    records: list[dict[str, Any]] = []
    probe = trainer.probe

    def recorded(batch: dict[str, Tensor]) -> Trace:
        price = float(trainer.dynamic.policy.price)
        trace = probe(batch)
        if trainer.state.global_step < trainer.state.max_steps:
            records.append(probe_record(trace, batch["labels"], trainer.state.global_step, price))
        return trace

    setattr(trainer, "probe", recorded)  # noqa: B010  (an instance's method, which type checkers do not let one assign)
    return records


def cumulative(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cumulative regret per held-out row after each probe, against the best fixed depth in hindsight and the oracle.

    >>> cumulative([{"step": 0, "policy": 0.5, "fixed": [0.5, 0.75], "oracle": 1.0}])["fixed"]
    [0.25]
    """
    if not records:
        return {}
    totals = [sum(column) for column in zip(*(record["fixed"] for record in records), strict=True)]
    best = max(range(len(totals)), key=totals.__getitem__)
    fixed, oracle = 0.0, 0.0
    curve: dict[str, Any] = {"best_depth": best + 1, "step": [], "fixed": [], "oracle": []}
    for record in records:
        fixed += record["fixed"][best] - record["policy"]
        oracle += record["oracle"] - record["policy"]
        curve["step"].append(record["step"])
        curve["fixed"].append(fixed)
        curve["oracle"].append(oracle)
    return curve
