"""One encoder block whose weights are stored head unit by head unit, so that a subset runs as a smaller dense block.

Unit h owns the query, key and value rows of attention head h, its columns of the output projection and, when units are
coupled, M/H neurons of the FFN (of a gated one, their rows in both halves). A set of k units is k contiguous slabs of
each weight: the group runs at the speed of a dense block of k heads, and what is left out is not computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
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

QKV, QKV_BIAS, OUT, UP, UP_BIAS, DOWN = range(6)
"""Places of a block's weights among those that units own."""

KEPT_SLICES = 384
"""Sliced copies of weights that a block keeps: six for each head set and dtype."""


class Group(NamedTuple):
    """Consecutive rows that run the same units (None = all); `tap` receives their gate gradients during backward."""

    units: Units | None
    rows: int
    tap: GateTap | None = None


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
        self._kept: dict[tuple[int, Units, torch.dtype], Tensor] = {}
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
        self, rows: Packed, groups: Sequence[Group] = (), bias: Tensor | None = None, lasting: bool = False
    ) -> Tensor:
        """Hidden states after the block, [S, D].

        Only the matrix products know of groups; what is the same for all rows (norms, residuals, attention between
        tokens) runs once for all of them.

        Args:
            rows: the packed rows, group by group.
            groups: which units which rows run; none = all units.
            bias: [1, H, T', T'], added to the attention logits (T' at least the longest row), or None.
            lasting: True if these sets of units will be asked for again, and copies of their weights are worth keeping.
        """
        groups = groups or (Group(None, rows.lengths.numel()),)
        tokens = rows.tokens_of([group.rows for group in groups])
        slices = _Slices(self, lasting)
        hidden = rows.hidden
        source = self.attention_norm(hidden) if self.pre_norm else hidden
        mixed = self._attend(rows, source, groups, tokens, slices, bias)
        projected = []
        for group, part in zip(groups, mixed, strict=True):
            self._listen(group, "attention", part)
            projected.append(linear(part, slices.of(OUT, group.units).t(), self.out_bias))
        hidden = hidden + self._drop(_joined(projected))
        if not self.pre_norm:
            hidden = self.attention_norm(hidden)
        source = self.ffn_norm(hidden) if self.pre_norm else hidden
        narrowed = []
        for group, part in zip(groups, _parts(source, tokens), strict=True):
            inner = self._widen(part, group.units, slices)
            if self.coupled:
                self._listen(group, "ffn", inner)
            narrowed.append(linear(inner, slices.of(DOWN, group.units).t(), self.down_bias))
        hidden = hidden + self._drop(_joined(narrowed))
        return hidden if self.pre_norm else self.ffn_norm(hidden)

    def _widen(self, source: Tensor, units: Units | None, slices: _Slices) -> Tensor:
        """The FFN's inner activations of one group, [S, k * M/H]."""
        weight, bias = slices.of(UP, units), slices.of(UP_BIAS, units)
        if not self.gated:
            return activated(source, weight, bias, self._activation, self.activation)
        both = linear(source, weight, bias)
        value, gate = both.unflatten(-1, (-1, 2, self.up_weight.shape[2])).unbind(2)
        inner: Tensor = self.activation(value) * gate
        return inner.flatten(1)

    def _attend(
        self,
        rows: Packed,
        source: Tensor,
        groups: Sequence[Group],
        tokens: list[int],
        slices: _Slices,
        bias: Tensor | None,
    ) -> list[Tensor]:
        """Attention of each group's heads, [S, k * size]; neighbours of the same number of heads in one call."""
        parts = _parts(source, tokens)
        bands = [list(band) for _, band in groupby(range(len(groups)), lambda i: self._heads_of(groups[i]))]
        layouts = rows.split([sum(groups[i].rows for i in band) for band in bands])
        mixed: list[Tensor] = []
        for band, layout in zip(bands, layouts, strict=True):
            qkv = [
                linear(parts[i], slices.of(QKV, groups[i].units), slices.of(QKV_BIAS, groups[i].units)) for i in band
            ]
            shift = None if bias is None else self._bias_of(bias, [groups[i] for i in band])
            whole = self._mix(layout, _joined(qkv), self._heads_of(groups[band[0]]), shift)
            mixed += _parts(whole, [tokens[i] for i in band]) if len(band) > 1 else [whole]
        return mixed

    def _heads_of(self, group: Group) -> int:
        return self.heads if group.units is None else len(group.units)

    @staticmethod
    def _bias_of(bias: Tensor, groups: list[Group]) -> Tensor:
        """The bias of the heads that run: [1, k, T', T'] of one group, [R, k, T', T'] of several."""
        if len(groups) == 1:
            return bias if groups[0].units is None else bias[:, list(groups[0].units)]
        heads = [list(group.units or range(bias.shape[1])) for group in groups for _ in range(group.rows)]
        return bias[0, torch.tensor(heads, device=bias.device)]

    def _mix(self, rows: Packed, qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
        """[S, heads * size] of [S, heads * 3 * size]: packed to padded and back around one fused kernel."""
        count, longest = rows.lengths.numel(), rows.max_length
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
            mixed = self._mix_with_dropout(query, key, value, mask)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(count * longest, heads * size)
        return mixed if rows.equal else mixed.index_select(0, rows.slot)

    def _mix_with_dropout(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The fused kernel on a GPU; on a CPU there is none with dropout, and torch's own way draws slowly."""
        if query.device.type != "cpu":
            return F.scaled_dot_product_attention(query, key, value, mask, self.attention_dropout)
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return dropout(scores.softmax(-1), self.attention_dropout).to(value.dtype) @ value

    def _drop(self, hidden: Tensor) -> Tensor:
        return dropout(hidden, self.dropout) if self.dropout and self.training else hidden

    def _stored(self) -> tuple[Tensor, ...]:
        """The weights as they are or, without gradients, as autocast wants them; casts last until a weight changes."""
        stored: tuple[Tensor, ...]
        stored = (self.qkv_weight, self.qkv_bias, self.out_weight, self.up_weight, self.up_bias, self.down_weight)
        if _keeps_nothing():
            return stored
        version = (_STEPS[0], *(x for weight in stored for x in (weight.data_ptr(), _version(weight))))
        if self._kept_for != version:
            self._kept_for = version
            self._kept.clear()
            self._cast.clear()
        kind = stored[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stored[0].dtype
        if dtype == stored[0].dtype:
            return stored
        if dtype not in self._cast:
            self._cast[dtype] = tuple(weight.to(dtype) for weight in stored)
        return self._cast[dtype]

    def _listen(self, group: Group, part: str, activation: Tensor) -> None:
        tap = group.tap
        if tap is None or not activation.requires_grad:
            return
        kept, units = activation.detach(), self._heads_of(group)
        activation.register_hook(lambda grad: tap(part, (grad * kept).unflatten(-1, (units, -1))))


class _Slices:
    """The matrices of units during one forward of a block.

    With gradients they are sliced from the weights each time. Without, those of lasting sets are kept, and those of
    passing ones live in scratch memory until the next set's are asked for.
    """

    def __init__(self, block: Block, lasting: bool) -> None:
        self.stored, self.lasting = block._stored(), lasting
        self.kept = block._kept
        self.owned = len(self.stored) if block.coupled else UP

    def of(self, place: int, units: Units | None) -> Tensor:
        """The matrix [k * rows of a unit, D], or the bias [k * rows of a unit], at `place`."""
        weight = self.stored[place]
        if units is None or place >= self.owned:
            return _flat(weight, place)
        index = _index(units, weight.device)
        if _keeps_nothing():
            return _flat(weight.index_select(0, index), place)
        if not self.lasting:
            return _flat(_SCRATCH.take(weight, index, place), place)
        key = (place, units, weight.dtype)
        if key not in self.kept:
            if len(self.kept) >= KEPT_SLICES:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = _flat(weight.index_select(0, index), place)
        return self.kept[key]


def _keeps_nothing() -> bool:
    """True where slices belong to a graph: of gradients, of a compiler, of an export."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


@lru_cache(maxsize=4096)
def _index(units: Units, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # backward may hold it
        return torch.tensor(units, device=device)


def _flat(weight: Tensor, place: int) -> Tensor:
    """A unit-major weight as a matrix, or a bias as a vector; nothing is copied."""
    return weight.flatten() if place in (QKV_BIAS, UP_BIAS) else weight.flatten(0, -2)


def _parts(tokens: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return tokens.split(counts) if len(counts) > 1 else (tokens,)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _version(weight: Tensor) -> int:
    """How often `weight` was changed in place, as far as torch counts; inference tensors are not counted."""
    return 0 if weight.is_inference() else weight._version
