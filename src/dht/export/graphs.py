"""The parts of a model as modules whose shapes depend on batch and length alone, which is what a static graph needs.

They run the model's own blocks and exits; only the layout differs: rows keep their padding.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..model.block import Block
from ..model.encoder import Encoder
from ..model.packed import Packed

SLICED = ("qkv_weight", "qkv_bias", "out_weight", "up_weight", "up_bias", "down_weight")
"""Weights of a block that are stored unit by unit; the last three are whole where units carry no FFN neurons."""


class Padded(Packed):
    """Rows with their padding, in the form in which blocks and exit heads take rows.

    Args:
        states: [B, T, D].
        attention_mask: [B, T], 1 at real tokens, wherever they stand.
    """

    def __init__(self, states: Tensor, attention_mask: Tensor) -> None:
        rows = torch.arange(states.shape[0], device=states.device)
        super().__init__(states.flatten(0, 1), attention_mask.sum(-1), rows)
        self.states, self.attention_mask = states, attention_mask

    @property
    def equal(self) -> bool:
        """All rows take T places."""
        return True

    @property
    def max_length(self) -> int:
        """T."""
        return self.attention_mask.shape[1]

    @property
    def mask(self) -> Tensor:
        """Bool [B, 1, 1, T], True at real tokens."""
        return self.attention_mask.bool()[:, None, None, :]

    def near(self, window: int) -> Tensor:
        places = torch.arange(self.max_length, device=self.hidden.device)
        return ((places[:, None] - places).abs() <= window) & self.mask | ~self.mask.mT

    def first(self) -> Tensor:
        place = self.attention_mask.int().argmax(-1)
        return self.states.take_along_dim(place[:, None, None], 1)[:, 0]

    def mean(self) -> Tensor:
        keep = self.attention_mask.to(self.hidden.dtype)[..., None]
        return (self.states * keep).sum(1) / keep.sum(1)

    def attended(self, scores: Tensor) -> Tensor:
        padded = self.padded(scores.float())
        weight = padded.masked_fill(~self.attention_mask.bool()[..., None], -torch.inf).softmax(1)
        tokens = self.states.unflatten(-1, (weight.shape[-1], -1))
        pooled: Tensor = (tokens * weight.to(tokens.dtype)[..., None]).sum(1).flatten(1)
        return pooled

    def with_hidden(self, hidden: Tensor) -> Padded:
        return Padded(self.padded(hidden), self.attention_mask)

    def padded(self, values: Tensor) -> Tensor:
        """[B, T, size] of `values` [B * T, size]; all three sizes given, so that a trace infers none of them."""
        batch, tokens = self.attention_mask.shape
        return values.view(batch, tokens, values.shape[-1])


class EmbeddingsGraph(nn.Module):
    """Embedded tokens, [B, T, D]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.embeddings = encoder.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """[B, T, D] of `input_ids`, `attention_mask` and `token_type_ids`, int64 [B, T] each."""
        emb = self.embeddings
        hidden: Tensor = emb.words(input_ids)
        if emb.positions is not None:
            place = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            if emb.position_offset:
                place = (attention_mask.cumsum(-1) - 1).clamp_min(0) + emb.position_offset
            hidden = hidden + emb.positions(place)
        if emb.types is not None:
            hidden = hidden + (emb.types.weight[0] if token_type_ids is None else emb.types(token_type_ids))
        hidden = emb.norm(hidden)
        return hidden if emb.project is None else emb.project(hidden)


class LayerGraph(nn.Module):
    """One layer with fixed head units.

    Args:
        layer: 1..N.
        units: bool [H], the head units that run; the others' weights are left out of the graph.
        reads: True if the exit after the layer is part of the graph.
    """

    def __init__(self, encoder: Encoder, layer: int, units: Tensor, reads: bool = True) -> None:
        super().__init__()
        self.block = _narrowed(encoder.blocks[layer - 1], units)
        self.position_bias = encoder.position_bias
        self.register_buffer("units", None if bool(units.all()) else units.nonzero()[:, 0])
        self.head = _Exit(encoder, layer) if reads else None

    def forward(self, states: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """States [B, T, D] after the layer; if the graph reads it, also the exit's logits, [B, C] or [B, T, C]."""
        rows = Padded(states, attention_mask)
        bias = None if self.position_bias is None else self.position_bias(rows.max_length)
        if bias is not None and self.units is not None:
            bias = bias[:, self.units]
        rows = rows.with_hidden(self.block(rows, bias=bias))
        return (rows.states,) if self.head is None else (rows.states, self.head(rows))


class PlanGraph(nn.Module):
    """A whole model under one plan: the first layers, each with its head units, and the exit after the last of them.

    Args:
        units: bool [N, H]; a layer without any ends the plan.
    """

    def __init__(self, encoder: Encoder, units: Tensor) -> None:
        super().__init__()
        depth = int(units.any(-1).sum())
        self.embeddings = EmbeddingsGraph(encoder)
        self.layers = nn.ModuleList(LayerGraph(encoder, n + 1, units[n], n + 1 == depth) for n in range(depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits [B, C]; of a tagger [B, T, C], which mean nothing where there is no token."""
        found: tuple[Tensor, ...] = (self.embeddings(input_ids, attention_mask, token_type_ids),)
        for layer in self.layers:
            found = layer(found[0], attention_mask)
        return found[1]


class _Exit(nn.Module):
    """The exit head after a layer, with what the encoder does before it."""

    def __init__(self, encoder: Encoder, layer: int) -> None:
        super().__init__()
        self.layer, self.pool = layer, encoder.pool
        self.head, self.final_norm, self.tags = encoder.exits[layer - 1], encoder.final_norm, encoder.tags

    def forward(self, rows: Padded) -> Tensor:
        logits: Tensor = self.head(self.pool(self.layer, rows))
        return rows.padded(logits) if self.tags else logits


def _narrowed(block: Block, units: Tensor) -> Block:
    """A copy of the block that has no other head units than `units`."""
    small = copy.deepcopy(block)
    if not bool(units.all()):
        for name in SLICED if block.coupled else SLICED[:3]:
            setattr(small, name, nn.Parameter(getattr(block, name).detach()[units]))
        small.heads = int(units.sum())
    return small.eval()
