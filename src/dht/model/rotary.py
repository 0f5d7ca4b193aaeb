"""Rotary positions: queries and keys are turned by an angle that grows with the token's place in its row.

Source: RoFormer (Su et al. 2021, arXiv 2104.09864), dimension i paired with i + size/2 as in `transformers`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import Packed


def rotate(query: Tensor, key: Tensor, rows: Packed, theta: float) -> tuple[Tensor, Tensor]:
    """The turned `query` and `key`, each [R, k, T, size], in their own dtype.

    Args:
        rows: their layout; the table is worked out once for it and used by all layers of that `theta`.
        theta: base of the wavelengths.
    """
    cos, sin = angles(rows, query.shape[-1], theta)
    return _turn(query, cos, sin), _turn(key, cos, sin)


def angles(rows: Packed, size: int, theta: float) -> tuple[Tensor, ...]:
    """Cosine and sine of the angle of every place in the longest row, float32 [T, size / 2] each."""
    known = ("rotary", theta, size)
    if known not in rows.tables:
        rows.tables[known] = _table(rows.max_length, size, theta, rows.lengths.device)
    return rows.tables[known]


def _table(length: int, size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every place's angles, float32 [T, size / 2] each: an angle is not for half precision."""
    frequency = theta ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(states.dtype)
