"""Exit heads for a frozen encoder, fitted to what the full model itself answers.

A head of a few hundred rows has to be plain: one query weighs the tokens (in every slice of the width the same), the
result is standardised, softly clipped by the head's tanh, and read by a ridge logistic regression. The full model's
probabilities say more about a row than its one label, and every text has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .measure import Batch
from .model.encoder import QUERY_SCALE, Encoder, ExitHead, Stack
from .model.packed import Packed

RIDGE = 0.1
"""Penalty on query and weights in units of their features' spread; .03 to .3 read the same (docs/experiments.md)."""
STEPS = 25
"""Of L-BFGS; more lead nowhere."""
CLIP = 2.0
"""Spreads at which the tanh starts to bend."""


@torch.no_grad()
def fit_exits(encoder: Encoder, batches: Sequence[Batch], teacher: Tensor, fold: Tensor) -> list[Stack[ExitHead]]:
    """Fits every exit but the last, in place, and returns the exits again for each fold, fitted without its rows.

    The encoder runs once, layer by layer; the hidden states of one layer are held for all rows.

    Args:
        encoder: stays as it is but for the exits, which must pool by attention.
        batches: inputs on the encoder's device.
        teacher: float [n, C], the full model's probabilities of the batches' rows, in order.
        fold: int64 [n], 0..K-1.
    """
    held_out = [copy.deepcopy(encoder.exits) for _ in range(int(fold.max()) + 1)]
    states = [encoder.embeddings(b["input_ids"], b["attention_mask"], b.get("token_type_ids")) for b in batches]
    for layer, block in enumerate(encoder.blocks[:-1]):
        for i, rows in enumerate(states):
            bias = encoder.position_bias(rows.max_length) if encoder.position_bias is not None else None
            states[i] = rows.with_hidden(block(rows, None, bias))
        every = _joined(states)
        if encoder.norms_tokens:
            every = every.with_hidden(encoder.final_norm(every.hidden))
        after = torch.nn.Identity() if encoder.norms_tokens else encoder.final_norm
        for k, exits in enumerate(held_out):
            others = (fold != k).nonzero()[:, 0]
            _fit(exits[layer], every.select(others.cpu()), teacher[others], after)
        _fit(encoder.exits[layer], every, teacher, after)
    return held_out


@contextmanager
def lent(encoder: Encoder, exits: Stack[ExitHead]) -> Iterator[None]:
    """The encoder reads other exits within the block."""
    own = encoder.exits
    encoder.exits = exits
    try:
        yield
    finally:
        encoder.exits = own


def _joined(states: Sequence[Packed]) -> Packed:
    lengths = torch.cat([rows.lengths for rows in states])
    return Packed(torch.cat([rows.hidden for rows in states]), lengths, torch.arange(len(lengths)).to(lengths.device))


def _fit(head: ExitHead, rows: Packed, teacher: Tensor, after: Callable[[Tensor], Tensor]) -> None:
    """Fits one head in place.

    Args:
        teacher: float [R, C].
        after: what the encoder does to the pooled rows before the head reads them.
    """
    assert head.queries is not None, "heads of a frozen encoder pool by attention"
    hidden = rows.hidden.float()
    rows = rows.with_hidden(hidden)
    spread = hidden.std(0).clamp_min(1e-6)
    pooled = after(rows.mean())
    center, scale = pooled.mean(0), CLIP * pooled.std(0).clamp_min(1e-6)
    query = hidden.new_zeros(hidden.shape[1], requires_grad=True)
    weight = hidden.new_zeros(teacher.shape[1], hidden.shape[1], requires_grad=True)
    bias = hidden.new_zeros(teacher.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([query, weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            read = after(rows.attended((hidden @ (query / spread))[:, None]))
            logits = CLIP * torch.tanh((read - center) / scale) @ weight.T + bias
            fit = -(teacher * logits.log_softmax(-1)).sum(-1).mean()
            total: Tensor = fit + RIDGE / 2 * (weight.square().sum() + query.square().sum())
            total.backward()
        return total.detach()

    optimizer.step(loss)
    head.queries.copy_((query / spread / QUERY_SCALE).expand_as(head.queries))
    head.dense.weight.copy_(torch.diag(1 / scale))
    head.dense.bias.copy_(-center / scale)
    head.classifier.weight.copy_(CLIP * weight)
    head.classifier.bias.copy_(bias)
