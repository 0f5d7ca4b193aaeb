"""Linear maps from the means of every layer into the space of the full model's embeddings, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .model.encoder import ExitHead

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Ridge penalties that are tried, in units of the features' mean variance."""
HELD_OUT = 4
"""Every so manieth row is held out to choose the penalty."""


@torch.no_grad()
def fit_maps(exits: Sequence[ExitHead], states: Sequence[Tensor], truth: Tensor) -> None:
    """Fits the maps of all exits but the last, in place: ridge regressions, each with the penalty that serves best.

    A penalty is chosen by the mean cosine on rows held out; the map is then fitted to all rows.

    Args:
        exits: `EmbeddingHead`s.
        states: per exit [n, D], the rows' means.
        truth: [n, D], the full model's embeddings.
    """
    told = truth.double()
    held = torch.arange(len(told), device=told.device) % HELD_OUT == 0
    for head, pooled in zip(exits[:-1], states[:-1], strict=True):
        read = pooled.double()
        maps = _ridges(read[~held], told[~held]) if len(told) > HELD_OUT else []
        scores = [F.cosine_similarity(read[held] @ weight + bias, told[held], dim=-1).mean() for weight, bias in maps]
        best = int(torch.stack(scores).argmax()) if scores else len(PENALTIES) - 1
        weight, bias = _ridges(read, told)[best]
        head.dense.weight.copy_(weight.T)
        head.dense.bias.copy_(bias)


def _ridges(read: Tensor, told: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weight [D, D] and bias [D] for each penalty, from one eigendecomposition."""
    center, goal = read.mean(0), told.mean(0)
    read = read - center
    values, vectors = torch.linalg.eigh(read.T @ read / len(read))
    along = vectors.T @ (read.T @ (told - goal) / len(read))
    found = []
    for penalty in PENALTIES:
        weight = vectors @ (along / (values + penalty * values.mean().clamp_min(1e-12))[:, None])
        found.append((weight, goal - center @ weight))
    return found
