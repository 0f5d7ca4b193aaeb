"""One class a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._labels import SINGLE
from ..metrics import macro_f1
from .base import Task


@dataclass(frozen=True)
class SingleLabel(Task):
    """One class a row.

    Args:
        classes: C.
        reward: "correct": 1 if the exit's answer is right. "probability": the true label's probability (less noise, but
            a deep exit that is only surer looks better).
        class_weights: what a row of each class counts in the loss; None = 1.
    """

    classes: int = 2
    reward: str = "correct"
    class_weights: tuple[float, ...] | None = None
    name: ClassVar[str] = SINGLE
    metric: ClassVar[str] = "accuracy"
    reads_rows: ClassVar[bool] = True

    @property
    def least_sure(self) -> float:
        return 1 / self.classes

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise self._mismatch(labels, "integers", logits.shape[:1])

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=logits.device)
        return F.cross_entropy(logits.float(), labels, weights, reduction="none")

    def as_labels(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1)

    def quality(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.reward == "correct":
            return (logits.argmax(-1) == labels).to(torch.float64)
        labels = labels.expand(logits.shape[:-1])
        return logits.double().softmax(-1).gather(-1, labels[..., None])[..., 0]

    def context(self, logits: Tensor, previous: Tensor | None) -> Tensor:
        # One pass over this exit and the one before: a few rows' decision costs what its operations cost to launch.
        both = logits[None] if previous is None else torch.stack([logits, previous])
        probs = both.double().softmax(-1)
        top, label = probs.topk(2, -1)
        sure, second = top[0].unbind(-1)
        if previous is None:
            before = same = torch.zeros_like(sure)
        else:
            before, same = top[1, :, 0], (label[0, :, 0] == label[1, :, 0]).to(sure.dtype)
        return torch.stack([sure, sure.square(), entropy(probs[0]), sure - second, same, before], -1)

    def context_of_row(self, logits: list[float], previous: list[float] | None) -> list[float]:
        probs, answer = _softmax(logits)
        sure, second = sorted(probs)[:-3:-1]
        entropy = -sum([p * math.log(p) for p in probs if p > 0.0]) / math.log(len(probs))
        same = before = 0.0
        if previous is not None:
            others, other = _softmax(previous)
            same, before = float(other == answer), max(others)
        return [sure, sure * sure, entropy, sure - second, same, before]

    def typical(self, sure: Tensor) -> Tensor:
        rest = ((1 - sure) / (self.classes - 1))[:, None].expand(-1, self.classes - 1)
        probs = torch.cat([sure[:, None], rest], 1)
        return torch.stack([sure, sure.square(), entropy(probs), sure - rest[:, 0]], -1)

    def confidence(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1).amax(-1)

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        return one.argmax(-1) == other.argmax(-1)

    def answers(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def metrics(self, labels: Tensor, answers: Tensor) -> dict[str, float | None]:
        return {"accuracy": float((labels == answers).double().mean()), "macro_f1": macro_f1(labels, answers)}

    def told(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        score, label = logits.float().softmax(-1).max(-1)
        return {"label": names[int(label)], "score": round(float(score), 6)}


SINGLE_LABEL = SingleLabel()


def entropy(probs: Tensor) -> Tensor:
    """[...] in [0, 1], of probabilities [..., C]."""
    nats: Tensor = torch.special.entr(probs).sum(-1)
    return nats / math.log(probs.shape[-1])


def _softmax(logits: list[float]) -> tuple[list[float], int]:
    """Probabilities and the answer; not-a-numbers stay what they are."""
    highest = max(logits)
    powers = [math.exp(logit - highest) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers], logits.index(highest) if highest == highest else 0
