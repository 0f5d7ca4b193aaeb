"""Layer dropout: training that leaves whole layers out, at random or more and more. What is left out is not run."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..hf.modeling import DHTForSequenceClassification
from ..plan import Account, Exit, Ran, Trace

FINAL_KEEP = 0.5
"""Theta bar of progressive layer dropping, the value of its paper; more where the budget allows more."""

SPEED = 100.0
"""Gamma times the number of steps, as in its paper: theta is down after a few hundredths of the training."""

Keep = Callable[[float, torch.Generator], list[int]]
"""Progress in [0, 1] and a generator -> the layers that a batch runs, from 0, in order."""


def random_layers(layers: int, depth: float) -> Keep:
    """Random layers, `depth` of them in the mean (its floor or its ceiling in a batch), at least one.

    Source: LayerDrop (Fan et al. 2020, arXiv 1909.11556), with the number of layers drawn instead of each layer, so
    that the mean is met exactly.
    """

    def keep(progress: float, generator: torch.Generator) -> list[int]:
        whole = math.floor(depth)
        more = float(torch.rand(1, generator=generator)) < depth - whole
        count = min(layers, max(1, whole + more))
        return sorted(torch.randperm(layers, generator=generator)[:count].tolist())

    return keep


def progressive_layers(layers: int, theta: float) -> Keep:
    """Layer l of L stays with probability 1 - l/L (1 - theta(t)), theta(t) = (1 - theta) exp(-SPEED t) + theta.

    Source: progressive layer dropping (Zhang & He 2020, arXiv 2010.13369); whole layers instead of sub-layers, and no
    rescaling of what stays (the encoders here normalise after each residual sum).
    """

    def keep(progress: float, generator: torch.Generator) -> list[int]:
        now = (1 - theta) * math.exp(-SPEED * progress) + theta
        draws = torch.rand(layers, generator=generator).tolist()
        kept = [layer for layer in range(layers) if draws[layer] < 1 - (layer + 1) / layers * (1 - now)]
        return kept or [0]

    return keep


def progressive_cost(layers: int, theta: float) -> float:
    """Mean share of the layers that progressive dropping runs over a training.

    >>> round(progressive_cost(6, 1.0), 6), 0.7 < progressive_cost(6, 0.5) < 0.72
    (1.0, True)
    """
    mean = (1 - theta) * (1 - math.exp(-SPEED)) / SPEED + theta
    return 1 - (layers + 1) / (2 * layers) * (1 - mean)


def progressive_theta(layers: int, budget: float) -> float:
    """Theta at which the cost is `budget`, not below `FINAL_KEEP`: what is left is saved by fewer steps."""
    low, high = FINAL_KEEP, 1.0
    if progressive_cost(layers, low) >= budget:
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if progressive_cost(layers, middle) < budget else (low, middle)
    return (low + high) / 2


def run_layers(model: DHTForSequenceClassification, inputs: dict[str, Tensor], layers: list[int]) -> Trace:
    """A trace of `layers` alone, all units, with the last exit's logits; the other layers are not executed."""
    encoder, cost = model.encoder, model.encoder.cost
    rows = encoder.embeddings(inputs["input_ids"], inputs["attention_mask"], inputs.get("token_type_ids"))
    bias = encoder.position_bias(rows.max_length) if encoder.position_bias is not None else None
    account, every = Account(cost, rows.lengths), torch.ones(cost.heads, dtype=torch.bool, device=rows.lengths.device)
    for layer in layers:
        account.ran.append(Ran(layer, rows.rows, rows.lengths, [(every, cost.heads, len(rows.rows))]))
        rows = rows.with_hidden(encoder.blocks[layer](rows, bias=bias))
    account.left.append((rows.rows, rows.lengths, encoder.attends(cost.layers)))
    logits = encoder.exit(cost.layers, rows)
    return Trace(account, exits=[Exit(cost.layers, rows.rows, logits)], logits=logits)
