"""Tree search: after every layer, stop or run the next one, and with how many head units, from the state reached."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bandit.ucb import choose, ucb_index
from ..plan import Decision, Trace
from .base import View
from .learned import LearnedPolicy
from .reward import returns


class TreePolicy(LearnedPolicy):
    """Arms before layer l + 1: 0 = stop (not before layer 1), 1.. = run it with `widths[i - 1]` head units.

    Stopping is paid the exit's quality, seen for free at every exit passed. Running on is paid the quality and the cost of
    what followed, up to where the policy would have left.
    """

    name = "tree"
    reads_exits = True

    def __init__(self, config) -> None:
        super().__init__(config, config.num_hidden_layers * (1 + len(config.widths)))
        self.arms = 1 + len(self.widths)

    def decide(self, view: View) -> Decision:
        context = self._features(view)
        arms = slice(view.layer * self.arms, (view.layer + 1) * self.arms)
        allowed = torch.ones(self.arms, dtype=torch.bool, device=context.device)
        allowed[0] = view.layer > 0
        arm = choose(ucb_index(self.numbers, context, 0.0, self.price, arms), allowed)
        wants_stop = arm == 0
        if view.mode != "exploit":
            if self.alpha:
                arm = choose(ucb_index(self.numbers, context, self.alpha, self.price, arms), allowed)
            running = allowed.clone()
            running[0] = False
            if view.mode in ("probe", "survey"):
                forced = torch.ones_like(wants_stop)
                wander = self._row_draws(view, 1) < 0.5
            else:
                forced = wander = self._row_draws(view, 1) < self.exploration
            onward = choose(ucb_index(self.numbers, context, self.alpha, self.price, arms), running)
            arm = torch.where(forced, onward, arm)
            arm = torch.where(wander, 1 + self._random_widths(view), arm)
            if view.mode == "survey":
                arm = torch.full_like(arm, len(self.widths))
        sets, choice = self._pick_sets(view, context, arm - 1)
        return Decision(sets, choice, arm, context, wants_stop)

    @torch.no_grad()
    def observe(self, trace: Trace, quality: Tensor) -> None:
        final, cost = returns(trace, quality)
        row, layer = (trace.arm >= 0).nonzero(as_tuple=True)
        arm = trace.arm[row, layer]
        pair = torch.arange(len(row), device=row.device)
        weight = torch.zeros(len(row), self.layers, self.arms, dtype=torch.float64, device=row.device)
        target = torch.zeros(*weight.shape, 2, dtype=torch.float64, device=row.device)
        ran = arm > 0
        weight[pair[ran], layer[ran], arm[ran]] = 1.0
        target[pair[ran], layer[ran], arm[ran], 0] = final[row[ran], layer[ran]]
        target[pair[ran], layer[ran], arm[ran], 1] = cost[row[ran], layer[ran]]
        passed = layer > 0
        weight[pair[passed], layer[passed], 0] = 1.0
        target[pair[passed], layer[passed], 0, 0] = quality[row[passed], layer[passed] - 1]
        self.numbers.update(trace.context[row, layer], weight.flatten(1), target.flatten(1, 2))
