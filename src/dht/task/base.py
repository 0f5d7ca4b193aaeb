"""`Task`: how an exit's answer is paid, what the policy reads of it, and how a report and a user see it.

Shapes: `...` is any leading shape, in practice [R] rows at one exit or [B, N] rows by exits; `labels` has the same
leading shape or one that broadcasts to it. A tagger's C is [T, C]: see `TokenTags`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

SEEN = 6
"""Numbers that the policy reads of an exit: `Task.context`."""


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

    def _mismatch(self, labels: Tensor, kind: str, shape: Sequence[int]) -> ValueError:
        got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        return ValueError(f"labels: got {got}, allowed: {kind} of shape {list(shape)} for task {self.name!r}")

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What training lowers, float32 [R], of logits [R, C]."""
        raise NotImplementedError

    def as_labels(self, logits: Tensor) -> Tensor:
        """Answers [R, C] as soft labels that `losses` takes, [R, ...]."""
        raise NotImplementedError

    def quality(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What an exit is paid, float64 [...] in [0, 1], of logits [..., C]."""
        raise NotImplementedError

    def context(self, logits: Tensor, previous: Tensor | None) -> Tensor:
        """What the policy reads of an exit, float64 [R, 6].

        In this order: confidence, its square, doubt in [0, 1], margin, agreement with the exit before (0 to 1), and a
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
        """One row's answer as `dht predict` gives it: `label` and `score` (or `embedding` or `tags`), of logits [C]."""
        raise NotImplementedError
