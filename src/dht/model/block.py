"""One encoder block whose weights are stored head unit by head unit, so that a subset runs as a smaller dense block.

Unit h owns the query, key and value rows of attention head h, its columns of the output projection and, when units are
coupled, M/H neurons of the FFN (of a gated one, their rows in both halves). A set of k units is k contiguous slabs of
each weight: the group runs at the speed of a dense block of k heads, and what is left out is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import DHTError
from .fused import fuses, sum_and_norm
from .linear import activated, dropout, joined, linear
from .packed import Packed
from .rotary import angles, rotate
from .side_by_side import shares, side_by_side
from .slices import DOWN, OUT, QKV, QKV_BIAS, UP, UP_BIAS, Given, Kept, Slices, Units, index_of

GateTap = Callable[[str, Tensor], None]
"""Called in backward with "attention" or "ffn" and activation * gradient, [S, k, size]: summed over a row's tokens and
the last axis it is d loss / d gate of a gate fixed at 1 on that unit's output."""

VARIANTS = 64
"""Compiled variants of a block that are allowed before Python takes over."""

STEPWISE = 256
"""Tokens up to which bfloat16 attends step by step on a CPU where gradients are wanted (decision 19)."""


class Group(NamedTuple):
    """Consecutive rows that run the same units (None = all); `tap` receives their gate gradients during backward."""

    units: Units | None
    rows: int
    tap: GateTap | None = None


class _Listen(torch.autograd.Function):
    """The identity; in backward the tap gets activation * gradient.

    The activation is saved as autograd saves it, not held by a hook: gradient checkpointing can drop and recompute it.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, tap: GateTap, part: str, units: int) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.tap, ctx.part, ctx.units = tap, part, units
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (activation,) = ctx.saved_tensors
        ctx.tap(ctx.part, (grads[0] * activation).unflatten(-1, (ctx.units, -1)))
        return grads[0], None, None, None


_listened = torch.compiler.disable(_Listen.apply)


class Block(GradientCheckpointingLayer):
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
        self._kept = Kept()
        self._compiled: Callable[..., Tensor] | None = None
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
        slices = Slices(self, lasting)
        if self._compiled is not None:
            return self._run_compiled(rows, groups, slices, bias)
        # Kept slices and what belongs to a graph are for one thread; with random draws, shares would take turns.
        apart = len(groups) > 1 and not (slices.lasting or slices.passing or self.training)
        if apart and rows.hidden.device.type == "cpu":
            tokens = rows.tokens_of([group.rows for group in groups])
            work = [count * (1 + slices.heads(group.units)) for count, group in zip(tokens, groups, strict=True)]
            counts = shares(work, sum(tokens))
            if len(counts) > 1:
                return self._run_side_by_side(rows, groups, slices, bias, counts)
        return self._run(rows, groups, slices, bias)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of every module, for any number of tokens and head units; choosing the weights is left to Python.

        Groups then run one by one. One row or unit is a case of its own to the compiler, as are no padding, no
        gradients, and every mix of these: more variants than it allows by default. A copy of the block is not compiled,
        as a copy of no module is.

        Raises:
            DHTError: the weights are in int8.
        """
        if not isinstance(self.qkv_weight, Tensor):
            raise DHTError("compile: the blocks are in int8, allowed: float; compile a model that is not quantised")
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, VARIANTS)
        self._compiled = torch.compile(self._run_given, *args, **{"dynamic": True} | kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """As of every module; what belongs to this very block, compiled code and slices of its weights, is no part."""
        return {**super().__getstate__(), "_compiled": None, "_kept": Kept()}

    def _run_compiled(self, rows: Packed, groups: Sequence[Group], slices: Slices, bias: Tensor | None) -> Tensor:
        assert self._compiled is not None
        outputs = []
        for group, part in zip(groups, rows.split([group.rows for group in groups]), strict=True):
            part.lay_out(self.window)
            if self.rotary is not None:
                angles(part, self.qkv_weight.shape[2], self.rotary)
            weights = tuple(slices.units_of(place, group.units) for place in range(len(slices.stored)))
            shift = None if bias is None else self._bias_of(bias, [group])
            outputs.append(self._compiled(part, weights, shift, group.tap))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _run_side_by_side(
        self, rows: Packed, groups: Sequence[Group], slices: Slices, bias: Tensor | None, counts: list[int]
    ) -> Tensor:
        """As `_run`, in shares of `counts` groups: no row needs to know of those in other shares."""
        rest = iter(groups)
        parts = [list(islice(rest, count)) for count in counts]
        layouts = rows.split([sum(group.rows for group in part) for part in parts])
        return side_by_side([
            partial(self._run, layout, part, slices.again(), bias) for layout, part in zip(layouts, parts, strict=True)
        ])  # fmt: skip

    def _run_given(self, rows: Packed, weights: tuple[Tensor, ...], bias: Tensor | None, tap: GateTap | None) -> Tensor:
        """One group on weights that are sliced already: tensors in, tensors out."""
        return self._run(rows, (Group(None, rows.lengths.numel(), tap),), Given(weights), bias)

    def _run(self, rows: Packed, groups: Sequence[Group], slices: Slices | Given, bias: Tensor | None) -> Tensor:
        tokens = rows.tokens_of([group.rows for group in groups])
        hidden = rows.hidden
        source = self.attention_norm(hidden) if self.pre_norm else hidden
        mixed = self._attend(rows, source, groups, tokens, slices, bias)
        projected = (
            (self._listen(group, "attention", part, slices), slices.of(OUT, group.units).t(), self.out_bias)
            for group, part in zip(groups, mixed, strict=True)
        )
        hidden = self._sum(hidden, joined(projected, tokens), self.attention_norm)
        source = self.ffn_norm(hidden) if self.pre_norm else hidden
        narrowed = (
            (self._widen(part, group, slices), slices.of(DOWN, group.units).t(), self.down_bias)
            for group, part in zip(groups, _parts(source, tokens), strict=True)
        )
        return self._sum(hidden, joined(narrowed, tokens), self.ffn_norm)

    def _widen(self, source: Tensor, group: Group, slices: Slices | Given) -> Tensor:
        """The FFN's inner activations of one group, [S, k * M/H]."""
        weight, bias = slices.of(UP, group.units), slices.of(UP_BIAS, group.units)
        if self.gated:
            both = linear(source, weight, bias)
            value, gate = both.unflatten(-1, (-1, 2, self.up_weight.shape[2])).unbind(2)
            inner: Tensor = self.activation(value) * gate
            inner = inner.flatten(1)
        else:
            inner = activated(source, weight, bias, self._activation, self.activation)
        return self._listen(group, "ffn", inner, slices) if self.coupled else inner

    def _attend(
        self,
        rows: Packed,
        source: Tensor,
        groups: Sequence[Group],
        tokens: list[int],
        slices: Slices | Given,
        bias: Tensor | None,
    ) -> list[Tensor]:
        """Attention of each group's heads, [S, k * size]; neighbours of the same number of heads in one call."""
        parts = _parts(source, tokens)
        bands = [[0]]
        if len(groups) > 1:
            bands = [list(band) for _, band in groupby(range(len(groups)), lambda i: slices.heads(groups[i].units))]
        layouts = rows.split([sum(groups[i].rows for i in band) for band in bands])
        mixed: list[Tensor] = []
        for band, layout in zip(bands, layouts, strict=True):
            counts, own = [tokens[i] for i in band], {i: groups[i].units for i in band}
            qkv = joined(((parts[i], slices.of(QKV, u), slices.of(QKV_BIAS, u)) for i, u in own.items()), counts)
            shift = None if bias is None else self._bias_of(bias, [groups[i] for i in band])
            mixed += _parts(self._mix(layout, qkv, slices.heads(own[band[0]]), shift), counts)
        return mixed

    @staticmethod
    def _bias_of(bias: Tensor, groups: list[Group]) -> Tensor:
        """The bias of the heads that run: [1, k, T', T'] of one group, [R, k, T', T'] of several."""
        if len(groups) == 1:
            return bias if groups[0].units is None else bias[:, index_of(groups[0].units, bias.device)]
        heads = [list(group.units or range(bias.shape[1])) for group in groups for _ in range(group.rows)]
        return bias[0, torch.tensor(heads, device=bias.device)]

    def _mix(self, rows: Packed, qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
        """[S, heads * size] of [S, heads * 3 * size]: packed to padded and back around one fused kernel."""
        count, longest = rows.lengths.numel(), rows.max_length
        if bias is None and self._runs_packed(rows, qkv):
            query, key, value = qkv.view(len(qkv), heads, 3, -1).unbind(2)
            packed: Tensor = varlen_attn(query, key, value, rows.ends, rows.ends, longest, longest)  # type: ignore[assignment]
            return packed.flatten(1)
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
        drops = self.attention_dropout if self.training else 0.0
        if query.device.type == "cpu" and (drops or _backward_is_slow(query)):
            mixed = _attend_step_by_step(query, key, value, mask, drops)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, drops)
        mixed = mixed.transpose(1, 2).reshape(count * longest, heads * size)
        return mixed if rows.equal else mixed.index_select(0, rows.slot)

    def _runs_packed(self, rows: Packed, qkv: Tensor) -> bool:
        """True if rows of different lengths attend as they lie, without padding: serving on a GPU in half precision."""
        serves = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        plain = serves and self.rotary is None and self.window is None
        fits = qkv.dtype in (torch.bfloat16, torch.float16) and self.qkv_weight.shape[2] % 8 == 0
        return qkv.is_cuda and plain and fits and not rows.equal

    def _sum(self, hidden: Tensor, product: Tensor, norm: nn.LayerNorm | nn.Identity) -> Tensor:
        """The residual sum, normed if the norm comes after; in the product's memory if no gradient needs it."""
        drops = bool(self.dropout) and self.training
        if not (self.pre_norm or drops) and fuses(hidden, norm):
            return sum_and_norm(hidden, product, cast(nn.LayerNorm, norm))
        if drops:
            product = dropout(product, self.dropout)
        in_place = not torch.is_grad_enabled() and product.dtype == hidden.dtype
        total = product.add_(hidden) if in_place else hidden + product
        normed: Tensor = total if self.pre_norm else norm(total)
        return normed

    def _listen(self, group: Group, part: str, activation: Tensor, slices: Slices | Given) -> Tensor:
        if group.tap is None or not activation.requires_grad:
            return activation
        listened: Tensor = _listened(activation, group.tap, part, slices.heads(group.units))
        return listened


def _parts(tokens: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return tokens.split(counts) if len(counts) > 1 else (tokens,)


def _backward_is_slow(query: Tensor) -> bool:
    """True where the fused kernel's backward on a CPU takes longer than attention step by step (decision 19)."""
    return query.requires_grad and query.dtype == torch.bfloat16 and query.shape[2] <= STEPWISE


def _attend_step_by_step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, drops: float) -> Tensor:
    """Attention [R, k, T, size] from single operations, which on a CPU also drop out faster than torch's own way.

    Args:
        mask: bool, False = left out, or a number that is added to the score; broadcasts to [R, k, T, T].
    """
    scores = query * query.shape[-1] ** -0.5 @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    return (dropout(weights, drops) if drops else weights).to(value.dtype) @ value
