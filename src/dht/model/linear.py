"""Float32 matrix products and dropout on CPUs: the same mathematics as torch's defaults, in less time.

torch sends float32 products to MKL. On processors that MKL does not favour, oneDNN, which torch carries too and uses
for bfloat16, takes less than half the time. Which one is faster here is measured once a machine and kept in the cache
folder, so that the same seed gives the same run. Elsewhere (GPU, bfloat16, other builds of torch) torch decides.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .._files import write_json
from ..assets import cache_folder
from ..errors import DHTError

FUSED = {"relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"),
         "gelu_pytorch_tanh": ("gelu", "tanh")}  # fmt: skip
"""Activations that oneDNN applies to a product while it is still in cache: its name and algorithm for each of ours."""
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
MARGIN = 0.85
"""oneDNN is taken where it needs less than this share of MKL's time: a tie should not depend on noise."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x W^T + b, [S, N], with gradients.

    Args:
        x: [S, K].
        weight: [N, K], of any strides.
        bias: [N] or None.
    """
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        product: Tensor = _Linear.apply(x, weight, bias)
        return product
    return _product(_rounded(x), weight, bias)[: len(x)]


def joined(products: Iterable[tuple[Tensor, Tensor, Tensor | None]], counts: list[int]) -> Tensor:
    """The products of several x, weight and bias, end to end, [S, N]; without gradients each is written to its place.

    Args:
        products: of each the arguments of `linear`; a weight is used before the next one is asked for.
        counts: rows of each x.
    """
    if len(counts) == 1 or torch.is_grad_enabled():
        parts = [linear(*each) for each in products]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    places: Sequence[Tensor] = ()
    for i, (x, weight, bias) in enumerate(products):
        if not i:
            product = linear(x, weight, bias)
            whole = product.new_empty(sum(counts), product.shape[1])
            places = whole.split(counts)
            places[0].copy_(product)
        elif bias is not None and _writes(x, weight, whole):
            torch.addmm(bias, x, weight.t(), out=places[i])
        else:
            places[i].copy_(linear(x, weight, bias))
    return whole


def _writes(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """True if torch's default runs and needs no cast: it can then write where it is told to."""
    return (
        isinstance(weight, Tensor)
        and x.dtype == weight.dtype == out.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and not _by_onednn(x, weight)
    )


def activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, name: str, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """activation(x W^T + b), [S, N]; in one pass where no gradient is wanted and oneDNN knows the activation `name`."""
    fuses = name in FUSED and not torch.is_grad_enabled() and _by_onednn(x, weight)
    if not fuses:
        return activation(linear(x, weight, bias))
    return _product(_rounded(x), weight, bias, *FUSED[name])[: len(x)]


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with elements zeroed with probability `p` (to 2^-16) and the others scaled by 1 / (1 - p).

    On a CPU torch draws one number an element, which takes longer than a narrow layer's products; here a 64-bit number
    serves four.
    """
    if p == 1.0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    dropped = round(p * 2**16)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * (keep * (2**16 / (2**16 - dropped))).to(x.dtype)


class _Linear(torch.autograd.Function):
    """A linear layer whose three products, one forward and two backward, all run in oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rounded = _rounded(x)
        ctx.save_for_backward(rounded, weight)
        ctx.biased, ctx.rows = bias is not None, len(x)
        return _product(rounded, weight, bias)[: len(x)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rounded = _rounded(grad)
        return (
            _product(rounded, weight.t())[: ctx.rows] if wants_x else None,
            _towards(weight, rounded, x) if wants_weight else None,
            grad.sum(0) if ctx.biased and wants_bias else None,
        )


def _towards(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `weight`, [N, K], by the way that copies less.

    A product copies its first factor if that is transposed, and autograd a gradient that is not laid out as its weight.
    """
    transposed = weight.stride(0) == 1 and weight.stride(1) != 1
    if transposed and x.numel() <= grad.numel() + weight.numel():
        return _product(x.t(), grad.t()).t()
    return _product(grad.t(), x.t())


class Dropout(nn.Dropout):
    """`nn.Dropout`, drawn by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """[...], of any shape."""
        return dropout(input, self.p) if self.p and self.training else input


def _rounded(x: Tensor) -> Tensor:
    """`x` with rows of zeros up to a round number: oneDNN compiles a kernel for every size that it has not met lately.

    Packed rows have another number of tokens in every batch and layer. Half a millisecond for each product is more than
    a small product takes; a copy with at most a few percent more rows is not. While somebody counts FLOPs nothing is
    added: like the tiles inside a kernel, rounding is no part of the product.
    """
    rows = 0 if torch._C._len_torch_dispatch_stack() else len(x)
    extra = -rows % (8 if rows <= 64 else 32 if rows <= 1024 else 128)
    return F.pad(x, (0, 0, 0, extra)) if extra else x


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", algorithm: str = ""
) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return product


def _count_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Two FLOPs a multiply-add; shapes [S, K] and [N, K]."""
    return 2 * math.prod(x) * weight[0]


if _HAS_ONEDNN:  # torch's `FlopCounterMode` counts no products of oneDNN by itself
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_count_flops)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and prefers_onednn()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


@lru_cache
def prefers_onednn() -> bool:
    """True if oneDNN multiplies float32 matrices faster than MKL on this machine, as measured once and kept.

    The answer is kept in `linear.json` of the cache folder, by processor, torch and number of threads.
    """
    if not _HAS_ONEDNN:
        return False
    kept = cache_folder() / "linear.json"
    machine = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or machine not in known:
        known = (known if isinstance(known, dict) else {}) | {machine: _onednn_over_mkl()}
        with suppress(DHTError):  # a folder that cannot be written to: measured again next time
            write_json(kept, known)
    return bool(known[machine] < MARGIN)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "unknown processor"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


@torch.no_grad()
def _onednn_over_mkl() -> float:
    """Seconds of oneDNN as a share of MKL's, medians of turns on a product of the size of a small encoder's."""
    x, weight = torch.ones(256, 384), torch.ones(1536, 384)
    contenders: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_product, F.linear)
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(12):
        for seconds, multiply in zip(taken, contenders, strict=True):
            started = time.perf_counter()
            multiply(x, weight)
            if turn > 1:  # the first ones warm up
                seconds.append(time.perf_counter() - started)
    return statistics.median(taken[0]) / statistics.median(taken[1])
