"""FLOPs of a plan, by formula: one multiply-add is two FLOPs, as in torch's `FlopCounterMode`.

Counted: the attention projections, QK^T and AV on the padded length that is executed, the FFN, exit heads and the
policy's own arithmetic. Left out, as in `FlopCounterMode`: embedding look-ups, normalisation and elementwise functions
(the turning of rotary positions among them). Sliding windows are masks: the whole square runs, so the whole is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .model.convolution import WIDTH


@dataclass(frozen=True)
class CostModel:
    """FLOPs of the parts of an encoder with N layers, width D, H head units, FFN size M and C classes.

    Args:
        coupled: True if a head unit carries its 1/H share of the FFN; False if the FFN always runs whole.
        attends: True if the full model's classifier scores the tokens with H queries.
        gated: True if the FFN has three matrices (GeGLU) instead of two.
        embedded: width E of the embedding tables; None = D. Another than D is projected to it.
        tags: True if an exit classifies every token instead of the row; `attends` then says whether a D x D projection
            comes before the classifier.
        filters: of the lexical exit's convolution; 0 = it has none.

    Example:
        >>> cost = CostModel(width=384, heads=12, ffn=1536, layers=6, classes=2, coupled=True)
        >>> cost.token_unit * 12 == 2 * 384 * (4 * 384 + 2 * 1536)
        True
    """

    width: int
    heads: int
    ffn: int
    layers: int
    classes: int
    coupled: bool
    attends: bool = False
    gated: bool = False
    embedded: int | None = None
    tags: bool = False
    filters: int = 0

    @property
    def token_unit(self) -> int:
        """FLOPs per token of one head unit's projections (and FFN share when coupled)."""
        attention = 2 * self.width * 4 * (self.width // self.heads)
        return attention + (self._token_ffn // self.heads if self.coupled else 0)

    @property
    def token_fixed(self) -> int:
        """FLOPs per token of a layer that do not depend on the number of units."""
        return 0 if self.coupled else self._token_ffn

    @property
    def _token_ffn(self) -> int:
        return 2 * self.width * self.ffn * (3 if self.gated else 2)

    def embedding(self, lengths: Tensor) -> Tensor:
        """FLOPs per row of the projection from E to D, float64 [R]; zeros where there is none."""
        projects = self.embedded not in (None, self.width)
        return lengths.to(torch.float64) * (2.0 * (self.embedded or 0) * self.width * projects)

    def exit(self, lengths: Tensor, attends: bool = False) -> Tensor:
        """FLOPs per row of one exit head, float64 [R]: a D x D projection and the classifier.

        Args:
            lengths: int64 [R], tokens of each row.
            attends: True if H queries score every token first; of a tagger, if its classifier comes after a projection.
        """
        if self.tags:
            return lengths.to(torch.float64) * (2.0 * self.width * (self.classes + self.width * attends))
        scored = lengths.to(torch.float64) * (self.heads if attends else 0)
        return 2.0 * self.width * (self.width + self.classes + scored)

    def lexical(self, lengths: Tensor) -> Tensor:
        """FLOPs per row of the lexical exit, float64 [R]: sums over its tokens and pairs of neighbours; its filters."""
        tokens = lengths.to(torch.float64)
        filters = 2.0 * self.filters * (WIDTH * tokens + 2 * self.classes)
        return (2 * tokens - 1) * (2.0 * self.classes) + filters

    def attention(self, units: Tensor | int, padded: Tensor | int) -> Tensor | int:
        """FLOPs per row of QK^T and AV with `units` heads on `padded` tokens."""
        return 4 * units * (self.width // self.heads) * padded * padded

    def layer(self, lengths: Tensor, units: Tensor | int, padded: Tensor | int) -> Tensor:
        """FLOPs per row of one layer, float64 [R].

        Args:
            lengths: int64 [R], tokens of each row.
            units: number of head units run, int or int64 [R].
            padded: tokens of the padded attention block that the row runs in, int or int64 [R].
        """
        tokens = lengths.to(torch.float64)
        return tokens * (units * self.token_unit + self.token_fixed) + self.attention(units, padded)

    def layer_shares(self, units: Tensor, tokens: int) -> Tensor:
        """Share of the layers' FLOPs that each layer takes on rows of `tokens`, float64 [N]; they sum to 1.

        Args:
            units: int64 [N], head units run in each layer; a layer without any is not run.
        """
        row = torch.full(units.shape, tokens)
        spent = self.layer(row, units.cpu(), tokens) * (units.cpu() > 0)
        return spent / spent.sum()

    def dense(self, lengths: Tensor) -> Tensor:
        """FLOPs per row of the full model with its one classifier, float64 [R]; attention padded to the longest row."""
        padded = int(lengths.max()) if lengths.numel() else 0
        layers = self.layers * self.layer(lengths, self.heads, padded)
        return self.embedding(lengths) + layers + self.exit(lengths, self.attends)
