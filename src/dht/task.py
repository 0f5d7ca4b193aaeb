"""What a model is for: how an exit's answer is paid, what the policy reads of it, and how a report and a user see it.

A task is made from the model's configuration and holds nothing that is learned. Shapes: `...` is any leading shape, in
practice [R] rows at one exit or [B, N] rows by exits; `labels` has the same leading shape or one that broadcasts to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DHTError
from .metrics import macro_f1, number_scores, set_scores, vector_scores

if TYPE_CHECKING:
    from .hf.configuration import DHTConfig

SEEN = 6
"""Numbers that the policy reads of an exit: `Task.context`."""
NEAR = 0.25
"""Standard deviations within which two predicted numbers agree."""
ALIKE = 0.95
"""Cosine above which two embeddings agree."""


class Task:
    """Base class.

    Attributes:
        name: `problem_type` in the configuration.
        metric: the report's field that says how good the model is, higher being better.
        least_sure: lowest confidence that an exit can have.
        reads_rows: whether there is `context_of_row`, the context without tensors.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    reads_rows: ClassVar[bool] = False

    @property
    def least_sure(self) -> float:
        raise NotImplementedError

    def check(self, labels: Tensor, logits: Tensor) -> None:
        """Raises `ValueError` if `labels` are not what the task takes for `logits` [B, C]."""
        raise NotImplementedError

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What training lowers, float32 [R], of logits [R, C]."""
        raise NotImplementedError

    def quality(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What an exit is paid, float64 [...] in [0, 1], of logits [..., C]."""
        raise NotImplementedError

    def context(self, logits: Tensor, previous: Tensor | None) -> Tensor:
        """What the policy reads of an exit, float64 [R, 6].

        In this order: confidence, its square, doubt in [0, 1], margin, agreement with the exit before (0 or 1), and a
        number on the exit before. Confidence estimates the quality.

        Args:
            logits: [R, C] of the exit just reached.
            previous: [R, C] of the exit before; None = there is none.
        """
        raise NotImplementedError

    def context_of_row(self, logits: list[float], previous: list[float] | None) -> list[float]:
        """The same numbers of one row, worked out without tensors; where `reads_rows` is set."""
        raise NotImplementedError

    def typical(self, sure: Tensor) -> Tensor:
        """The first four numbers of `context` for a made-up row of confidence `sure` [n], float [n, 4]."""
        raise NotImplementedError

    def confidence(self, logits: Tensor) -> Tensor:
        """Float32 [...] in [0, 1], what the exits of one row say of themselves.

        Raises:
            DHTError: an exit of this task says nothing of itself.
        """
        raise NotImplementedError

    def agree(self, one: Tensor, other: Tensor) -> Tensor:
        """Bool [...], whether two exits [..., C] give the same answer."""
        raise NotImplementedError

    def answers(self, logits: Tensor) -> Tensor:
        """The answers in the form of labels, [...] or [..., C]."""
        raise NotImplementedError

    def metrics(self, labels: Tensor, answers: Tensor) -> dict[str, float | None]:
        """The report's fields; `accuracy` and `macro_f1` are None where they mean nothing."""
        raise NotImplementedError

    def told(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """One row's answer as `dht predict` gives it: `label` and `score` (or `embedding`), of logits [C]."""
        raise NotImplementedError


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
    name: ClassVar[str] = "single_label_classification"
    metric: ClassVar[str] = "accuracy"
    reads_rows: ClassVar[bool] = True

    @property
    def least_sure(self) -> float:
        return 1 / self.classes

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(_mismatch(self, labels, "integers", logits.shape[:1]))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=logits.device)
        return F.cross_entropy(logits.float(), labels, weights, reduction="none")

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
        return torch.stack([sure, sure.square(), _entropy(probs[0]), sure - second, same, before], -1)

    def context_of_row(self, logits: list[float], previous: list[float] | None) -> list[float]:
        probs, answer = _softmax(logits)
        sure, second = sorted(probs)[:-3:-1]
        entropy = -sum(p * math.log(p) for p in probs if p > 0.0) / math.log(len(probs))
        same = before = 0.0
        if previous is not None:
            others, other = _softmax(previous)
            same, before = float(other == answer), max(others)
        return [sure, sure * sure, entropy, sure - second, same, before]

    def typical(self, sure: Tensor) -> Tensor:
        rest = ((1 - sure) / (self.classes - 1))[:, None].expand(-1, self.classes - 1)
        probs = torch.cat([sure[:, None], rest], 1)
        return torch.stack([sure, sure.square(), _entropy(probs), sure - rest[:, 0]], -1)

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


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of labels a row, each of them on or off.

    Args:
        reward: "correct": the share of labels that are right. "probability": the mean probability of what is right.
    """

    reward: str = "correct"
    name: ClassVar[str] = "multi_label_classification"
    metric: ClassVar[str] = "micro_f1"

    @property
    def least_sure(self) -> float:
        return 0.5

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape or not labels.is_floating_point():
            raise ValueError(_mismatch(self, labels, "floats, 1 where a row has the label,", logits.shape))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1)

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
    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "r2"

    @property
    def least_sure(self) -> float:
        return 0.0

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape[:1] or not labels.is_floating_point():
            raise ValueError(_mismatch(self, labels, "floats", logits.shape[:1]))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits[:, 0].float() - labels.float()) / self.std).square()

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
            gap = ((logits - previous)[:, 0].double() / self.std).abs().clamp_max(1)
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


@dataclass(frozen=True)
class Embedding(Task):
    """A vector a row. The truth is the full model's vector, so that every text has one; what counts is the direction.

    An exit says nothing of how sure it is; what stands in for confidence is its cosine to the exit before. At the first
    exit it is 0.5.
    """

    name: ClassVar[str] = "embedding"
    metric: ClassVar[str] = "cosine"

    @property
    def least_sure(self) -> float:
        return 0.0

    def check(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape or not labels.is_floating_point():
            raise ValueError(_mismatch(self, labels, "floats, the full model's embeddings,", logits.shape))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(logits.float(), labels.float(), dim=-1)

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


SINGLE_LABEL = SingleLabel()


def task_of(config: DHTConfig) -> Task:
    """The task that a configuration names; as in `transformers`, a single output is a regression."""
    outputs = len(config.label_names)
    if config.head == "embedding":
        return Embedding()
    problem = config.problem_type or (Regression.name if outputs == 1 else SingleLabel.name)
    if problem == MultiLabel.name:
        return MultiLabel(config.reward)
    if problem == Regression.name:
        return Regression(float(config.label_mean), float(config.label_std))
    weights = config.class_weights
    return SingleLabel(outputs, config.reward, None if weights is None else tuple(float(w) for w in weights))


def _mismatch(task: Task, labels: Tensor, kind: str, shape: Sequence[int]) -> str:
    got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
    return f"labels: got {got}, allowed: {kind} of shape {list(shape)} for problem_type {task.name!r}"


def _entropy(probs: Tensor) -> Tensor:
    """[...] in [0, 1], of probabilities [..., C]."""
    entropy: Tensor = torch.special.entr(probs).sum(-1)
    return entropy / math.log(probs.shape[-1])


def _softmax(logits: list[float]) -> tuple[list[float], int]:
    """Probabilities and the answer; not-a-numbers stay what they are."""
    highest = max(logits)
    powers = [math.exp(logit - highest) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers], logits.index(highest) if highest == highest else 0


def _bits(on: Tensor) -> Tensor:
    """Entropy of one label that is on with probability `on`, in nats."""
    nats: Tensor = torch.special.entr(on) + torch.special.entr(1 - on)
    return nats
