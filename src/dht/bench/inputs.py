"""The rows that are timed: the data set's own, at its own lengths or joined and cut to one length."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._labels import IGNORED
from ..data import TextData
from ..load import collate, tokenise
from .settings import MIX

Batch = dict[str, Tensor]

TIMED_ROWS = 64
"""Rows timed a cell where batches are smaller than that; p95 at batch 1 needs many, and each takes little."""
SINGLE_ROWS = 12
ODD_LENGTHS = (13, 3, 4, 9, 9, 5, 7)


class Rows:
    """Draws rows from a data set.

    Args:
        data: its test split is used, else validation, else train.
        longest: tokens that the encoder can take.
        seed: of the draw.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: TextData, longest: int, seed: int) -> None:
        split = data.test or data.validation or data.train
        assert split is not None, "a split was asked for"
        self.tokenizer, self.seed, self.longest = tokenizer, seed, longest
        self.rows = tokenise(tokenizer, split, longest)
        random.Random(seed).shuffle(self.rows)
        first = self.rows[0]["input_ids"]
        self.edge = (first[0], first[-1])
        # Real words at every length: the texts' tokens end to end, without what the tokenizer puts around a text; each
        # with its tag, where the model gives tags.
        untagged = [IGNORED] * longest
        pairs = ((row["input_ids"], row.get("tags", untagged)) for row in self.rows)
        self.stream = [both for ids, tags in pairs for both in zip(ids[1:-1], tags[1:], strict=False)]
        self.stream = self.stream or [(first[0], IGNORED)]

    def batches(self, batch: int, tokens: int | str) -> list[Batch]:
        """The batches of one cell: 12 of one row, else about `TIMED_ROWS` rows and at least one batch."""
        wanted = SINGLE_ROWS if batch == 1 else batch * max(1, TIMED_ROWS // batch)
        rows = self._mix(wanted) if tokens == MIX else self.of_lengths([int(tokens)] * wanted)
        return [collate(self.tokenizer, rows[i : i + batch]) for i in range(0, wanted, batch)]

    def odd(self) -> Batch:
        """A small batch of awkward lengths, for the parity check."""
        return collate(self.tokenizer, self.of_lengths([min(length, self.longest) for length in ODD_LENGTHS]))

    def of_lengths(self, lengths: list[int]) -> list[dict[str, Any]]:
        """Rows of exactly these lengths, cut from the running text."""
        rows, at = [], 0
        stream = self.stream * math.ceil((sum(lengths) + 1) / len(self.stream))
        for i, length in enumerate(lengths):
            inner = stream[at : at + length - 2]
            at += length - 2
            row = {"input_ids": [self.edge[0], *(token for token, _ in inner), self.edge[1]]}
            like = self.rows[i % len(self.rows)]
            tags = [IGNORED, *(tag for _, tag in inner), IGNORED]
            rows.append(row | ({"tags": tags} if "tags" in like else {"labels": like["labels"]}))
        return rows

    def _mix(self, count: int) -> list[dict[str, Any]]:
        return (self.rows * math.ceil(count / len(self.rows)))[:count]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return {name: value.to(device) for name, value in batch.items()}
