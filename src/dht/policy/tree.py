"""Tree search: after every layer, stop or run the next one, and with how many head units, from the state reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..bandit.posterior import LinearPosterior
from ..bandit.ucb import choose, ucb_index
from ..plan import Decision, Trace
from .base import View
from .context import exit_features
from .learned import LearnedPolicy
from .reward import returns

if TYPE_CHECKING:
    from ..hf.configuration import DHTConfig


REPAIR = 0.4
PRIOR_ROWS = 3000.0


class TreePolicy(LearnedPolicy):
    """Arms before layer l + 1: 0 = stop (not before layer 1), 1.. = run it with `widths[i - 1]` head units.

    Stopping is paid the exit's quality, seen for free at every exit passed. Running on is paid the quality and the cost
    of what followed, up to where the policy would have left. A layer has two regressions, one for stopping and one for
    running on; the arms that run on share theirs and differ in the features of their width.
    """

    name = "tree"
    reads_exits = True
    _believed: LinearPosterior | None

    def __init__(self, config: DHTConfig) -> None:
        super().__init__(config, 2 * config.num_hidden_layers)
        self.classes = int(config.num_labels or 2)
        self._kept_for: tuple[float, ...] = ()
        self._kept: dict[int, Tensor] = {}
        object.__setattr__(self, "_believed", None)

    def decide(self, view: View) -> Decision:
        context = self._features(view)
        price = self._index_price(view)
        arm = (context @ self._greedy_weights(view.layer, price)).argmax(-1)
        if view.layer == 0:
            arm = arm + 1
        wants_stop = arm == 0
        if view.mode != "exploit":
            widths = self.explored if view.mode == "explore" else len(self.widths)
            index = self._index(view.layer, context, self.alpha, price)[:, : 1 + widths]
            onward = choose(index[:, 1:]) + 1
            if view.mode == "explore":
                arm = torch.where(self._carried_on(view), onward, choose(index))
            else:
                wanders = self._row_draws(view, 1) < 0.5
                arm = torch.where(wanders, 1 + self._random_widths(view), onward)
            if view.mode == "survey":
                arm = torch.full_like(arm, len(self.widths))
        sets, choice = self._pick_sets(view, context, arm - 1)
        return Decision(sets, choice, arm, context, wants_stop)

    def _greedy_weights(self, layer: int, price: float) -> Tensor:
        """float64 [F, 1 + K] (before layer 1: [F, K], no stopping): context times this is the index without optimism.

        The features of a width are the constant, or the confidence, times a number: they fold into the weights of those
        two. Kept until the posterior or the price changes.
        """
        numbers = self.numbers
        now = (numbers.moment.data_ptr(), numbers.moment._version, numbers.gram._version, price)
        if self._kept_for != now:
            self._kept_for, self._kept = now, {}
        if layer not in self._kept:
            theta = numbers.mean(slice(2 * layer, 2 * layer + 2))
            stop, run = (theta[..., 0] - price * theta[..., 1]).unbind(0)
            share = self._shares(run.device)
            weights = run[: self.num_features, None].repeat(1, len(self.widths))
            linear, square, sure = run[self.num_features :]
            weights[0] += linear * share + square * share.square()
            weights[2] += sure * share
            if layer:
                weights = torch.cat([stop[: self.num_features, None], weights], 1)
            self._kept[layer] = weights
        return self._kept[layer]

    def _index(self, layer: int, context: Tensor, alpha: float, price: float) -> Tensor:
        """UCB index of every arm, float64 [R, 1 + K]; stopping before layer 1 is out of the question."""
        rows, count = len(context), len(self.widths)
        wide = self._with_every_width(context)
        run = ucb_index(self.numbers, wide, alpha, price, slice(2 * layer + 1, 2 * layer + 2)).view(rows, count)
        if layer == 0:
            stop = torch.full_like(run[:, :1], -torch.inf)
        else:
            still = torch.nn.functional.pad(context, (0, self.WIDTH_FEATURES))
            stop = ucb_index(self.numbers, still, alpha, price, slice(2 * layer, 2 * layer + 1))
        return torch.cat([stop, run], 1)

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets all numeric rewards and returns to the prior."""
        self._blend_prior(1.0, keep=0.0)

    def _blend_prior(self, share: float, keep: float = 1.0) -> None:
        """Statistics become `keep` times themselves plus `share` of the prior's."""
        prior = self._prior()
        for name in ("gram", "moment", "pulls"):
            getattr(self.numbers, name).mul_(keep).add_(getattr(prior, name).to(self.price.device), alpha=share)
        self.numbers.invalidate()

    def _prior(self) -> LinearPosterior:
        """What is believed before any reward, as the statistics of `PRIOR_ROWS` made-up rows a layer.

        An exit is right as often as it is confident. Running all layers repairs `REPAIR` of its doubt, fewer layers
        proportionally less, whatever the width. With a cost to go that is as proportional, this is one confidence
        threshold for all layers at the narrowest width, from which rewards move each layer.
        """
        if self._believed is not None:
            return self._believed
        prior = LinearPosterior(self.numbers.num_arms, self.numbers.num_features, 2)
        sure = torch.linspace(1 / self.classes + 0.01, 0.99, 25, dtype=torch.float64)
        rest = ((1 - sure) / (self.classes - 1)).log()[:, None].expand(-1, self.classes - 1)
        seen, _ = exit_features(torch.cat([sure.log()[:, None], rest], 1))
        phi = torch.zeros(len(sure), self.num_features, dtype=torch.float64)
        phi[:, 0], phi[:, 1], phi[:, 2:6], phi[:, 6], phi[:, 7] = 1.0, 0.5, seen, 1.0, sure
        wide = self._with_every_width(phi)
        doubt = (1 - sure).repeat_interleave(len(self.widths))
        shares = self._shares(phi.device).repeat(len(phi))
        still = torch.nn.functional.pad(phi, (0, self.WIDTH_FEATURES))
        blind = torch.cat([phi[:, :2], torch.zeros_like(phi[:, 2:])], 1)  # before layer 1 no exit has spoken
        for layer in range(self.layers):
            left = (self.layers - layer + 1) / self.layers
            for arm, rows, quality, cost in (
                (2 * layer, still, sure, torch.zeros_like(sure)),
                (
                    2 * layer + 1,
                    wide if layer else self._with_every_width(blind),
                    1 - doubt * (1 - REPAIR * left),
                    shares * left / 2,
                ),
            ):
                weight = torch.zeros(len(rows), prior.num_arms, dtype=torch.float64)
                weight[:, arm] = PRIOR_ROWS / len(rows)
                target = torch.stack([quality, cost], -1)[:, None].expand(-1, prior.num_arms, -1)
                prior.update(rows, weight, target)
        # Not a submodule: it follows from the configuration, so it is neither saved nor loaded.
        object.__setattr__(self, "_believed", prior)
        return prior

    @torch.no_grad()
    def observe(self, trace: Trace, quality: Tensor) -> None:
        final, cost = returns(trace, quality)
        row, layer = (trace.arm >= 0).nonzero(as_tuple=True)
        context, arm = trace.context[row, layer], trace.arm[row, layer]
        ran, passed = arm > 0, layer > 0
        stops = torch.nn.functional.pad(context[passed], (0, self.WIDTH_FEATURES))
        runs = self._with_width(context[ran], self._executed_shares(trace)[row[ran], layer[ran]])
        phi = torch.cat([stops, runs])
        number = torch.cat([2 * layer[passed], 2 * layer[ran] + 1])
        paid = torch.cat([quality[row[passed], layer[passed] - 1], final[row[ran], layer[ran]]])
        spent = torch.cat([torch.zeros_like(stops[:, 0]), cost[row[ran], layer[ran]]])
        weight = torch.nn.functional.one_hot(number, self.numbers.num_arms).to(torch.float64)
        target = torch.stack([paid, spent], -1)[:, None] * weight[..., None]
        self.numbers.update(phi, weight, target)
        # What was seen fades with gamma, what was believed beforehand does not.
        self._blend_prior(1.0 - self.numbers.forgetting ** len(phi))
