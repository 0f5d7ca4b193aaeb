"""All fixed arms of a model at once: every depth with every width, what each answers and costs for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..hf.modeling import DHTForSequenceClassification
from ..measure import Batch, Outcome, run_policy
from ..policy.base import Policy
from ..policy.baselines import ConfidencePolicy, PriorPolicy

MIXED = 1000
"""Plans in a mixture of two arms: steps of a thousandth."""


@dataclass(frozen=True)
class Arms:
    """Answers and costs of A arms for n rows.

    Attributes:
        shapes: (layers, units) of each arm.
        answers: int64 [n, A]. flops: float64 [n, A]. labels: int64 [n]. dense_flops: float64 [n].
        plans: bool [A, N, H].
    """

    shapes: list[tuple[int, int]]
    answers: Tensor
    flops: Tensor
    labels: Tensor
    dense_flops: Tensor
    plans: Tensor

    @property
    def accuracy(self) -> Tensor:
        """float64 [A]."""
        return (self.answers == self.labels[:, None]).double().mean(0)

    @property
    def cost(self) -> Tensor:
        """float64 [A], FLOPs of each arm as a fraction of dense."""
        return self.flops.sum(0) / self.dense_flops.sum()


def all_arms(model: DHTForSequenceClassification, batches: Sequence[Batch], dtype: torch.dtype) -> Arms:
    """Every depth with every width of the policy, its best units: one full-depth pass a width.

    Its exits add up, as ours do, and it pays for those that it passes. Where there is a lexical exit, leaving at once
    is an arm too.
    """
    layers, cost = model.config.num_hidden_layers, model.encoder.cost
    shapes, answers, flops, plans = [], [], [], []
    lengths = torch.cat([batch["attention_mask"].sum(-1) for batch in batches]).cpu()
    heads = torch.stack([cost.exit(lengths, exit_.queries is not None) for exit_ in model.encoder.exits], 1).cumsum(1)
    first = cost.embedding(lengths)
    if model.encoder.lexical is not None:
        first = first + cost.lexical(lengths)
    for width in model.policy.widths:
        sets = model.policy.sets_of(width)
        outcome = run_policy(model, batches, ConfidencePolicy(sets, 2.0), dtype=dtype)
        shares = cost.layer_shares(sets.sum(-1), round(float(lengths.double().mean())))
        spent = (outcome.flops - first - heads[:, -1])[:, None] * shares.cumsum(0)
        for depth in range(1, layers + 1):
            shapes.append((depth, width))
            answers.append(outcome.exit_logits[:, depth - 1].argmax(-1))
            flops.append(first + spent[:, depth - 1] + heads[:, depth - 1])
            plans.append(sets.cpu() & (torch.arange(layers) < depth)[:, None])
    if outcome.at_once.shape[1]:
        shapes.append((0, 0))
        answers.append(outcome.at_once.argmax(-1))
        flops.append(first)
        plans.append(torch.zeros_like(plans[0]))
    return Arms(
        shapes, torch.stack(answers, 1), torch.stack(flops, 1), outcome.labels, outcome.dense_flops, torch.stack(plans)
    )


def best_fixed(arms: Arms, budget: float) -> tuple[Tensor, dict[str, object]]:
    """The best that can be done at `budget` without looking at the row: int64 [MIXED] arms to deal out, and in words.

    One arm seldom costs exactly the budget, so two arms may be mixed: the pair and share that are most accurate at that
    cost. A single arm is the pair of an arm with itself.

    Args:
        arms: measured on validation.
        budget: fraction of dense FLOPs; below the cheapest arm, that one.
    """
    cost, accuracy = arms.cost, arms.accuracy
    low, high = int(cost.argmin()), int(cost.argmin())
    best, share = -1.0, 0.0
    for i in range(len(arms.shapes)):
        if cost[i] > budget:
            continue
        for j in range(len(arms.shapes)):
            gap = float(cost[j] - cost[i])
            part = min(1.0, float(budget - cost[i]) / gap) if gap > 0 else 0.0
            value = float(accuracy[i] + part * (accuracy[j] - accuracy[i]))
            if value > best:
                best, low, high, share = value, i, j, part
    dealt = torch.full((MIXED,), low)
    dealt[MIXED - round(share * MIXED) :] = high
    words: dict[str, object] = {"arm": list(arms.shapes[low])}
    if share:
        words |= {"dearer_arm": list(arms.shapes[high]), "share_dearer": round(share, 3)}
    return dealt, words


def fixed_policy(arms: Arms, dealt: Tensor, device: torch.device) -> Policy:
    """The policy that deals `dealt` (int64 [MIXED]) to rows by a hash of their tokens."""
    policy = PriorPolicy(arms.plans[dealt].to(device), "hash")
    policy.name = "fixed"
    return policy


def oracle(arms: Arms, own: Outcome) -> Outcome:
    """The cheapest right arm of every row, the learned policy's own plan among them; the cheapest one if none is right.

    It reads the label: an upper bound on what choosing among these arms can give, never a result.

    Args:
        own: what the learned policy did on the same batches.
    """
    answers = torch.cat([arms.answers, own.predictions[:, None]], 1)
    flops = torch.cat([arms.flops, own.flops[:, None]], 1)
    wrong = answers != arms.labels[:, None]
    pick = (flops + wrong * 2 * flops.max()).argmin(-1)[:, None]
    plans = torch.cat([arms.plans.expand(len(pick), *arms.plans.shape), own.units[:, None]], 1)
    units = plans[torch.arange(len(pick)), pick[:, 0]]
    return replace(
        own, predictions=answers.gather(1, pick)[:, 0], flops=flops.gather(1, pick)[:, 0], units=units,
        layers=units.any(-1).sum(-1),
    )  # fmt: skip
