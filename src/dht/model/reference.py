"""The ground truth: every row and every head is computed on padded tensors, then multiplied by zero or one.

Slow and plain on purpose. It reads the same parameters as `execute` and shares no code with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..plan import Plan
from .convolution import WIDTH, Convolution
from .encoder import QUERY_SCALE, Encoder
from .lexical import PAIR


def reference(
    encoder: Encoder,
    plan: Plan,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    gates: Tensor | None = None,
    alone: bool = False,
) -> list[Tensor]:
    """Logits [B, C] of every exit 1..N; a row's logits after it has left are those of its frozen hidden state.

    Of a tagger they are [B, T, C], -inf at places without a token.

    Args:
        plan: head units per row and layer, bool [B, N, H].
        gates: [B, N, H], multiplied onto each unit's output; None = ones. Its gradient is the head feedback.
        alone: True if nobody computed the exits before a row's last one. In evaluation mode exits otherwise add up
            (`exit_mixture`).
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    keep = attention_mask.bool()
    batch, length = input_ids.shape
    emb = encoder.embeddings
    place = torch.arange(length, device=input_ids.device).expand(batch, length)
    if emb.position_offset:
        place = (keep.cumsum(-1) - 1).clamp_min(0) + emb.position_offset
    hidden = emb.words(input_ids)
    if emb.positions is not None:
        hidden = hidden + emb.positions(place)
    if emb.types is not None:
        hidden = hidden + emb.types(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
    hidden = emb.norm(hidden)
    if emb.project is not None:
        hidden = emb.project(hidden)
    on = plan.units.to(hidden.dtype) if gates is None else plan.units.to(hidden.dtype) * gates
    exits: list[Tensor] = []
    own: list[Tensor | None] = [lexical_reference(encoder, input_ids, keep)]
    for layer, block in enumerate(encoder.blocks):
        source = block.attention_norm(hidden) if block.pre_norm else hidden
        query, key, value = (
            torch.einsum("btd,hed->bhte", source, block.qkv_weight[:, i]) + block.qkv_bias[None, :, i, None]
            for i in range(3)
        )
        if block.rotary is not None:
            query, key = _turned(query, block.rotary), _turned(key, block.rotary)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if encoder.position_bias is not None:
            scores = scores + encoder.position_bias(length)
        if block.window is not None:
            near = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(-block.window).tril(block.window)
            scores = scores.masked_fill(~near, -1e9)  # finite: a padded place may have nobody near it
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
        mixed = (scores.softmax(-1) @ value) * on[:, layer, :, None, None]
        new = hidden + torch.einsum("bhte,hed->btd", mixed, block.out_weight) + block.out_bias
        if not block.pre_norm:
            new = block.attention_norm(new)
        source = block.ffn_norm(new) if block.pre_norm else new
        if block.gated:
            value, gate = (
                torch.einsum("btd,hfd->bhtf", source, block.up_weight[:, i]) + block.up_bias[None, :, i, None]
                for i in range(2)
            )
            inner = block.activation(value) * gate
        else:
            rows = torch.einsum("btd,hfd->bhtf", source, block.up_weight) + block.up_bias[None, :, None]
            inner = block.activation(rows)
        if block.coupled:
            inner = inner * on[:, layer, :, None, None]
        new = new + torch.einsum("bhtf,hfd->btd", inner, block.down_weight) + block.down_bias
        if not block.pre_norm:
            new = block.ffn_norm(new)
        active = plan.units[:, layer].any(-1)[:, None, None]
        hidden = torch.where(active, new, hidden)
        logits = _exit(encoder, layer, hidden, keep)
        own.append(logits)
        if encoder.mixture is not None and not encoder.training and not alone:
            weights = encoder.mixture[layer][: layer + 2]
            counted = [w * each for w, each in zip(weights, own, strict=True) if each is not None]
            logits = torch.stack(counted).sum(0)
        exits.append(logits)
    return exits


def lexical_reference(encoder: Encoder, input_ids: Tensor, keep: Tensor) -> Tensor | None:
    """Logits [B, C] of the exit before layer 1, row by row; None where there is none.

    Args:
        keep: bool [B, T], where there are tokens.
    """
    lexical = encoder.lexical
    if lexical is None:
        return None
    answers = []
    for ids, real in zip(input_ids.tolist(), keep.tolist(), strict=True):
        seen = {token for token, here in zip(ids, real, strict=True) if here}
        for i in range(1, len(ids)):
            if real[i - 1] and real[i]:
                hashed = (ids[i - 1] * PAIR[0] + ids[i] * PAIR[1]) % lexical.pairs
                seen.add(lexical.vocabulary + hashed)
        logits = lexical.weight[sorted(seen)].sum(0) / math.sqrt(len(seen)) + lexical.bias
        if lexical.convolution is not None:
            logits = logits + convolution_reference(lexical.convolution, ids, real)
        answers.append(logits)
    return torch.stack(answers)


def convolution_reference(convolution: Convolution, ids: list[int], real: list[bool]) -> Tensor:
    """Logits [C] of one row of tokens, filter by filter place."""
    table = convolution.table.unflatten(-1, (WIDTH, -1))
    found = []
    for place in range(len(ids)):
        if real[place]:
            seen = [j for j in range(WIDTH) if place + j < len(ids) and real[place + j]]
            found.append((sum((table[ids[place + j], j] for j in seen), convolution.bias)).relu())
    every = torch.stack(found)
    return torch.cat([every.amax(0), every.mean(0)]) @ convolution.reader + convolution.base


def _turned(states: Tensor, theta: float) -> Tensor:
    """Rotary positions as the rotation of complex numbers, [B, H, T, size]."""
    length, size = states.shape[-2:]
    angle = torch.outer(torch.arange(length), theta ** (-2 * torch.arange(size // 2) / size)).to(states.device)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.complex(states[..., : size // 2], states[..., size // 2 :]) * turn
    return torch.cat([pairs.real, pairs.imag], -1)


def _exit(encoder: Encoder, layer: int, hidden: Tensor, keep: Tensor) -> Tensor:
    head = encoder.exits[layer]
    if encoder.norms_tokens:
        hidden = encoder.final_norm(hidden)
    if head.pooling == "none":
        read = hidden if encoder.norms_tokens else encoder.final_norm(hidden)
        tagged: Tensor = head(read).masked_fill(~keep[..., None], -torch.inf)
        return tagged
    if head.pooling == "cls":
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), keep.int().argmax(-1)]
    elif head.queries is None:
        pooled = (hidden * keep[..., None]).sum(1) / keep.sum(-1, keepdim=True)
    else:
        scores = QUERY_SCALE * torch.einsum("btd,hd->bth", hidden, head.queries)
        weight = scores.masked_fill(~keep[..., None], -torch.inf).softmax(1)
        sliced = hidden.unflatten(-1, (weight.shape[-1], -1))
        pooled = torch.einsum("bth,bthe->bhe", weight, sliced).flatten(1)
    logits: Tensor = head(pooled if encoder.norms_tokens else encoder.final_norm(pooled))
    return logits
