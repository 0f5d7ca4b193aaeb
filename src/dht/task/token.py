"""A tag a token: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._labels import IGNORED, TOKEN
from ..metrics import entity_scores, macro_f1
from .base import Task
from .single import SingleLabel, entropy


@dataclass(frozen=True)
class TokenTags(Task):
    """A tag a token. A row leaves as a whole, and what is said of it is the mean over its tokens.

    Shapes: logits are [..., T, C], with -inf at places that hold no token; labels are int64 [..., T], with -100 at
    places that have no tag (padding, special tokens, all pieces of a word but the first). Loss, quality and figures are
    over the places that have one; a row without any has no loss and nothing to get wrong. What the policy reads is over
    all tokens: it sees no labels, and has to read the same while training and serving.

    Args:
        names: of the tags, in order.
        reward: "correct": the share of tags that are right. "probability": the mean probability of the true tags.
    """

    names: tuple[str, ...]
    reward: str = "correct"
    name: ClassVar[str] = TOKEN
    metric: ClassVar[str] = "macro_f1"

    @property
    def least_sure(self) -> float:
        return 1 / len(self.names)

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape[:-1] or labels.is_floating_point():
            raise self._mismatch(labels, "integers, -100 where there is no tag,", logits.shape[:-1])
        astray = ((labels != IGNORED) & ~_real(logits)).nonzero()
        if len(astray):
            row, place = astray[0].tolist()
            raise ValueError(
                f"labels: row {row} has a tag at place {place}, where attention_mask says that there is no token;"
                f" allowed there: {IGNORED}"
            )

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        tagged = labels != IGNORED
        each = F.cross_entropy(logits[tagged].float(), labels[tagged], reduction="none")
        total = each.new_zeros(len(labels)).index_add(0, tagged.nonzero()[:, 0], each)
        return total / tagged.sum(-1).clamp_min(1)

    def quality(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.reward == "correct":
            paid = (logits.argmax(-1) == labels).to(torch.float64)
        else:
            wanted = labels.clamp_min(0).expand(logits.shape[:-1])
            paid = logits.double().softmax(-1).gather(-1, wanted[..., None])[..., 0]
        tagged = labels != IGNORED
        return torch.where(tagged.any(-1), _mean(paid, tagged), 1.0)

    def context(self, logits: Tensor, previous: Tensor | None) -> Tensor:
        real = _real(logits)
        probs = logits.double().softmax(-1)
        top, tag = probs.topk(2, -1)
        sure, margin = _mean(top[..., 0], real), _mean(top[..., 0] - top[..., 1], real)
        if previous is None:
            same = before = torch.zeros_like(sure)
        else:
            same = _mean((tag[..., 0] == previous.argmax(-1)).to(sure.dtype), real)
            before = _mean(previous.double().softmax(-1).amax(-1), real)
        return torch.stack([sure, sure.square(), _mean(entropy(probs), real), margin, same, before], -1)

    def typical(self, sure: Tensor) -> Tensor:
        return SingleLabel(len(self.names)).typical(sure)

    def confidence(self, logits: Tensor) -> Tensor:
        return _mean(logits.float().softmax(-1).amax(-1), _real(logits))

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        return (one.argmax(-1) == other.argmax(-1)).all(-1)

    def answers(self, logits: Tensor) -> Tensor:
        return torch.where(_real(logits), logits.argmax(-1), IGNORED)

    def metrics(self, labels: Tensor, answers: Tensor) -> dict[str, float | None]:
        """`accuracy` is the share of tags that are right; 1 if there is none."""
        tagged = labels != IGNORED
        true, said = labels[tagged], answers[tagged]
        if not len(true):
            return {"accuracy": 1.0, "macro_f1": 1.0}
        return {"accuracy": float((true == said).double().mean()), "macro_f1": macro_f1(true, said)}

    def told(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """`tags` and `scores` of the words whose logits [W, C] these are."""
        score, tag = logits.float().softmax(-1).max(-1)
        return {"tags": [names[i] for i in tag.tolist()], "scores": [round(x, 6) for x in score.tolist()]}


@dataclass(frozen=True)
class Entities(TokenTags):
    """Tags that mark entities: B-X begins one of type X, I-X goes on with it, O is outside."""

    metric: ClassVar[str] = "entity_f1"

    @staticmethod
    def marked_by(names: Sequence[str]) -> bool:
        """Whether tags of these names mark entities."""
        marks = [name for name in names if name != "O"]
        return bool(marks) and all(name.startswith(("B-", "I-")) for name in marks)

    def metrics(self, labels: Tensor, answers: Tensor) -> dict[str, float | None]:
        tagged = labels != IGNORED
        rows = [
            [[self.names[i] for i in part[at].tolist()] for part, at in zip(side, tagged, strict=True)]
            for side in (labels, answers)
        ]
        return super().metrics(labels, answers) | entity_scores(*rows)


def _real(logits: Tensor) -> Tensor:
    """Bool [..., T], where there is a token."""
    return ~logits[..., 0].isneginf()


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """[...], mean over the places [..., T] that are counted; 0 where none is."""
    return torch.where(counted, values, 0).sum(-1) / counted.sum(-1).clamp_min(1)
