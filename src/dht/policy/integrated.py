"""Integrated search: one decision before layer 1, on the grid of (layers, head units), from the embedded input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..bandit.ucb import choose, ucb_index
from ..cost import CostModel
from ..plan import Decision, Trace
from .base import View
from .learned import LearnedPolicy

if TYPE_CHECKING:
    from ..hf.configuration import DHTConfig


class IntegratedPolicy(LearnedPolicy):
    """Arm (l, i) = run layers 1..l with `widths[i]` head units (from `wide_from` on, the most on offer).

    Ordered by l, then by width.

    A row that ran l layers shows the quality of every shallower arm of its width: all of them learn from it. Each depth
    has a regression; its widths share it and differ in the features of their width.
    """

    name = "integrated"

    def __init__(self, config: DHTConfig) -> None:
        super().__init__(config, config.num_hidden_layers)

    def decide(self, view: View) -> Decision:
        if view.layer:
            _, first = view.trace.decisions[0]  # of all rows, in their order
            assert isinstance(first.context, Tensor)
            assert first.arm is not None
            context, arm = first.context[view.rows], first.arm[view.rows]
        else:
            context = self._features(view)
            arm = self._choose(view, context)
        depth, width = arm // len(self.widths) + 1, arm % len(self.widths)
        if view.layer >= self.wide_from:
            width = torch.full_like(width, len(self.widths) - 1)
        sets, choice = self._pick_sets(view, context, torch.where(depth > view.layer, width, -1))
        wants_stop = torch.zeros_like(depth, dtype=torch.bool)
        return Decision(sets, choice, arm, context, wants_stop, lasting=view.mode == "exploit")

    def _choose(self, view: View, context: Tensor) -> Tensor:
        """int64 [R], the arm of each row; the grid in one vector, depth by depth."""
        rows, count = len(context), len(self.widths)
        alpha = 0.0 if view.mode == "exploit" else self.alpha
        wide = self._with_every_width(context)
        price = self._row_price(context, self._index_price(view)).repeat_interleave(count)
        index = ucb_index(self.numbers, wide, alpha, price).view(rows, count, self.layers)
        index[:, self.closed(0)] = -torch.inf
        arm = choose(index.transpose(1, 2).flatten(1))
        if view.mode == "explore":
            arm = torch.where(self._carried_on(view), (self.layers - 1) * count + arm % count, arm)
        elif view.mode == "probe":
            arm = (self.layers - 1) * count + self._random_widths(view)
        elif view.mode == "survey":
            arm = torch.full_like(arm, self.layers * count - 1)
        return arm

    def would_spend(self, trace: Trace, price: float) -> Tensor:
        context, count = trace.context[:, 0], len(self.widths)
        each = self._row_price(context, price).repeat_interleave(count)
        index = ucb_index(self.numbers, self._with_every_width(context), 0.0, each).view(-1, count, self.layers)
        index[:, self.closed(0)] = -torch.inf
        arm = choose(index.transpose(1, 2).flatten(1))
        layer = torch.arange(self.layers, device=context.device)
        widths = torch.where(layer < self.wide_from, (arm % count)[:, None], count - 1)
        return self._spent(trace, widths).gather(1, (arm // count)[:, None])[:, 0]

    def decision_flops(self, layer: int, cost: CostModel) -> float:
        return super().decision_flops(layer, cost) * self.layers if layer == 0 else 0.0

    @torch.no_grad()
    def observe(self, trace: Trace, quality: Tensor, at_once: Tensor | None = None) -> None:
        layers = quality.shape[1]
        weight = (torch.arange(layers, device=quality.device) < trace.layers[:, None]).to(torch.float64)
        target = torch.stack([quality.to(torch.float64), trace.layer_cost.cumsum(-1)], -1)
        phi = self._with_width(trace.context[:, 0], self._executed_shares(trace)[:, 0])
        self.numbers.update(phi, weight, target)
