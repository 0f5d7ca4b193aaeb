"""Fits the filters of the exit before layer 1 in a few passes over the training rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from .measure import Batch
from .model.convolution import WIDTH, Convolution, Filters
from .task import Task

EPOCHS = 5
"""Passes over the training rows; 4 to 8 read alike (docs/experiments.md)."""
ROWS = 64
"""Rows of a step."""
LR = 5e-3
"""Peak learning rate."""
LENGTH = 4.0
"""Mean length of the embeddings that the filters see."""
DROPPED_TOKENS, DROPPED_FILTERS = 0.15, 0.3
"""Shares that a step leaves out."""


def centred(embeddings: Tensor, length: float) -> Tensor:
    """Word embeddings [V, E] around their mean, float32, without gradient, `length` long in the mean."""
    words = embeddings.detach().float()
    words = words - words.mean(0)
    scaled: Tensor = length * words / words.norm(dim=1).mean().clamp_min(1e-6)
    return scaled


def fitting_cost(size: int, filters: int, tokens: float) -> float:
    """FLOPs of `fit_convolution` on embeddings of width `size`, for the different `tokens` of all batches of a pass."""
    return EPOCHS * 4.0 * size * WIDTH * filters * tokens


def fit_convolution(
    convolution: Convolution, embeddings: Tensor, batches: Sequence[Batch], task: Task, seed: int = 0
) -> float:
    """Fits filters and classifier to training rows, in place; returns the FLOPs.

    Args:
        embeddings: float [V, E], the encoder's.
        batches: inputs with `labels`, on the convolution's device, rows of like length together.
        task: says what the loss of a row is.
        seed: of the first filters and of what is left out.
    """
    words = centred(embeddings, LENGTH)
    device, size = words.device, words.shape[1]
    draw = torch.Generator().manual_seed(seed)
    filters, classes = len(convolution.bias), len(convolution.base)

    def drawn(*shape: int) -> Tensor:
        values: Tensor = (torch.randn(*shape, generator=draw) * shape[0] ** -0.5).to(device)
        return values.requires_grad_()

    def kept(share: float, shape: torch.Size) -> Tensor:
        return (torch.rand(shape, generator=draw) >= share).to(device)

    weight = drawn(size, WIDTH * filters)
    found = Filters(torch.zeros(filters, device=device, requires_grad=True), drawn(2 * filters, classes),
                    torch.zeros(classes, device=device, requires_grad=True))  # fmt: skip
    steps = EPOCHS * sum(-(-len(batch["labels"]) // ROWS) for batch in batches)
    optimizer = torch.optim.AdamW([weight, *found], lr=LR, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    order, products = random.Random(seed), 0
    for _ in range(EPOCHS):
        parts = [(b, rows) for b in batches for rows in torch.randperm(len(b["labels"]), generator=draw).split(ROWS)]
        order.shuffle(parts)
        for batch, rows in parts:
            ids, mask, labels = (batch[name][rows.to(device)] for name in ("input_ids", "attention_mask", "labels"))
            keep = mask.bool()
            tokens, place = ids.unique(return_inverse=True)  # what many rows have is worked out once
            with torch.enable_grad():
                shares = F.embedding(place, words[tokens] @ weight)
                shares = shares * (keep & kept(DROPPED_TOKENS, keep.shape))[..., None]
                pooled = found.pooled(shares, keep)
                pooled = pooled * kept(DROPPED_FILTERS, pooled.shape) / (1 - DROPPED_FILTERS)
                task.losses(found.read(pooled), labels).mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            products += 2 * len(tokens) + 3 * place.numel() // size  # the weight's product and its gradient's; sums
    with torch.no_grad():
        convolution.table.copy_(words @ weight)
        for part, value in zip((convolution.bias, convolution.reader, convolution.base), found, strict=True):
            part.copy_(value)
    return 2.0 * weight.numel() * (products + len(words))
