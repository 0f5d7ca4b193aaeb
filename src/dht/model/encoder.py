"""The encoder's modules: embeddings that produce packed rows, blocks, relative position bias, one exit head a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.activations import ACT2FN

from ..cost import CostModel
from .block import Block
from .lexical import LexicalExit
from .linear import Dropout
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
    """Word and (where the family has them) position and token type embeddings of the real tokens only.

    Args:
        vocab, positions, types, width: table sizes; `types` 0 = none, `positions` 0 = none (rotary families).
        size: width of the tables; another one than `width` is projected to it (ELECTRA).
        position_offset: index of the first position (MPNet counts from `pad_token_id` + 1, skipping padding).
        norm: True to normalise the sum (BERT); pre-norm presets leave it to the first block.
        norm_bias: False for a norm without bias.
    """

    def __init__(
        self,
        vocab: int,
        positions: int,
        types: int,
        width: int,
        *,
        size: int | None = None,
        position_offset: int = 0,
        norm: bool = True,
        norm_bias: bool = True,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        size = size or width
        self.words: nn.Module = nn.Embedding(vocab, size)  # replaced by `set_input_embeddings`
        self.positions = nn.Embedding(positions, size) if positions else None
        self.types = nn.Embedding(types, size) if types else None
        self.norm = nn.LayerNorm(size, eps=eps, bias=norm_bias) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.project = nn.Linear(size, width) if size != width else None
        self.position_offset = position_offset

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Packed:
        """Packed embeddings of `input_ids` [B, T] where `attention_mask` [B, T] is 1.

        Raises:
            ValueError: a row has no real token.
        """
        batch, places = input_ids.shape
        keep = attention_mask.bool()
        lengths = keep.sum(-1)
        host_lengths = lengths.cpu()
        shortest, longest = torch.stack(host_lengths.aminmax()).tolist() if batch else (0, 0)
        if batch and not shortest:
            empty = int((host_lengths == 0).nonzero()[0])
            raise ValueError(f"row {empty} of the batch has no real token: its attention_mask is all zero")
        full = shortest == places  # nothing to leave out: no index to work out
        # How many there are is known, so that nobody waits for a count.
        taken = None if full else keep.flatten().nonzero_static(size=int(host_lengths.sum()))[:, 0]

        def real(values: Tensor) -> Tensor:
            return values if taken is None else values.flatten().index_select(0, taken)

        hidden = self.words(real(input_ids))
        added = None if self.positions is None else self.positions(self._position(keep, taken))
        if self.types is not None:
            kind = self.types.weight[0] if token_type_ids is None else self.types(real(token_type_ids))
            added = kind if added is None else added + kind
        if added is not None:
            hidden = hidden + added
        hidden = self.dropout(self.norm(hidden))
        if self.project is not None:
            hidden = self.project(hidden)
        packed = Packed(hidden.flatten(0, 1) if full else hidden, lengths, torch.arange(batch, device=input_ids.device))
        if not lengths.is_cpu:
            packed.knowing(host_lengths=host_lengths, host_rows=torch.arange(batch))
        return packed.knowing(max_length=longest, equal=shortest == longest)

    def _position(self, keep: Tensor, taken: Tensor | None) -> Tensor:
        """int64 [T], the position of every place, if all are `taken` (None); else [S], that of every real token."""
        places = keep.shape[-1]
        if taken is None:
            return torch.arange(self.position_offset, self.position_offset + places, device=keep.device)
        if not self.position_offset:
            return taken % places
        return (keep.cumsum(-1) - 1 + self.position_offset).flatten().index_select(0, taken)


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
    """A classifier on the hidden states of a row: pooling, dense, activation, norm (if any), linear.

    Args:
        width, heads, classes: D, H and C.
        pooling: "attention" (learned queries, one per head, each weighing the tokens of its slice of D; they start at
            zero, which is the mean over tokens), "mean", or "cls" (the first token, as BERT's own head).
        activation: name of the activation in `transformers`.
        bias: False for a dense layer without bias.
        norm: applied after the activation; None = nothing is.
        dropout: probability before the classifier, used in training mode.
        mean, std: what the classifier's output times `std` plus `mean` is in the unit of the labels (regression).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        classes: int,
        *,
        pooling: str = "attention",
        activation: str = "tanh",
        bias: bool = True,
        norm: nn.LayerNorm | None = None,
        dropout: float = 0.0,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.queries = nn.Parameter(torch.zeros(heads, width)) if pooling == "attention" else None
        self.dense = nn.Linear(width, width, bias=bias)
        self.activation = ACT2FN[activation]
        self.norm = norm or nn.Identity()
        self.classifier = nn.Linear(width, classes)
        self.dropout = Dropout(dropout)
        self.unit = None if (mean, std) == (0.0, 1.0) else (float(mean), float(std))

    def pool(self, rows: Packed) -> Tensor:
        """[R, D], what the classifier reads of each row."""
        if self.queries is not None:
            return rows.attended(QUERY_SCALE * (rows.hidden @ self.queries.T))
        return rows.first() if self.pooling == "cls" else rows.mean()

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits [R, C] of `pooled` [R, D]."""
        read = self.norm(self.activation(self.dense(pooled)))
        logits: Tensor = self.classifier(self.dropout(read))
        if self.unit is not None:
            logits = logits.float() * self.unit[1] + self.unit[0]
        return logits


class Map(nn.Linear):
    """A linear map that starts as the identity."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The map becomes the identity."""
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


class EmbeddingHead(ExitHead):
    """The exit of an embedding model: the mean over a row's tokens, mapped.

    Embeddings of different depths can only be compared in one space, that of the last exit.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, 1, pooling="mean")
        self.dense = Map(width, width)
        self.activation = nn.Identity()
        self.classifier = nn.Identity()  # type: ignore[assignment]


class TokenHead(ExitHead):
    """The exit of a tagger: the same classifier on every token of a row, nothing is pooled.

    Args:
        width, classes: D and C.
        projects: True for a dense layer, activation and norm before the classifier, as `ExitHead` has them.
        settings: those of `ExitHead`.
    """

    def __init__(self, width: int, classes: int, *, projects: bool = False, **settings: Any) -> None:
        super().__init__(width, 1, classes, pooling="none", **settings)
        self.projects = projects
        if not projects:  # on every token it would cost a twelfth of a layer
            self.dense = nn.Identity()  # type: ignore[assignment]
            self.activation = self.norm = nn.Identity()

    def pool(self, rows: Packed) -> Tensor:
        """[S, D], the tokens as they are."""
        return rows.hidden


class Encoder(nn.Module):
    """Embeddings, N blocks and N exit heads; what runs for which row is up to `execute` and `reference`.

    Args:
        config: the sizes.
    """

    def __init__(self, config: DHTConfig) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        layers, modern = config.num_hidden_layers, config.norm == "modern"
        norm = partial(nn.LayerNorm, width, eps=eps, bias=config.norm_bias)
        self.embeddings = Embeddings(
            config.vocab_size,
            0 if config.rotary_thetas else config.max_position_embeddings,
            config.type_vocab_size,
            width,
            size=config.embedding_size,
            position_offset=config.position_offset,
            norm=config.norm != "pre",
            norm_bias=config.norm_bias,
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
                gated=config.gated_ffn,
                norm=config.norm,
                attention_norm=not modern or layer > 0,
                attention_bias=config.attention_bias,
                ffn_bias=config.ffn_bias,
                norm_bias=config.norm_bias,
                rotary=config.rotary_thetas[layer] if config.rotary_thetas else None,
                window=config.windows[layer] if config.windows else None,
                eps=eps,
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
            )
            for layer in range(layers)
        )
        self.final_norm = nn.Identity() if config.norm == "post" else norm()
        self.norms_tokens = modern
        self.mixture = config.mixture
        buckets = config.relative_attention_num_buckets
        self.position_bias = RelativePositionBias(buckets, heads) if buckets else None
        self.exits: Stack[ExitHead] = Stack(_exits(config, norm))
        pairs, classes = config.lexical_pairs, len(config.label_names)
        self.lexical = LexicalExit(config.vocab_size, pairs, classes, config.lexical_filters) if pairs else None
        embeds, self.tags = config.head == "embedding", config.head == "token"
        self.cost = CostModel(
            width, heads, config.intermediate_size, layers, 0 if embeds else len(config.label_names),
            config.ffn == "coupled", self.attends(layers), config.gated_ffn, config.embedding_size or width, self.tags,
            config.lexical_filters,
        )  # fmt: skip

    @property
    def sharded(self) -> bool:
        """True if the blocks are shards of FSDP2 (`fully_shard`), whose calls gather them from all ranks."""
        return isinstance(self.blocks[0], FSDPModule)

    def mixture_on(self, device: torch.device) -> Tensor | None:
        """What each exit counts in the answers after layers 1..N, float [N, e], from the first exit that there is."""
        if self.mixture is None:
            return None
        return torch.tensor(self.mixture, device=device)[:, int(self.lexical is None) :]

    def pool(self, layer: int, rows: Packed) -> Tensor:
        """[R, D], what the exit after `layer` in 1..N reads of the rows; of a tagger [S, D]."""
        head = self.exits[layer - 1]
        if self.norms_tokens and head.pooling != "cls":
            return head.pool(rows.with_hidden(self.final_norm(rows.hidden)))
        pooled: Tensor = self.final_norm(head.pool(rows))
        return pooled

    def exit(self, layer: int, rows: Packed) -> Tensor:
        """Logits [R, C] of the exit after `layer` in 1..N; of a tagger [S, C]."""
        logits: Tensor = self.exits[layer - 1](self.pool(layer, rows))
        return logits

    def attends(self, layer: int) -> bool:
        """True if the exit after `layer` in 1..N scores every token, or projects it (see `CostModel.exit`)."""
        head = self.exits[layer - 1]
        return head.projects if isinstance(head, TokenHead) else head.queries is not None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, nothing of ours in `model` drops anything out, in training mode either."""
    parts: list[tuple[nn.Module, str]] = [(m, "p") for m in model.modules() if isinstance(m, Dropout)]
    parts += [(m, name) for m in model.modules() if isinstance(m, Block) for name in ("dropout", "attention_dropout")]
    before = [getattr(*part) for part in parts]
    try:
        for module, name in parts:
            setattr(module, name, 0.0)
        yield
    finally:
        for (module, name), probability in zip(parts, before, strict=True):
            setattr(module, name, probability)


def _exits(config: DHTConfig, norm: Callable[[], nn.LayerNorm]) -> list[ExitHead]:
    """One exit a layer; the last may be another kind of classifier than the others."""
    width, layers = config.hidden_size, config.num_hidden_layers
    if config.head == "embedding":
        return [EmbeddingHead(width) for _ in range(layers)]
    if config.head == "token":
        tagger = partial(TokenHead, width, len(config.label_names), dropout=config.hidden_dropout_prob)
        if not config.last_norm:
            return [tagger() for _ in range(layers)]
        own = tagger(projects=True, activation=config.last_activation, bias=config.last_bias, norm=norm())
        return [*(tagger() for _ in range(layers - 1)), own]
    head = partial(
        ExitHead, width, config.num_attention_heads, len(config.label_names), dropout=config.hidden_dropout_prob,
        mean=config.label_mean, std=config.label_std,
    )  # fmt: skip
    last = head(
        pooling=config.last_pooling or config.pooling,
        activation=config.last_activation,
        bias=config.last_bias,
        norm=norm() if config.last_norm else None,
    )
    return [*(head(pooling=config.pooling) for _ in range(layers - 1)), last]
