"""Ablations: our method with one switch turned, everything else as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..bandit.posterior import LinearPosterior
from ..hf.modeling import DHTForSequenceClassification
from ..policy.base import View
from ..policy.context import features
from ..policy.learned import LearnedPolicy
from ..policy.tree import TreePolicy

EPSILON = 0.1
"""Share of the decisions that epsilon-greedy takes at random."""


class EpsilonTree(TreePolicy):
    """Explores by epsilon-greedy: no optimism, and a random arm in a share `EPSILON` of the decisions."""

    def _index(self, layer: int, context: Tensor, alpha: float, price: Tensor) -> Tensor:
        index = super()._index(layer, context, 0.0, price)
        generator = self._generator(layer, 11)
        wanders = torch.rand(len(index), 1, generator=generator).to(index.device) < EPSILON
        draws = torch.rand(index.shape, generator=generator, dtype=index.dtype).to(index.device)
        return torch.where(wanders & index.isfinite(), draws, index)


class _NoPriorTree(TreePolicy):
    """The prior speaks of confidence: a context without confidence starts from nothing."""

    def _prior(self) -> LinearPosterior:
        return LinearPosterior(self.numbers.num_arms, self.numbers.num_features, 2).to(self.price.device)


class EmbeddingTree(_NoPriorTree):
    """Every decision sees what the first one sees: the length and the mean embedding."""

    sees_exits = False

    def _features(self, view: View) -> Tensor:
        return view.trace.context[view.rows, 0] if view.layer else super()._features(view)


class HiddenTree(_NoPriorTree):
    """Every decision sees the mean hidden state reached, and nothing of the exits."""

    sees_exits = False

    def _features(self, view: View) -> Tensor:
        return features(replace(view, layer=0, logits=None, previous=None), self.projection, self.task)


class ShuffledTree(TreePolicy):
    """Learns and decides on another row's context."""

    def _features(self, view: View) -> Tensor:
        phi = super()._features(view)
        return phi[torch.randperm(len(phi), generator=self._generator(view.layer, 13)).to(phi.device)]


@dataclass(frozen=True)
class Ablation:
    """One switch.

    Args:
        line: what is different, in words.
        settings: fields of `TrainSettings`. options: fields of `DHTConfig`.
        policy: takes the place of the tree policy.
        feedback: "train" = held-out rows are taken from the training split instead, so that they are fitted rows.
        after_calibration: changes the policy before training.
    """

    line: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    policy: type[TreePolicy] | None = None
    feedback: str = "validation"
    after_calibration: Callable[[LearnedPolicy], None] = lambda policy: None


@torch.no_grad()
def shuffle_importance(policy: LearnedPolicy) -> None:
    """Forgets which head units matter and makes up an order instead."""
    units = policy.units
    for statistic in (units.gram, units.moment, units.pulls):
        statistic.zero_()
    units.invalidate()
    generator = torch.Generator().manual_seed(policy.seed)
    phi = torch.zeros(1, policy.num_features, dtype=torch.float64)
    phi[0, 0] = 1.0
    value = torch.rand(1, policy.layers * policy.heads, generator=generator, dtype=torch.float64)
    device = policy.price.device
    units.update(phi.to(device), torch.ones_like(value).to(device), value.to(device))


_SEES = {"context_projection": 8}
_FIXED = {"sigma": 0.0, "unit_weight": 0.0}
ABLATIONS = {
    "context-embedding": Ablation("decides on length and mean embedding only", options=_SEES, policy=EmbeddingTree),
    "context-hidden": Ablation("decides on the hidden state, not on the exits", options=_SEES, policy=HiddenTree),
    "context-both": Ablation("the first decision sees the mean embedding too", options=_SEES),
    "context-shuffled": Ablation("learns and decides on another row's context", policy=ShuffledTree),
    "forgetting-off": Ablation("gamma = 1: nothing is forgotten", options={"forgetting": 1.0}),
    "exploration-off": Ablation("no step runs everything", options={"exploration": 0.0}),
    "optimism-off": Ablation("alpha = 0: greedy numbers", options={"alpha": 0.0}),
    "schedule-off": Ablation("the budget holds from the first step", settings={"settle": 0.0}),
    "crop-off": Ablation("long texts are read whole from the first step", settings={"crop": 0}),
    "lexical-off": Ablation("no exit before layer 1: every row runs a layer", settings={"lexical": False}),
    "filters-off": Ablation("that exit reads words and pairs of words alone", options={"lexical_filters": 0}),
    "reward-probability": Ablation("paid the true label's probability", options={"reward": "probability"}),
    "feedback-fitted": Ablation("held-out rows replaced by fitted ones", feedback="train"),
    "heads-greedy": Ablation("posterior means instead of Thompson draws", options={"sigma": 0.0}),
    "heads-importance": Ablation("heads by importance before training, then fixed", options=_FIXED),
    "heads-random": Ablation(
        "heads drawn at random before training, then fixed", options=_FIXED, after_calibration=shuffle_importance
    ),
    "widths-all": Ablation("training rows choose their width by UCB", options={"train_widths": "all"}),
    "exits-mean": Ablation("exits read the plain mean over tokens", options={"pooling": "mean"}),
    "units-dense": Ablation("attention heads alone; the FFN always runs whole", settings={"ffn": "dense"}),
    "distillation-on": Ablation(
        "half of the earlier exits' loss against the row's last exit", options={"distillation": 0.5}
    ),
    "exit-memory-off": Ablation("an exit answers alone, without those before it", options={"exit_memory": 0.0}),
    "search-integrated": Ablation("one decision before layer 1", settings={"search": "integrated"}),
}
"""Switches, each by the setting, option or policy that it turns."""

EPSILON_GREEDY = Ablation("epsilon-greedy instead of optimism", policy=EpsilonTree)


def variant(name: str) -> Ablation:
    """The switch called `name`; "" is the method as it is."""
    return {"": Ablation("as it is"), "epsilon-greedy": EPSILON_GREEDY}.get(name) or ABLATIONS[name]


def install(model: DHTForSequenceClassification, name: str) -> None:
    """Gives the model the policy of the variant `name`, with the state of the one it has."""
    policy = variant(name).policy
    if policy is not None:
        old = model.policy
        model.policy = policy(model.config).to(model.device)
        model.policy.load_state_dict(old.state_dict())
