"""Static sub-networks: which (layers, head units) cost about a given share of the dense model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import AutoConfig

from ..errors import DHTError
from ..hf.families import settings_of
from ..load import PRESETS, model_folder

NEAR = 0.8
"""A shape counts as near a budget if it costs at least this share of it."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a backbone that costs depend on: N layers, H head units, and what of a layer the units carry.

    Args:
        fixed: share of a full layer's FLOPs that runs whatever the number of units (0 when coupled).
    """

    layers: int
    heads: int
    fixed: float = 0.0

    def cost(self, layers: int, units: int) -> float:
        """FLOPs of L layers with K units as a fraction of dense, exit heads and padding left out.

        >>> Sizes(6, 12).cost(3, 6)
        0.25
        """
        return layers / self.layers * (self.fixed + (1 - self.fixed) * units / self.heads)

    def shapes(self, budget: float, count: int) -> list[tuple[int, int]]:
        """At most `count` shapes (L, K) near the budget and not above it, the most promising first.

        Promising is a small gap to the budget, and depth and width cut alike: among static shapes of equal cost the
        balanced ones have been the best. A budget below one unit in one layer gets that shape.

        >>> Sizes(6, 12).shapes(0.26, 3)
        [(3, 6), (2, 9), (3, 5)]
        """
        every = [(layers, units) for layers in range(1, self.layers + 1) for units in range(1, self.heads + 1)]
        below = {shape: cost for shape in every if (cost := self.cost(*shape)) <= budget + 1e-9}
        if not below:
            return [(1, 1)]
        near = NEAR * max(below.values())

        def demerit(shape: tuple[int, int]) -> float:
            skew = abs(math.log(shape[0] / self.layers * self.heads / shape[1]))
            return round(skew / 2 + 3 * math.log(budget / below[shape]), 6)

        return sorted((shape for shape in below if below[shape] >= near), key=lambda s: (demerit(s), s))[:count]


def sizes_of(model: str, ffn: str) -> Sizes:
    """The sizes of a model by name, without loading its weights.

    Raises:
        DHTError: there is no such model.
    """
    if model in PRESETS:
        sizes = PRESETS[model]
    elif model.startswith("preset:"):
        raise DHTError(f"--model: no preset {model!r}; there are: {', '.join(PRESETS)}")
    else:
        try:
            config = AutoConfig.from_pretrained(model_folder(model))
        except (OSError, ValueError, KeyError) as error:
            raise DHTError(f"model: cannot load {model!r}: {str(error).splitlines()[0]}") from error
        sizes = settings_of(config)
    width, inner = sizes["hidden_size"], sizes["intermediate_size"] * (1.5 if sizes.get("gated_ffn") else 1)
    fixed = 0.0 if ffn == "coupled" else inner / (inner + 2 * width)
    return Sizes(sizes["num_hidden_layers"], sizes["num_attention_heads"], fixed)
