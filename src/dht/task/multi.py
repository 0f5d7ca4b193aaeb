"""Any number of labels a row, each of them on or off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._labels import MULTI
from ..metrics import set_scores
from .base import Task


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of labels a row, each of them on or off.

    Args:
        reward: "correct": the share of labels that are right. "probability": the mean probability of what is right.
    """

    reward: str = "correct"
    name: ClassVar[str] = MULTI
    metric: ClassVar[str] = "micro_f1"

    @property
    def least_sure(self) -> float:
        return 0.5

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape or not labels.is_floating_point():
            raise self._mismatch(labels, "floats, 1 where a row has the label,", logits.shape)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1)

    def as_labels(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()

    def quality(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.reward == "correct":
            return ((logits > 0) == labels.bool()).to(torch.float64).mean(-1)
        on = logits.double().sigmoid()
        return torch.where(labels.bool(), on, 1 - on).mean(-1)

    def context(self, logits: Tensor, previous: Tensor | None) -> Tensor:
        on = logits.double().sigmoid()
        each = torch.maximum(on, 1 - on)
        sure, doubt = each.mean(-1), (_bits(on) / math.log(2)).mean(-1)
        if previous is None:
            same = before = torch.zeros_like(sure)
        else:
            same, before = self.agree(logits, previous).to(sure.dtype), self.confidence(previous).double()
        return torch.stack([sure, sure.square(), doubt, 2 * each.amin(-1) - 1, same, before], -1)

    def typical(self, sure: Tensor) -> Tensor:
        return torch.stack([sure, sure.square(), _bits(sure) / math.log(2), 2 * sure - 1], -1)

    def confidence(self, logits: Tensor) -> Tensor:
        on = logits.float().sigmoid()
        return torch.maximum(on, 1 - on).mean(-1)

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one > 0) == (other > 0)).all(-1)

    def answers(self, logits: Tensor) -> Tensor:
        return (logits > 0).float()

    def metrics(self, labels: Tensor, answers: Tensor) -> dict[str, float | None]:
        scores = set_scores(labels, answers)
        return {"accuracy": scores["subset_accuracy"], **scores}

    def told(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        on = logits.float().sigmoid()
        chosen = (logits > 0).nonzero()[:, 0].tolist()
        return {"label": [names[i] for i in chosen], "score": [round(float(on[i]), 6) for i in chosen]}


def _bits(on: Tensor) -> Tensor:
    """Entropy of one label that is on with probability `on`, in nats."""
    nats: Tensor = torch.special.entr(on) + torch.special.entr(1 - on)
    return nats
