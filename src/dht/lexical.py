"""Fits the exit before the first layer, before training, on all training rows: a convex problem, then its filters."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .convolution import centred, fit_convolution, fitting_cost
from .hf.modeling import DHTForSequenceClassification
from .load import by_length
from .measure import Batch
from .mixture import fitted_weights
from .model.lexical import LexicalExit
from .task import Task

PAIRS = 2**17
"""Buckets for pairs of tokens."""
FILTERS = 64
"""Of the convolution."""
CLASSES = 32
"""Most classes that get such an exit: its table has a column for each."""
STRENGTH = 16.0
"""Inverse of the penalty on squared weights, in rows (the C of a linear classifier)."""
SHARED = 0.5
"""Length of the embeddings beside a token's own feature, which is 1: how much tokens that are alike share."""
STEPS = 60
"""Of L-BFGS, at most."""
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
    moved = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    words = cast(Tensor, model.encoder.embeddings.words.weight)
    return fit_lexical(model.encoder.lexical, words, moved, held_out, model.task)


def words_cost(model: DHTForSequenceClassification, batches: Sequence[Batch]) -> float:
    """FLOPs that `worded` will take, about: those of the filters, from the different tokens of the training batches."""
    if model.encoder.lexical is None:
        return 0.0
    cost, rows = model.encoder.cost, sum(len(batch["input_ids"]) for batch in batches)
    tokens = sum(len(batch["input_ids"].unique()) for batch in batches) * min(1.0, MOST_ROWS / rows)
    return fitting_cost(cost.embedded or cost.width, cost.filters, tokens)


def fit_lexical(
    exit_: LexicalExit, embeddings: Tensor, batches: Sequence[Batch], held_out: Iterable[Batch], task: Task
) -> float:
    """Fits the exit to training rows, then what its parts count to held-out ones, in place; returns the FLOPs.

    Args:
        embeddings: float [V, E], the encoder's.
        batches, held_out: inputs with `labels`, on the exit's device.
        task: says what the loss of a row is.
    """
    spent = _fit_table(exit_, embeddings, batches, task)
    filters = exit_.convolution
    if filters is not None:
        spent += fit_convolution(filters, embeddings, batches, task)
    with torch.no_grad():
        seen, answers = [], []
        for batch in held_out:
            inputs = batch["input_ids"], batch["attention_mask"]
            parts = [exit_.linear(*inputs)] + ([filters(*inputs)] if filters is not None else [])
            seen.append(torch.stack(parts, 1))
            answers.append(batch["labels"])
        logits = torch.cat(seen)
        prior = logits.new_full((logits.shape[1],), 1 / logits.shape[1])
        counts = fitted_weights(logits, torch.cat(answers), prior, task)
        for table in (exit_.weight, exit_.bias):
            table.mul_(counts[0])
        if filters is not None:
            for table in (filters.reader, filters.base):
                table.mul_(counts[1])
    return spent


def _fit_table(exit_: LexicalExit, embeddings: Tensor, batches: Iterable[Batch], task: Task) -> float:
    """Fits the weights of tokens and pairs; returns the FLOPs.

    A token's weights are its own and a linear function of its embedding, so that rare words, and words that no row has,
    say what words like them say. Both come to one table.
    """
    words = centred(embeddings, SHARED)
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
