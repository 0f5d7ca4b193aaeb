"""The Triton kernel of `fused`; imported only where there is a GPU."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def sum_and_norm_kernel(  # type: ignore[no-untyped-def]
    hidden, product, weight, bias, normed, width, eps, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a token: the residual sum, its mean and variance, and the norm, all in registers."""
    start = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, BLOCK)
    within = place < width
    x = tl.load(hidden + start + place, mask=within, other=0.0).to(tl.float32)
    x += tl.load(product + start + place, mask=within, other=0.0).to(tl.float32)
    centred = tl.where(within, x - tl.sum(x, axis=0) / width, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    y = centred / deviation * tl.load(weight + place, mask=within, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + place, mask=within, other=0.0).to(tl.float32)
    tl.store(normed + start + place, y.to(normed.dtype.element_ty), mask=within)
