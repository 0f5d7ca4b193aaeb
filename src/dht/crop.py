"""Long rows, cut short in the first part of a training: many cheap steps on windows, then fewer on whole rows."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Crop:
    """Which rows of a training step are cut, and where.

    Args:
        tokens: what is left of a longer row, 3 at least: its first and last token, and a window of those between them.
        steps: first optimizer steps in which rows are cut.
        seed: of the windows; with the step it decides them, so that a resumed run cuts as one that went through.
    """

    tokens: int
    steps: int
    seed: int

    def __call__(self, batch: dict[str, Tensor], step: int, part: str = "") -> dict[str, Tensor]:
        """The batch of a step, cut while rows are cut, else as it is.

        Args:
            batch: rows padded at the end; what is not `BY_TOKEN` stays.
            part: what tells the batches of a step apart.
        """
        mask = batch["attention_mask"]
        if step >= self.steps or mask.shape[1] <= self.tokens:
            return batch
        draw = torch.Generator().manual_seed(random.Random(f"{self.seed} {step} {part}").getrandbits(63))
        lengths = mask.sum(-1)
        places = (lengths - self.tokens).clamp_min(0)
        starts = (torch.rand(len(mask), generator=draw).to(mask.device) * (places + 1)).long().clamp_max(places)
        taken = starts[:, None] + torch.arange(self.tokens, device=mask.device)
        taken[:, 0] = 0
        taken.scatter_(1, lengths.clamp_max(self.tokens)[:, None] - 1, lengths[:, None] - 1)
        return {name: x.gather(1, taken) if name in BY_TOKEN else x for name, x in batch.items()}
