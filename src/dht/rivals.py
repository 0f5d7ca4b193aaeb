"""Rival policies matched to a budget on calibration rows: nothing is ever chosen on the rows that are reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import DHTError
from .hf.modeling import DHTForSequenceClassification
from .measure import Batch, Outcome, run_policy
from .policy.base import Policy
from .policy.baselines import ConfidencePolicy, DensePolicy, PatiencePolicy, PriorPolicy, StaticPolicy

NAMES = ("learned", "dense", "random", "hash", "length", "confidence", "patience", "static:LxK")


def rival(name: str, model: DHTForSequenceClassification, budget: float, calibration: Sequence[Batch]) -> Policy:
    """The policy called `name`, matched to `budget`.

    `random`, `hash` and `length` draw from the plans that the learned policy executes on the calibration rows at this
    budget, each counted by the dense FLOPs of its row, so that arm frequencies and mean FLOPs match. `confidence` and
    `patience` try each of the model's widths with its best units, match the threshold to the budget, and keep the width
    that is most accurate on the calibration rows.

    Args:
        name: one of `NAMES`, with numbers for L and K in `static:LxK`.
        budget: fraction of dense FLOPs.
        calibration: labelled validation batches.

    Raises:
        DHTError: an unknown name, or L or K outside the model.
    """
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    if name in ("learned", model.policy.name):
        model.policy.set_budget(budget)
        return model.policy
    if name == "dense":
        return DensePolicy(heads)
    if name.startswith("static"):
        match = re.fullmatch(r"static:(\d+)x(\d+)", name)
        if not match or not (1 <= int(match[1]) <= layers and 1 <= int(match[2]) <= heads):
            raise DHTError(
                f"--policy: got {name!r}; static takes static:LxK with L in 1..{layers} and K in 1..{heads},"
                " e.g. static:3x8"
            )
        return StaticPolicy(int(match[1]), int(match[2]), model.policy.ranking())
    if name in ("random", "hash", "length"):
        model.policy.set_budget(budget)
        outcome = run_policy(model, calibration)
        lengths = torch.cat([batch["attention_mask"].sum(-1) for batch in calibration])
        plans, weights, lengths = (x.to(model.device) for x in (outcome.units, outcome.dense_flops, lengths))
        return PriorPolicy(plans, name, weights, lengths, model.config.policy_seed)
    if name in ("confidence", "patience"):
        return _exit_rule(name, model, budget, calibration)
    raise DHTError(f"--policy: got {name!r}, allowed: {', '.join(NAMES)}")


@dataclass
class _Depths:
    """All exits of full-depth runs with one fixed head set a layer; the lexical one first, if there is one."""

    outcome: Outcome
    cumulative: Tensor  # [n, N] FLOPs up to each exit

    def spent(self, depth: Tensor) -> float:
        """FLOPs fraction if row i leaves at its exit number `depth[i]`, from 1."""
        return float(self.cumulative.gather(1, (depth - 1)[:, None]).sum() / self.outcome.dense_flops.sum())

    def accuracy(self, depth: Tensor) -> float:
        """How good the answers then are, by the task's own figure."""
        task, logits = self.outcome.task, self.outcome.exit_logits[torch.arange(len(depth)), depth - 1]
        found = task.metrics(self.outcome.labels, task.answers(logits))[task.metric]
        assert found is not None, "a task has the figure that it names"
        return found


def _exit_rule(name: str, model: DHTForSequenceClassification, budget: float, calibration: Sequence[Batch]) -> Policy:
    best: tuple[float, Policy] | None = None
    for width in model.policy.widths:
        sets = model.policy.sets_of(width)
        found = match_exits(name, model, sets, budget, calibration)
        if best is None or (found.affordable and found.accuracy > best[0]):
            best = found.accuracy, found.policy
    assert best is not None
    return best[1]


@dataclass
class MatchedExits:
    """An exit rule matched to a budget.

    Attributes:
        policy: the rule. threshold: its confidence or patience.
        accuracy: on the calibration rows; of other tasks than single labels, the figure that a report names first.
        affordable: False if even leaving at the first exit costs more than the budget.
    """

    policy: Policy
    threshold: float
    accuracy: float
    affordable: bool


def match_exits(
    name: str,
    model: DHTForSequenceClassification,
    sets: Tensor,
    budget: float,
    calibration: Sequence[Batch],
    dtype: torch.dtype = torch.float32,
    outcome: Outcome | None = None,
) -> MatchedExits:
    """The rule "confidence" or "patience" on fixed head sets, its threshold matched to `budget`.

    Args:
        sets: bool [N, H]; layers without a unit are never run.
        calibration: labelled validation batches.
        outcome: of a run of those rows through all the layers of `sets`, if there is one already.
    """
    depth = int(sets.any(-1).sum())
    if outcome is None:
        outcome = run_policy(model, calibration, PatiencePolicy(sets, depth, model.task), dtype=dtype)  # never leaves
    outcome = replace(outcome, exit_logits=outcome.exit_logits[:, :depth])
    tokens = round(float(torch.cat([batch["attention_mask"].sum(-1) for batch in calibration]).double().mean()))
    shares = model.encoder.cost.layer_shares(sets[:depth].sum(-1), tokens)
    spent = outcome.flops[:, None] * shares.cumsum(0)
    if name == "confidence" and outcome.at_once.shape[1]:
        spent = torch.nn.functional.pad(spent, (1, 0))
        outcome = replace(outcome, exit_logits=torch.cat([outcome.at_once[:, None], outcome.exit_logits], 1))
    depths = _Depths(outcome, spent)
    find = _confidence_depth if name == "confidence" else _patience_depth
    low, high = (0.0, 1.0) if name == "confidence" else (0.0, float(depth))
    affordable = depths.spent(find(outcome, low)) <= budget
    for _ in range(30):
        middle = (low + high) / 2
        if depths.spent(find(outcome, middle)) > budget:
            high = middle
        else:
            low = middle
    policy = (ConfidencePolicy if name == "confidence" else PatiencePolicy)(sets, low, model.task)
    return MatchedExits(policy, low, depths.accuracy(find(outcome, low)), affordable)


def _first(stop: Tensor) -> Tensor:
    """1-based index of the first True in each row, the last column counting as True; int64 [n]."""
    stop = stop.clone()
    stop[:, -1] = True
    return stop.int().argmax(-1) + 1


def _confidence_depth(outcome: Outcome, threshold: float) -> Tensor:
    return _first(outcome.task.confidence(outcome.exit_logits) > threshold)


def _patience_depth(outcome: Outcome, patience: float) -> Tensor:
    logits = outcome.exit_logits
    same = outcome.task.agree(logits[:, 1:], logits[:, :-1])
    streak = torch.zeros(logits.shape[:2], dtype=torch.long)
    for layer in range(1, logits.shape[1]):
        streak[:, layer] = torch.where(same[:, layer - 1], streak[:, layer - 1] + 1, 0)
    whole = int(patience)
    # Rows are dealt to the two whole numbers evenly here and by a hash of their tokens in the policy.
    rows = torch.arange(len(logits))
    spread = (rows * 0.618033988749895) % 1.0
    return _first(streak >= whole + (spread < patience - whole).long()[:, None])
