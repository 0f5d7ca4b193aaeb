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
    what followed, up to where the policy would have left. A layer has two regressions, one for stopping and one for running
    on; the arms that run on share theirs and differ in the features of their width.
    """

    name = "tree"
    reads_exits = True

    def __init__(self, config) -> None:
        super().__init__(config, 2 * config.num_hidden_layers)

    def decide(self, view: View) -> Decision:
        context = self._features(view)
        exploring = view.mode != "exploit"
        greedy = self._index(view.layer, context, 0.0)
        arm = choose(greedy)
        wants_stop = arm == 0
        if exploring:
            index = self._index(view.layer, context, self.alpha) if self.alpha else greedy
            onward = choose(index[:, 1:]) + 1
            if view.mode == "explore":
                forced = self._row_draws(view, 1) < self.exploration
                arm = torch.where(forced, onward, choose(index))
            else:
                wanders = self._row_draws(view, 1) < 0.5
                arm = torch.where(wanders, 1 + self._random_widths(view), onward)
            if view.mode == "survey":
                arm = torch.full_like(arm, len(self.widths))
        sets, choice = self._pick_sets(view, context, arm - 1)
        return Decision(sets, choice, arm, context, wants_stop)

    def _index(self, layer: int, context: Tensor, alpha: float) -> Tensor:
        """UCB index of every arm, float64 [R, 1 + K]; stopping before layer 1 is out of the question."""
        rows, count = len(context), len(self.widths)
        wide = self._with_width(context, torch.arange(count, device=context.device))
        run = ucb_index(self.numbers, wide, alpha, self.price, slice(2 * layer + 1, 2 * layer + 2)).view(rows, count)
        if layer == 0:
            stop = torch.full_like(run[:, :1], -torch.inf)
        else:
            still = torch.nn.functional.pad(context, (0, self.WIDTH_FEATURES))
            stop = ucb_index(self.numbers, still, alpha, self.price, slice(2 * layer, 2 * layer + 1))
        return torch.cat([stop, run], 1)

    @torch.no_grad()
    def observe(self, trace: Trace, quality: Tensor) -> None:
        final, cost = returns(trace, quality)
        row, layer = (trace.arm >= 0).nonzero(as_tuple=True)
        context, arm = trace.context[row, layer], trace.arm[row, layer]
        ran, passed = arm > 0, layer > 0
        stops = torch.nn.functional.pad(context[passed], (0, self.WIDTH_FEATURES))
        runs = self._with_width(context[ran], arm[ran] - 1, paired=True)
        phi = torch.cat([stops, runs])
        number = torch.cat([2 * layer[passed], 2 * layer[ran] + 1])
        paid = torch.cat([quality[row[passed], layer[passed] - 1], final[row[ran], layer[ran]]])
        spent = torch.cat([torch.zeros_like(stops[:, 0]), cost[row[ran], layer[ran]]])
        weight = torch.nn.functional.one_hot(number, self.numbers.num_arms).to(torch.float64)
        target = torch.stack([paid, spent], -1)[:, None] * weight[..., None]
        self.numbers.update(phi, weight, target)
