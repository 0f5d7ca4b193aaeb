"""Integrated search: one decision before layer 1, on the grid of (layers, head units), from the embedded input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bandit.ucb import choose, ucb_index
from ..cost import CostModel
from ..plan import Decision, Trace
from .base import View
from .learned import LearnedPolicy


class IntegratedPolicy(LearnedPolicy):
    """Arm (l, i) = run layers 1..l, each with `widths[i]` head units; ordered by l, then by width.

    A row that ran l layers shows the quality of every shallower arm of its width: all of them learn from it.
    """

    name = "integrated"

    def __init__(self, config) -> None:
        super().__init__(config, config.num_hidden_layers * len(config.widths))
        self.arms = len(self.widths)

    def decide(self, view: View) -> Decision:
        if view.layer:
            context = view.trace.context[view.rows, 0]
            arm = view.trace.arm[view.rows, 0]
        else:
            context = self._features(view)
            arm = self._choose(view, context)
        depth, width = arm // self.arms + 1, arm % self.arms
        sets, choice = self._pick_sets(view, context, torch.where(depth > view.layer, width, -1))
        stops = torch.zeros_like(depth, dtype=torch.bool)
        return Decision(sets, choice, arm, context, stops)

    def _choose(self, view: View, context: Tensor) -> Tensor:
        alpha = 0.0 if view.mode == "exploit" else self.alpha
        arm = choose(ucb_index(self.numbers, context, alpha, self.price))
        if view.mode != "exploit":
            floor = self.exploration if view.mode == "explore" else 1.0
            deep = (self.layers - 1) * self.arms + self._random_widths(view)
            arm = torch.where(self._row_draws(view, 1) < floor, deep, arm)
            if view.mode == "survey":
                arm = torch.full_like(arm, self.layers * self.arms - 1)
        return arm

    def decision_flops(self, layer: int, cost: CostModel) -> float:
        if layer:
            return 0.0
        features = self.num_features
        numbers = 2.0 * features * self.numbers.num_arms * (features + 2)
        return numbers + 2.0 * features * self.heads * self.layers + 2.0 * self.projection.numel()

    @torch.no_grad()
    def observe(self, trace: Trace, quality: Tensor) -> None:
        rows, layers = quality.shape
        width = trace.arm[:, 0] % self.arms
        ran = torch.arange(layers, device=quality.device) < trace.layers[:, None]
        weight = torch.zeros(rows, layers, self.arms, dtype=torch.float64, device=quality.device)
        target = torch.zeros(*weight.shape, 2, dtype=torch.float64, device=quality.device)
        every = torch.arange(rows, device=quality.device)
        weight[every, :, width] = ran.double()
        target[every, :, width, 0] = quality
        target[every, :, width, 1] = trace.layer_cost.cumsum(-1)
        self.numbers.update(trace.context[:, 0], weight.flatten(1), target.flatten(1, 2))
