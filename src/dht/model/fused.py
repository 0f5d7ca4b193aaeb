"""Residual sum and layer norm in one pass over a GPU's memory.

Between two matrix products every token is read and written at full width, however few head units a layer runs, and
memory is what that waits for. torch's two kernels read a token twice and write it twice; this one reads and writes it
once. Without gradients only.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


def fuses(hidden: Tensor, norm: nn.Module) -> bool:
    """True if `sum_and_norm` can do it: on a GPU, without gradients, where Triton works."""
    return (
        hidden.is_cuda
        and isinstance(norm, nn.LayerNorm)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()  # nobody counts or records operations
        and _kernel(hidden.device) is not None
    )


def sum_and_norm(hidden: Tensor, product: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(hidden + product), [S, D]: sum and statistics in float32, the result in the wider of the two types.

    Args:
        hidden, product: [S, D], on the same GPU.
        norm: over D.
    """
    hidden, product = hidden.contiguous(), product.contiguous()
    normed = torch.empty_like(hidden, dtype=torch.promote_types(hidden.dtype, product.dtype))
    if not len(hidden):
        return normed
    with torch.cuda.device(hidden.device):
        _launch(_kernel(hidden.device), hidden, product, norm, normed)
    return normed


def _launch(kernel: Any, hidden: Tensor, product: Tensor, norm: nn.LayerNorm, normed: Tensor) -> None:
    width = hidden.shape[1]
    block = 1 << (width - 1).bit_length()
    kernel[(len(hidden),)](
        hidden, product, norm.weight, norm.weight if norm.bias is None else norm.bias, normed, width, norm.eps,
        HAS_BIAS=norm.bias is not None, BLOCK=block, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip


@lru_cache
def _kernel(device: torch.device) -> Any:
    """The compiled kernel, or None where there is no Triton or it finds no C compiler, which is told once."""
    try:
        from .fused_kernel import sum_and_norm_kernel

        with torch.cuda.device(device), torch.inference_mode():
            x, norm = torch.ones(1, 16, device=device), nn.LayerNorm(16, device=device)
            _launch(sum_and_norm_kernel, x, x, norm, torch.empty_like(x))
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(f"residual sum and layer norm are not fused: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return sum_and_norm_kernel
