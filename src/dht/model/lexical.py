"""The exit before the first layer: which tokens, which pairs of neighbours, and which phrases a row has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import Convolution

PAIR = (1_000_003, 7_919)
"""Factors of the two tokens in the hash of a pair."""


class LexicalExit(nn.Module):
    """A linear classifier on the set of a row's tokens and of its pairs of neighbouring tokens, hashed; and filters.

    It costs look-ups and sums, no product to speak of: next to nothing beside a layer. Its tables are fitted before
    training (`dht.lexical`) and get no gradient, hence buffers.

    Args:
        vocabulary: V.
        pairs: P, buckets that pairs are hashed into.
        classes: C.
        filters: of a convolution over neighbouring tokens, whose logits are added; 0 = there is none.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, vocabulary: int, pairs: int, classes: int, filters: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.pairs = vocabulary, pairs
        self.register_buffer("weight", torch.zeros(vocabulary + pairs, classes))
        self.register_buffer("bias", torch.zeros(classes))
        self.convolution = Convolution(vocabulary, filters, classes) if filters else None

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table, int64 [B, 2T - 1], and what each counts, float32: 1 / sqrt(n) for the n that a row has.

        What a row has twice counts once; a place that counts 0 names any row of the table.
        """
        keep = attention_mask.bool()
        hashed = (input_ids[:, :-1] * PAIR[0] + input_ids[:, 1:] * PAIR[1]) % self.pairs
        seen = torch.cat([input_ids, self.vocabulary + hashed], 1)
        real = torch.cat([keep, keep[:, :-1] & keep[:, 1:]], 1)
        none = len(self.weight)
        seen = seen.masked_fill(~real, none).sort(-1).values
        counts = seen < none
        counts[:, 1:] &= seen[:, 1:] != seen[:, :-1]
        share = counts.sum(-1, keepdim=True).clamp_min(1).rsqrt()
        return seen.clamp_max(none - 1), counts * share

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, float32 [B, C], of rows of tokens [B, T] (1 in the mask at real ones)."""
        logits = self.linear(input_ids, attention_mask)
        return logits if self.convolution is None else logits + self.convolution(input_ids, attention_mask)

    def linear(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The same without the filters."""
        if len(input_ids) == 1 and input_ids.is_cpu:
            return self._of_one(input_ids[0].tolist(), attention_mask[0].tolist())
        seen, share = self.features(input_ids, attention_mask)
        return F.embedding_bag(seen, self.weight.float(), per_sample_weights=share, mode="sum") + self.bias.float()

    def _of_one(self, ids: list[int], mask: list[int]) -> Tensor:
        """The same for one row in plain numbers: launching the operations would take four times as long."""
        real = [bool(here) for here in mask]
        seen = {token for token, here in zip(ids, real, strict=True) if here}
        for first, second, one, two in zip(ids, ids[1:], real, real[1:], strict=False):
            if one and two:
                seen.add(self.vocabulary + (first * PAIR[0] + second * PAIR[1]) % self.pairs)
        rows = self.weight.index_select(0, torch.tensor(sorted(seen), dtype=torch.long)).float()
        logits: Tensor = rows.sum(0, keepdim=True) / math.sqrt(len(seen)) + self.bias.float()
        return logits
