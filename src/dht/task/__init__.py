"""What a model is for, one class a task: made from the model's configuration, and holding nothing that is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SEEN, Task
from .embedding import Embedding
from .multi import MultiLabel
from .regression import Regression
from .single import SINGLE_LABEL, SingleLabel
from .token import Entities, TokenTags

if TYPE_CHECKING:
    from ..hf.configuration import DHTConfig

__all__ = [
    "SEEN",
    "SINGLE_LABEL",
    "Embedding",
    "Entities",
    "MultiLabel",
    "Regression",
    "SingleLabel",
    "Task",
    "TokenTags",
    "task_of",
]


def task_of(config: DHTConfig) -> Task:
    """The task that a configuration names; as in `transformers`, a single output is a regression."""
    outputs = len(config.label_names)
    if config.head == "embedding":
        return Embedding()
    if config.head == "token":
        names = tuple(config.label_names[i] for i in range(outputs))
        return (Entities if Entities.marked_by(names) else TokenTags)(names, config.reward)
    problem = config.problem_type or (Regression.name if outputs == 1 else SingleLabel.name)
    if problem == MultiLabel.name:
        return MultiLabel(config.reward)
    if problem == Regression.name:
        return Regression(float(config.label_mean), float(config.label_std))
    weights = config.class_weights
    return SingleLabel(outputs, config.reward, None if weights is None else tuple(float(w) for w in weights))
