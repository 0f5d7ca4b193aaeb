"""One encoder block whose weights are stored head unit by head unit, so that a subset runs as a smaller dense block.

Unit h owns the query, key and value rows of attention head h, its columns of the output projection and, when units are
coupled, M/H neurons of the FFN (of a gated one, their rows in both halves). A set of k units is k contiguous slabs of
each weight: the group runs at the speed of a dense block of k heads, and what is left out is not computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.activations import ACT2FN

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
        self.activation = ACT2FN[activation]
        self._slices: dict[tuple[int, ...], tuple[tuple[int, ...], tuple[Tensor, ...]]] = {}
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
        self, rows: Packed, units: Tensor | None = None, bias: Tensor | None = None, tap: GateTap | None = None
    ) -> Tensor:
        """Hidden states after the block, [S, D].

        Args:
            rows: the packed rows of one group.
            units: int64 [k], the head units to run; None = all.
            bias: [1, H, T', T'], added to the attention logits (T' at least the longest row), or None.
            tap: receives gate gradients during backward.
        """
        hidden = rows.hidden
        qkv_weight, qkv_bias, out_weight, up_weight, up_bias, down_weight = self._sliced(units)
        source = self.attention_norm(hidden) if self.pre_norm else hidden
        mixed = self._attend(
            rows, source, qkv_weight, qkv_bias, bias if units is None or bias is None else bias[:, units]
        )
        self._listen(tap, "attention", mixed, qkv_weight.shape[0])
        hidden = hidden + self._drop(torch.addmm(self.out_bias, mixed, out_weight.flatten(0, 1)))
        if not self.pre_norm:
            hidden = self.attention_norm(hidden)
        source = self.ffn_norm(hidden) if self.pre_norm else hidden
        inner = F.linear(source, up_weight.flatten(0, -2), up_bias.flatten())
        if self.gated:
            value, gate = inner.unflatten(-1, up_bias.shape).unbind(2)
            inner = (self.activation(value) * gate).flatten(1)
        else:
            inner = self.activation(inner)
        if self.coupled:
            self._listen(tap, "ffn", inner, up_weight.shape[0])
        hidden = hidden + self._drop(torch.addmm(self.down_bias, inner, down_weight.flatten(0, 1)))
        return hidden if self.pre_norm else self.ffn_norm(hidden)

    def _attend(self, rows: Packed, source: Tensor, weight: Tensor, weight_bias: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of the chosen heads, [S, k * size]: packed to padded and back around one fused kernel."""
        count, longest = rows.lengths.numel(), rows.max_length
        heads, _, size, _ = weight.shape
        qkv = F.linear(source, weight.flatten(0, 2), weight_bias.flatten())
        if not rows.equal:
            padded = qkv.new_zeros(count * longest, qkv.shape[-1])
            qkv = padded.index_copy(0, rows.slot, qkv)
        query, key, value = qkv.view(count, longest, heads, 3, size).permute(3, 0, 2, 1, 4).unbind(0)
        if self.rotary is not None:
            query, key = rotate(query, key, rows, self.rotary)
        mask = rows.mask if self.window is None else rows.near(self.window)
        if bias is not None:
            bias = bias[..., :longest, :longest].to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.attention_dropout if self.training else 0.0
        )
        mixed = mixed.transpose(1, 2).reshape(count * longest, heads * size)
        return mixed if rows.equal else mixed.index_select(0, rows.slot)

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout, self.training) if self.dropout and self.training else hidden

    def _sliced(self, units: Tensor | None) -> tuple[Tensor, ...]:
        """The weights of `units`; without gradients the copies are kept until a weight changes."""
        ffn = (self.up_weight, self.up_bias, self.down_weight)
        whole = (self.qkv_weight, self.qkv_bias, self.out_weight, *ffn)
        if units is None:
            return whole
        chosen = whole if self.coupled else whole[:3]
        if torch.is_grad_enabled():
            sliced = tuple(weight.index_select(0, units) for weight in chosen)
        else:
            key = tuple(units.tolist())
            version = (_STEPS[0], *(x for w in chosen for x in (w.data_ptr(), w._version)))
            known = self._slices.get(key)
            if known is None or known[0] != version:
                if len(self._slices) >= 64:
                    self._slices.clear()
                self._slices[key] = (version, tuple(weight.index_select(0, units) for weight in chosen))
            sliced = self._slices[key][1]
        return sliced if self.coupled else (*sliced, *ffn)

    @staticmethod
    def _listen(tap: GateTap | None, part: str, activation: Tensor, units: int) -> None:
        if tap is None or not activation.requires_grad:
            return
        kept = activation.detach()
        activation.register_hook(lambda grad: tap(part, (grad * kept).unflatten(-1, (units, -1))))
