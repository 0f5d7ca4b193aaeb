"""Fits the exit before the first layer: a convex problem, solved before training on all training rows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .hf.modeling import DHTForSequenceClassification
from .load import by_length
from .measure import Batch
from .model.lexical import LexicalExit
from .task import Task

PAIRS = 2**17
"""Buckets for pairs of tokens."""
CLASSES = 32
"""Most classes that get such an exit: its table has a column for each."""
STRENGTH = 16.0
"""Inverse of the penalty on squared weights, in rows (the C of a linear classifier)."""
SHARED = 0.5
"""Length of the embeddings beside a token's own feature, which is 1: how much tokens that are alike share."""
STEPS = 60
"""Of L-BFGS, at most."""
SCALES = 2.0 ** (torch.arange(-12, 13) / 4)
"""What the logits may be multiplied by to be right as often as they are sure."""
ROWS = 256
"""Rows of a batch that are looked up at once."""
MOST_ROWS = 200_000
"""Rows that are fitted to, at most: all of them are held in memory."""


def worded(
    model: DHTForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    held_out: Sequence[Batch],
) -> float:
    """Fits the lexical exit of a model, if it has one, to tokenised training rows; returns the FLOPs spent."""
    if model.encoder.lexical is None:
        return 0.0
    some = random.Random(0).sample(rows, min(len(rows), MOST_ROWS))
    batches, _ = by_length(tokenizer, some, ROWS)
    moved = ({key: value.to(model.device) for key, value in batch.items()} for batch in batches)
    words = cast(Tensor, model.encoder.embeddings.words.weight)
    return fit_lexical(model.encoder.lexical, words, moved, held_out, model.task)


def fit_lexical(
    exit_: LexicalExit, embeddings: Tensor, batches: Iterable[Batch], held_out: Iterable[Batch], task: Task
) -> float:
    """Fits the table to training rows, then the scale of its logits to held-out ones, in place; returns the FLOPs.

    A token's weights are its own and a linear function of its embedding, so that rare words, and words that no row has,
    say what words like them say. Both come to one table.

    Args:
        embeddings: float [V, E], the encoder's.
        batches, held_out: inputs with `labels`, on the exit's device.
        task: says what the loss of a row is.
    """
    words = embeddings.detach().float()
    words = words - words.mean(0)
    words = SHARED * words / words.norm(dim=1).mean().clamp_min(1e-6)
    seen, share, starts, labels = _flat(exit_, batches)
    last = exit_.vocabulary - 1
    told = F.embedding_bag(
        seen.clamp_max(last), words, starts, per_sample_weights=share * (seen <= last), mode="sum"
    )  # [n, E]
    weight = torch.zeros_like(exit_.weight, dtype=torch.float32, requires_grad=True)
    shared = weight.new_zeros(words.shape[1], weight.shape[1], requires_grad=True)
    bias = torch.zeros_like(exit_.bias, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, shared, bias], max_iter=STEPS, line_search_fn="strong_wolfe")
    passes = 0

    def loss() -> Tensor:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        with torch.enable_grad():
            logits = F.embedding_bag(seen, weight, starts, per_sample_weights=share, mode="sum") + told @ shared + bias
            penalty = (weight.square().sum() + shared.square().sum()) / (2 * STRENGTH * len(labels))
            total = task.losses(logits, labels).mean() + penalty
            total.backward()
        return total.detach()

    optimizer.step(loss)
    with torch.no_grad():
        exit_.weight.copy_(weight)
        exit_.weight[: exit_.vocabulary].add_(words @ shared)
        exit_.bias.copy_(bias)
        rows = [(exit_(b["input_ids"], b["attention_mask"]), b["labels"]) for b in held_out]
        logits, answers = (torch.cat(column) for column in zip(*rows, strict=True))
        losses = torch.stack([task.losses(scale * logits, answers).mean() for scale in SCALES.to(logits.device)])
        scale = SCALES[int(losses.argmin())].to(logits.device)
        exit_.weight.mul_(scale)
        exit_.bias.mul_(scale)
    each: float = 3 * 2.0 * weight.shape[1] * (len(seen) + told.numel())
    total: float = each * passes + 2.0 * words.shape[1] * (len(seen) + shared.shape[1] * len(words))
    return total


def _flat(exit_: LexicalExit, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What all rows have, end to end: rows of the table, what each counts, where each row starts; and the labels."""
    parts = []
    for batch in batches:
        seen, share = exit_.features(batch["input_ids"], batch["attention_mask"])
        counts = share > 0
        parts.append((seen[counts], share[counts], counts.sum(-1), batch["labels"]))
    seen, share, sizes, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return seen, share, sizes.cumsum(0) - sizes, labels
