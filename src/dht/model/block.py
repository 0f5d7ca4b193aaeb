"""One encoder block whose weights are stored head unit by head unit, so that a subset runs as a smaller dense block.

Unit h owns the query, key and value rows of attention head h, its columns of the output projection and, when units are
coupled, M/H neurons of the FFN (of a gated one, their rows in both halves). A set of k units is k contiguous slabs of
each weight: the group runs at the speed of a dense block of k heads, and what is left out is not computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.activations import ACT2FN

from .linear import activated, dropout, linear
from .packed import Packed
from .rotary import rotate

_STEPS = [0]
"""Optimizer steps taken in this process. Fused optimizers change weights without raising their version counter, so kept
slices have to be thrown away by this one too."""


def _count_step(*_: object) -> None:
    _STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)

GateTap = Callable[[str, Tensor], None]
"""Called in backward with "attention" or "ffn" and activation * gradient, [S, k, size]: summed over a row's tokens and
the last axis it is d loss / d gate of a gate fixed at 1 on that unit's output."""


Units = tuple[int, ...]
"""Head units to run, in rising order."""

KEPT_SETS = 64
"""Sliced copies of weights that a block keeps, one per head set and dtype."""


class Weights(NamedTuple):
    """What k units are made of, as plain matrices."""

    qkv: Tensor  # [k * 3 * size, D]
    qkv_bias: Tensor  # [k * 3 * size]
    out: Tensor  # [k * size, D]
    up: Tensor  # [k * M/H, D], of a gated FFN [k * 2 * M/H, D]; of a dense one with all H
    up_bias: Tensor
    down: Tensor  # [k * M/H, D]


class _Scratch(threading.local):
    """Memory for weights that are sliced for one use: writing to it again and again beats asking for new pages."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[object, ...], Tensor] = {}

    def take(self, weight: Tensor, index: Tensor, place: int) -> Tensor:
        """`weight[index]`, valid until the next call with this `place`."""
        key = (place, weight.shape, weight.dtype, weight.device, torch.is_inference_mode_enabled())
        if key not in self.buffers:
            self.buffers[key] = torch.empty_like(weight)
        return torch.index_select(weight, 0, index, out=self.buffers[key][: len(index)])


_SCRATCH = _Scratch()


class Block(nn.Module):
    """Attention and FFN with residual connections and layer norm, after (`post`) or before (`pre`) each part.

    Args:
        width, heads, ffn: D, H and M; H must divide D and M.
        coupled: True if a head unit carries M/H FFN neurons; False if the FFN is one dense part.
        activation: name of the FFN's activation in `transformers`.
        gated: True for activation(up x) * (gate x) in the FFN (GeGLU); `up_weight` then holds both, [H, 2, M/H, D].
        norm: "post" (BERT) or anything else for "pre".
        attention_norm: False if the block gets what is normalised already.
        attention_bias, ffn_bias, norm_bias: False for parts without biases.
        rotary: theta of rotary positions; None = none.
        window: tokens to either side that a token attends to; None = all.
        eps: layer norm epsilon.
        dropout, attention_dropout: probabilities, used in training mode.
    """

    qkv_bias: Tensor
    out_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        *,
        coupled: bool = True,
        activation: str = "gelu",
        gated: bool = False,
        norm: str = "post",
        attention_norm: bool = True,
        attention_bias: bool = True,
        ffn_bias: bool = True,
        norm_bias: bool = True,
        rotary: float | None = None,
        window: int | None = None,
        eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        size, share = width // heads, ffn // heads
        self.heads, self.coupled, self.pre_norm = heads, coupled, norm != "post"
        self.gated, self.rotary, self.window = gated, rotary, window
        up = (heads, 2, share) if gated else (heads, share)
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.qkv_weight = nn.Parameter(torch.empty(heads, 3, size, width))
        self._add_bias("qkv_bias", attention_bias, heads, 3, size)
        self.out_weight = nn.Parameter(torch.empty(heads, size, width))
        self._add_bias("out_bias", attention_bias, width)
        self.up_weight = nn.Parameter(torch.empty(*up, width))
        self._add_bias("up_bias", ffn_bias, *up)
        self.down_weight = nn.Parameter(torch.empty(heads, share, width))
        self._add_bias("down_bias", ffn_bias, width)
        self.attention_norm = nn.LayerNorm(width, eps=eps, bias=norm_bias) if attention_norm else nn.Identity()
        self.ffn_norm = nn.LayerNorm(width, eps=eps, bias=norm_bias)
        self.activation, self._activation = ACT2FN[activation], activation
        self._cast: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self._kept: dict[tuple[Units, torch.dtype], Weights] = {}
        self._kept_for: tuple[int, ...] = ()
        self.reset_parameters()

    def _add_bias(self, name: str, learned: bool, *shape: int) -> None:
        """A bias, or zeros that are not trained where the family has none: one code path, and next to no arithmetic."""
        if learned:
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        else:
            self.register_buffer(name, torch.zeros(shape))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws weights from N(0, std^2) and zeroes biases, as BERT does."""
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, std)

    def forward(
        self,
        rows: Packed,
        units: Units | None = None,
        bias: Tensor | None = None,
        tap: GateTap | None = None,
        lasting: bool = False,
    ) -> Tensor:
        """Hidden states after the block, [S, D].

        Args:
            rows: the packed rows of one group.
            units: the head units to run; None = all.
            bias: [1, H, T', T'], added to the attention logits (T' at least the longest row), or None.
            tap: receives gate gradients during backward.
            lasting: True if `units` will be asked for again, and copies of their weights are worth keeping.
        """
        hidden, count = rows.hidden, self.heads if units is None else len(units)
        weights = self._weights(units, lasting)
        source = self.attention_norm(hidden) if self.pre_norm else hidden
        if bias is not None and units is not None:
            bias = bias[:, list(units)]
        mixed = self._attend(rows, source, weights, count, bias)
        self._listen(tap, "attention", mixed, count)
        hidden = hidden + self._drop(linear(mixed, weights.out.t(), self.out_bias))
        if not self.pre_norm:
            hidden = self.attention_norm(hidden)
        source = self.ffn_norm(hidden) if self.pre_norm else hidden
        if self.gated:
            both = linear(source, weights.up, weights.up_bias)
            value, gate = both.view(len(both), -1, 2, self.up_weight.shape[2]).unbind(2)
            inner = (self.activation(value) * gate).flatten(1)
        else:
            inner = activated(source, weights.up, weights.up_bias, self._activation, self.activation)
        if self.coupled:
            self._listen(tap, "ffn", inner, count)
        hidden = hidden + self._drop(linear(inner, weights.down.t(), self.down_bias))
        return hidden if self.pre_norm else self.ffn_norm(hidden)

    def _attend(self, rows: Packed, source: Tensor, weights: Weights, heads: int, bias: Tensor | None) -> Tensor:
        """Attention of the chosen heads, [S, k * size]: packed to padded and back around one fused kernel."""
        count, longest = rows.lengths.numel(), rows.max_length
        qkv = linear(source, weights.qkv, weights.qkv_bias)
        if not rows.equal:
            padded = qkv.new_zeros(count * longest, qkv.shape[-1])
            qkv = padded.index_copy(0, rows.slot, qkv)
        size = self.qkv_weight.shape[2]
        query, key, value = qkv.view(count, longest, heads, 3, size).permute(3, 0, 2, 1, 4).unbind(0)
        if self.rotary is not None:
            query, key = rotate(query, key, rows, self.rotary)
        mask = rows.mask if self.window is None else rows.near(self.window)
        if bias is not None:
            bias = bias[..., :longest, :longest].to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        if self.training and self.attention_dropout:
            mixed = self._attend_with_dropout(query, key, value, mask)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(count * longest, heads * size)
        return mixed if rows.equal else mixed.index_select(0, rows.slot)

    def _attend_with_dropout(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The fused kernel on a GPU; on a CPU there is none with dropout, and torch's own way draws slowly."""
        if query.device.type != "cpu":
            return F.scaled_dot_product_attention(query, key, value, mask, self.attention_dropout)
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return dropout(scores.softmax(-1), self.attention_dropout).to(value.dtype) @ value

    def _drop(self, hidden: Tensor) -> Tensor:
        return dropout(hidden, self.dropout) if self.dropout and self.training else hidden

    def _weights(self, units: Units | None, lasting: bool = False) -> Weights:
        """The weights of `units`; without gradients, lasting sets and casts are kept until a weight changes."""
        stored: tuple[Tensor, ...]
        stored = (self.qkv_weight, self.qkv_bias, self.out_weight, self.up_weight, self.up_bias, self.down_weight)
        sliced = len(stored) if self.coupled else 3
        device = stored[0].device
        if torch.is_grad_enabled():
            if units is None:
                return _flat(stored)
            index = torch.tensor(units, device=device)
            return _flat((*(weight.index_select(0, index) for weight in stored[:sliced]), *stored[sliced:]))
        cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if cast else stored[0].dtype
        if units is None and dtype == stored[0].dtype:
            return _flat(stored)
        version = (_STEPS[0], *(x for weight in stored for x in (weight.data_ptr(), _version(weight))))
        if self._kept_for != version:
            self._kept_for = version
            self._kept.clear()
            self._cast.clear()
        if units is not None and (units, dtype) in self._kept:
            return self._kept[units, dtype]
        if dtype != stored[0].dtype:
            if dtype not in self._cast:
                self._cast[dtype] = tuple(weight.to(dtype) for weight in stored)
            stored = self._cast[dtype]
        if units is None:
            return _flat(stored)
        index = torch.tensor(units, device=device)
        copies = (
            weight.index_select(0, index) if lasting else _SCRATCH.take(weight, index, place)
            for place, weight in enumerate(stored[:sliced])
        )
        weights = _flat((*copies, *stored[sliced:]))
        if lasting:
            if len(self._kept) >= KEPT_SETS:
                self._kept.pop(next(iter(self._kept)))
            self._kept[units, dtype] = weights
        return weights

    @staticmethod
    def _listen(tap: GateTap | None, part: str, activation: Tensor, units: int) -> None:
        if tap is None or not activation.requires_grad:
            return
        kept = activation.detach()
        activation.register_hook(lambda grad: tap(part, (grad * kept).unflatten(-1, (units, -1))))


def _flat(stored: Sequence[Tensor]) -> Weights:
    """Unit-major weights as matrices: views, nothing is copied."""
    qkv, qkv_bias, out, up, up_bias, down = stored
    up, down = up.flatten(0, -2), down.flatten(0, 1)
    return Weights(qkv.flatten(0, 2), qkv_bias.flatten(), out.flatten(0, 1), up, up_bias.flatten(), down)


def _version(weight: Tensor) -> int:
    """How often `weight` was changed in place, as far as torch counts; inference tensors are not counted."""
    return 0 if weight.is_inference() else weight._version
