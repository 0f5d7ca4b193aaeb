"""A vector a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._labels import EMBEDDING
from ..errors import DHTError
from ..metrics import vector_scores
from .base import Task

ALIKE = 0.95
"""Cosine above which two embeddings agree."""


@dataclass(frozen=True)
class Embedding(Task):
    """A vector a row. The truth is the full model's vector, so that every text has one; what counts is the direction.

    An exit says nothing of how sure it is; what stands in for confidence is its cosine to the exit before. At the first
    exit it is 0.5.
    """

    name: ClassVar[str] = EMBEDDING
    metric: ClassVar[str] = "cosine"

    @property
    def least_sure(self) -> float:
        return 0.0

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape or not labels.is_floating_point():
            raise self._mismatch(labels, "floats, the full model's embeddings,", logits.shape)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(logits.float(), labels.float(), dim=-1)

    def as_labels(self, logits: Tensor) -> Tensor:
        return logits

    def quality(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cosine_similarity(logits.double(), labels.double(), dim=-1).clamp(0, 1)

    def context(self, logits: Tensor, previous: Tensor | None) -> Tensor:
        length = logits.double().square().mean(-1).sqrt()
        if previous is None:
            sure, same, before = torch.full_like(length, 0.5), torch.zeros_like(length), torch.zeros_like(length)
        else:
            sure = F.cosine_similarity(logits.double(), previous.double(), dim=-1).clamp(0, 1)
            same, before = (sure > ALIKE).to(sure.dtype), previous.double().square().mean(-1).sqrt()
        return torch.stack([sure, sure.square(), 1 - sure, length, same, before], -1)

    def typical(self, sure: Tensor) -> Tensor:
        return torch.stack([sure, sure.square(), 1 - sure, torch.full_like(sure, 0.5)], -1)

    def confidence(self, logits: Tensor) -> Tensor:
        raise DHTError("confidence: an embedding has none; allowed: patience, which asks whether exits agree")

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        return F.cosine_similarity(one.float(), other.float(), dim=-1) > ALIKE

    def answers(self, logits: Tensor) -> Tensor:
        return logits.float()

    def metrics(self, labels: Tensor, answers: Tensor) -> dict[str, float | None]:
        return {"accuracy": None, "macro_f1": None, **vector_scores(labels, answers)}

    def told(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        return {"embedding": [round(x, 6) for x in logits.float().tolist()]}
