"""Filters over neighbouring tokens, as look-ups: the part of the exit before layer 1 that reads word order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 3
"""Neighbouring tokens that a filter sees."""


class Filters(NamedTuple):
    """What reads the tokens' shares: `bias` [F] of the filters; `reader` [2F, C] and `base` [C] of the classifier."""

    bias: Tensor
    reader: Tensor
    base: Tensor

    def pooled(self, shares: Tensor, keep: Tensor) -> Tensor:
        """Maximum and mean of the filters over a row, [B, 2F].

        Args:
            shares: [B, T, WIDTH * F], what each token adds to the filters at its place and at the WIDTH - 1 before it;
                zero where there is no token.
            keep: bool [B, T], where there are tokens.
        """
        shares = shares.unflatten(-1, (WIDTH, -1))
        found = shares[:, :, 0] + self.bias
        for ahead in range(1, WIDTH):
            found[:, : max(0, found.shape[1] - ahead)] += shares[:, ahead:, ahead]
        found = found.relu() * keep[..., None]
        return torch.cat([found.amax(1), found.sum(1) / keep.sum(1, keepdim=True)], 1)

    def read(self, pooled: Tensor) -> Tensor:
        """Logits [B, C]."""
        # No product: autocast would round it, and a single row would wait for its set-up.
        return (pooled[..., None] * self.reader).sum(1) + self.base


class Convolution(nn.Module):
    """A convolution over word embeddings, its largest and its mean value over the row, and a linear classifier.

    The embeddings do not change once it is fitted, so that what a token adds to every filter is a row of a table: a
    look-up and sums for each token, no product. It gets no gradient (`dht.convolution` fits it), hence buffers.

    Args:
        vocabulary: V.
        filters: F.
        classes: C.

    Source: convolutions for sentences as in Kim (arXiv 1408.5882), here with one width and two ways of pooling.
    """

    table: Tensor
    bias: Tensor
    reader: Tensor
    base: Tensor

    def __init__(self, vocabulary: int, filters: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(vocabulary, WIDTH * filters))
        self.register_buffer("bias", torch.zeros(filters))
        self.register_buffer("reader", torch.zeros(2 * filters, classes))
        self.register_buffer("base", torch.zeros(classes))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, float32 [B, C], of rows of tokens [B, T] (1 in the mask at real ones)."""
        keep = attention_mask.bool()
        if len(input_ids) == 1 and input_ids.is_cpu:
            return self._of_one(input_ids[keep])
        shares = F.embedding(input_ids, self.table).float() * keep[..., None]
        filters = Filters(self.bias.float(), self.reader.float(), self.base.float())
        return filters.read(filters.pooled(shares, keep))

    def _of_one(self, tokens: Tensor) -> Tensor:
        """The same for the real tokens of one row, in half as many operations: each costs more to launch than to do."""
        shares = self.table.index_select(0, tokens).float()
        own, *others = shares.split(len(self.bias), 1)
        found = own + self.bias
        for ahead, other in enumerate(others, start=1):
            if len(tokens) > ahead:
                found[:-ahead] += other[ahead:]
        found.relu_()
        pooled = torch.cat([found.amax(0), found.mean(0)])
        return ((pooled[:, None] * self.reader).sum(0) + self.base)[None].float()
