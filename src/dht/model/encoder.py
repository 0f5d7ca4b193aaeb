"""The encoder's modules: embeddings that produce packed rows, blocks, relative position bias, one exit head a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from ..cost import CostModel
from .block import Block
from .packed import Packed

if TYPE_CHECKING:
    from ..hf.configuration import DHTConfig

M = TypeVar("M", bound=nn.Module)


class Stack(nn.ModuleList, Generic[M]):
    """A `ModuleList` of modules of one class, which type checkers then know; at run time it adds nothing."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...

        @overload
        def __getitem__(self, idx: slice) -> Stack[M]: ...

        @overload
        def __getitem__(self, idx: int) -> M: ...

        def __getitem__(self, idx: int | slice) -> M | Stack[M]: ...


class Embeddings(nn.Module):
    """Word, position and (where the family has them) token type embeddings of the real tokens only.

    Args:
        vocab, positions, types, width: table sizes; `types` 0 = none.
        position_offset: index of the first position (MPNet counts from `pad_token_id` + 1, skipping padding).
        norm: True to normalise the sum (BERT); pre-norm presets leave it to the first block.
    """

    def __init__(
        self,
        vocab: int,
        positions: int,
        types: int,
        width: int,
        *,
        position_offset: int = 0,
        norm: bool = True,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.words: nn.Module = nn.Embedding(vocab, width)  # replaced by `set_input_embeddings`
        self.positions = nn.Embedding(positions, width)
        self.types = nn.Embedding(types, width) if types else None
        self.norm = nn.LayerNorm(width, eps=eps) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.position_offset = position_offset

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Packed:
        """Packed embeddings of `input_ids` [B, T] where `attention_mask` [B, T] is 1.

        Raises:
            ValueError: a row has no real token.
        """
        batch, places = input_ids.shape
        keep = attention_mask.bool()
        lengths = keep.sum(-1)
        rows = torch.arange(batch, device=input_ids.device)
        shortest, longest = torch.stack(lengths.aminmax()).tolist() if batch else (0, 0)
        if batch and not shortest:
            empty = int((lengths == 0).nonzero()[0])
            raise ValueError(f"row {empty} of the batch has no real token: its attention_mask is all zero")
        full = shortest == places
        if full:  # nothing to leave out: no index to work out
            position = torch.arange(self.position_offset, self.position_offset + places, device=input_ids.device)
            position = position.expand_as(input_ids)
        elif self.position_offset:
            position = keep.cumsum(-1)[keep] - 1 + self.position_offset
        else:
            position = torch.arange(places, device=input_ids.device).expand_as(input_ids)[keep]
        hidden = self.words(input_ids if full else input_ids[keep]) + self.positions(position)
        if self.types is not None and token_type_ids is None:
            hidden = hidden + self.types.weight[0]
        elif self.types is not None and token_type_ids is not None:
            hidden = hidden + self.types(token_type_ids if full else token_type_ids[keep])
        hidden = self.dropout(self.norm(hidden))
        packed = Packed(hidden.flatten(0, 1) if full else hidden, lengths, rows)
        return packed._knowing(longest, shortest == longest)

class RelativePositionBias(nn.Module):
    """MPNet's (T5's) bucketed relative position bias, shared by all layers: one scalar per bucket and head."""

    def __init__(self, buckets: int, heads: int, max_distance: int = 128) -> None:
        super().__init__()
        self.values = nn.Embedding(buckets, heads)
        self.buckets, self.max_distance = buckets, max_distance

    def forward(self, length: int) -> Tensor:
        """[1, H, length, length]. Source: T5 (arXiv 1910.10683), bidirectional buckets."""
        places = torch.arange(length, device=self.values.weight.device)
        relative = places[None, :] - places[:, None]
        half = self.buckets // 2
        exact = half // 2
        distance = relative.abs()
        log_scaled = exact + (
            torch.log(distance.clamp_min(1).float() / exact) / math.log(self.max_distance / exact) * (half - exact)
        ).to(torch.long)
        bucket = torch.where(distance < exact, distance, log_scaled.clamp_max(half - 1))
        bucket = bucket + (relative > 0) * half
        values: Tensor = self.values(bucket)
        return values.permute(2, 0, 1).unsqueeze(0)


QUERY_SCALE = 10.0
"""Factor on the scores of the exits' queries: from zero, and at the learning rate of all other weights, they would
hardly move within a fine-tuning run."""


class ExitHead(nn.Module):
    """A classifier on the hidden states of a row: pooling, dense, tanh, linear.

    Args:
        width, heads, classes: D, H and C.
        pooling: "attention" (learned queries, one per head, each weighing the tokens of its slice of D; they start at
            zero, which is the mean over tokens), "mean", or "cls" (the first token, as BERT's own head).
        dropout: probability before the classifier, used in training mode.
    """

    def __init__(
        self, width: int, heads: int, classes: int, *, pooling: str = "attention", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.queries = nn.Parameter(torch.zeros(heads, width)) if pooling == "attention" else None
        self.dense = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)
        self.dropout = nn.Dropout(dropout)

    def pool(self, rows: Packed) -> Tensor:
        """[R, D], what the classifier reads of each row."""
        if self.queries is not None:
            return rows.attended(QUERY_SCALE * (rows.hidden @ self.queries.T))
        return rows.first() if self.pooling == "cls" else rows.mean()

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits [R, C] of `pooled` [R, D]."""
        logits: Tensor = self.classifier(self.dropout(torch.tanh(self.dense(pooled))))
        return logits


class Encoder(nn.Module):
    """Embeddings, N blocks and N exit heads; what runs for which row is up to `execute` and `reference`.

    Args:
        config: the sizes.
    """

    def __init__(self, config: DHTConfig) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        pre_norm = config.norm == "pre"
        self.embeddings = Embeddings(
            config.vocab_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            width,
            position_offset=config.position_offset,
            norm=not pre_norm,
            eps=eps,
            dropout=config.hidden_dropout_prob,
        )
        self.blocks: Stack[Block] = Stack(
            Block(
                width,
                heads,
                config.intermediate_size,
                coupled=config.ffn == "coupled",
                activation=config.hidden_act,
                norm=config.norm,
                eps=eps,
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(width, eps=eps) if pre_norm else nn.Identity()
        buckets = config.relative_attention_num_buckets
        self.position_bias = RelativePositionBias(buckets, heads) if buckets else None
        classes = len(config.label_names)
        poolings = [config.pooling] * (config.num_hidden_layers - 1) + [config.last_pooling or config.pooling]
        self.exits: Stack[ExitHead] = Stack(
            ExitHead(width, heads, classes, pooling=pooling, dropout=config.hidden_dropout_prob) for pooling in poolings
        )
        self.cost = CostModel(
            width, heads, config.intermediate_size, config.num_hidden_layers, classes, config.ffn == "coupled",
            poolings[-1] == "attention",
        )  # fmt: skip

    def pool(self, layer: int, rows: Packed) -> Tensor:
        """[R, D], what the exit after `layer` in 1..N reads of the rows."""
        pooled: Tensor = self.final_norm(self.exits[layer - 1].pool(rows))
        return pooled

    def exit(self, layer: int, rows: Packed) -> Tensor:
        """Logits [R, C] of the exit after `layer` in 1..N."""
        logits: Tensor = self.exits[layer - 1](self.pool(layer, rows))
        return logits

    def exit_cost(self, layer: int, rows: Packed) -> Tensor:
        """FLOPs per row of that exit, float64 [R]."""
        return self.cost.exit(rows.lengths, self.exits[layer - 1].queries is not None)
