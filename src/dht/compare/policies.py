"""Rivals that wrap other policies or models: a policy that reads the wrong row, and two models in a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import CostModel
from ..hf.configuration import DHTConfig
from ..hf.modeling import DHTForSequenceClassification, DHTOutput
from ..model.encoder import Encoder
from ..plan import Decision, Exit, Trace
from ..policy.base import Policy, View
from ..policy.baselines import DensePolicy
from ..policy.learned import LearnedPolicy
from ..task import Task


class ShuffledPolicy(Policy):
    """The learned policy, each row deciding on the context of another active row of its batch.

    Whatever it loses against the policy itself is what looking at the row is worth.

    Args:
        inner: the policy; its price is its own.
        seed: of the permutations. They depend on the batch's tokens too, so that a batch is always shuffled alike.
    """

    name = "shuffled"

    def __init__(self, inner: LearnedPolicy, seed: int = 0) -> None:
        super().__init__()
        self.inner, self.seed = inner, seed
        self.num_features, self.reads_exits = inner.num_features, inner.reads_exits

    def decide(self, view: View) -> Decision:
        if view.layer and not self.inner.reads_exits:
            return self.inner.decide(view)  # decided before layer 1, on another row's context
        mixed = (int(view.input_ids.sum()) * 31 + self.seed) * 64 + view.layer
        generator = torch.Generator().manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)
        order = torch.randperm(view.rows.numel(), generator=generator)
        there = order.to(view.rows.device)
        logits = None if view.logits is None else view.logits[there]
        previous = None if view.previous is None else view.previous[there]
        other = replace(view, packed=view.packed.select(order), logits=logits, previous=previous)
        return self.inner.decide(other)

    def decision_flops(self, layer: int, cost: CostModel) -> float:
        return self.inner.decision_flops(layer, cost)


class Cascade(nn.Module):
    """A small model, then the dense one for the rows that the small one is not sure of.

    It is called as a model is, so that it goes through the same measuring. Its trace holds the FLOPs of both; layers
    and units are those of the model that gave the answer.

    Args:
        small: the first model, run under `policy`.
        big: the second, run densely.
        threshold: rows whose largest probability is above it keep the small model's answer.
    """

    def __init__(
        self, small: DHTForSequenceClassification, policy: Policy, big: DHTForSequenceClassification, threshold: float
    ) -> None:
        super().__init__()
        self.small, self.first, self.big, self.threshold = small, policy, big, threshold
        self.dense = DensePolicy(big.config.num_attention_heads)

    @property
    def config(self) -> DHTConfig:
        """The dense model's: it is what the cascade is compared with."""
        return self.big.config

    @property
    def encoder(self) -> Encoder:
        """The dense model's."""
        return self.big.encoder

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return self.big.device

    @property
    def task(self) -> Task:
        """The dense model's."""
        return self.big.task

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        policy: Policy | None = None,
        **others: Any,
    ) -> DHTOutput:
        """The cascade's answers; with a `policy` the big model's alone under it."""
        if policy is not None:
            dense: DHTOutput = self.big(input_ids, attention_mask, token_type_ids, policy=policy, **others)
            return dense
        trace: Trace = self.small(input_ids, attention_mask, token_type_ids, policy=self.first).trace
        unsure = (trace.logits.float().softmax(-1).amax(-1) <= self.threshold).nonzero()[:, 0]
        if unsure.numel():
            mask = attention_mask[unsure]
            longest = int(mask.sum(-1).max())
            types = None if token_type_ids is None else token_type_ids[unsure, :longest]
            second: Trace = self.big(input_ids[unsure, :longest], mask[:, :longest], types, policy=self.dense).trace
            trace.logits = trace.logits.index_copy(0, unsure, second.logits)
            trace.flops[unsure] += second.flops
            trace.units[unsure] = second.units
            trace.exits.append(Exit(second.units.shape[1], unsure, second.logits))
        return DHTOutput(logits=trace.logits, trace=trace)
