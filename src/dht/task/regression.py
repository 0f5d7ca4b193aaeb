"""One number a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._labels import REGRESSION
from ..errors import DHTError
from ..metrics import number_scores
from .base import Task

NEAR = 0.25
"""Standard deviations within which two predicted numbers agree."""


@dataclass(frozen=True)
class Regression(Task):
    """One number a row. Logits are in the labels' unit; loss and quality are in standard deviations of the labels.

    An exit says nothing of how sure it is; what stands in for confidence is the quality that the exit before would
    have, were this one right. At the first exit it is 0.5.

    Args:
        mean, std: of the training labels.
    """

    mean: float = 0.0
    std: float = 1.0
    name: ClassVar[str] = REGRESSION
    metric: ClassVar[str] = "r2"

    @property
    def least_sure(self) -> float:
        return 0.0

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape[:1] or not labels.is_floating_point():
            raise self._mismatch(labels, "floats", logits.shape[:1])

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits[:, 0].float() - labels.float()) / self.std).square()

    def as_labels(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def quality(self, logits: Tensor, labels: Tensor) -> Tensor:
        """1 less the squared error in variances of the labels, at least 0."""
        gap = (logits[..., 0].double() - labels.double()) / self.std
        return 1 - gap.square().clamp_max(1)

    def context(self, logits: Tensor, previous: Tensor | None) -> Tensor:
        place = (logits[:, 0].double() - self.mean) / self.std
        far = (place.abs() / 3).clamp_max(1)
        if previous is None:
            sure, same, gap = torch.full_like(place, 0.5), torch.zeros_like(place), torch.zeros_like(place)
        else:
            gap = ((logits.double() - previous.double())[:, 0] / self.std).abs().clamp_max(1)
            sure, same = 1 - gap.square(), (gap < NEAR).to(gap.dtype)
        return torch.stack([sure, sure.square(), far, (place / 3).clamp(-1, 1), same, gap], -1)

    def typical(self, sure: Tensor) -> Tensor:
        return torch.stack([sure, sure.square(), torch.full_like(sure, 0.3), torch.zeros_like(sure)], -1)

    def confidence(self, logits: Tensor) -> Tensor:
        raise DHTError("confidence: a regression has none; allowed: patience, which asks whether exits agree")

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other)[..., 0].abs() < NEAR * self.std

    def answers(self, logits: Tensor) -> Tensor:
        return logits[..., 0].float()

    def metrics(self, labels: Tensor, answers: Tensor) -> dict[str, float | None]:
        return {"accuracy": None, "macro_f1": None, **number_scores(labels, answers)}

    def told(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        return {"label": round(float(logits[0]), 6), "score": None}
