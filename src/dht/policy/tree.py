"""Tree search: after every layer, stop or run the next one, and with how many head units, from the state reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..bandit.posterior import LinearPosterior
from ..bandit.ucb import choose, ucb_index
from ..plan import Decision, Trace
from .base import View
from .context import EXIT_FEATURES, FEW, LOG_LONGEST, features_of_row
from .learned import LearnedPolicy
from .reward import returns

if TYPE_CHECKING:
    from ..hf.configuration import DHTConfig


CLOSED = -1e30
"""Index of an arm that is not on offer."""

REPAIR = 0.4
PRIOR_ROWS = 3000.0


def _buffer(module: nn.Module, name: str) -> Tensor:
    buffer: Tensor = module.__dict__["_buffers"][name]
    return buffer


class PlainLayer(NamedTuple):
    """What one row's decision before a layer needs, for every arm on offer.

    Attributes:
        worth, cost: weights of the context's features, [arms][F].
        choices: sets, choice, arm and wants_stop of the `Decision` for it.
    """

    worth: list[list[float]]
    cost: list[list[float]]
    choices: list[tuple[Tensor, Tensor, Tensor, Tensor]]


class TreePolicy(LearnedPolicy):
    """Arms before layer l + 1: 0 = stop (before layer 1 only if a lexical exit was read), 1.. = run it with
    `widths[i - 1]` head units.

    Stopping is paid the exit's quality, seen for free at every exit passed. Running on is paid the quality and the cost
    of what followed, up to where the policy would have left. A layer has two regressions, one for stopping and one for
    running on; the arms that run on share theirs and differ in the features of their width.
    """

    name = "tree"
    reads_exits = True
    _believed: LinearPosterior | None

    def __init__(self, config: DHTConfig) -> None:
        super().__init__(config, 2 * config.num_hidden_layers)
        self._kept_for: tuple[float, ...] = ()
        self._kept: list[Tensor] = []
        self._plain: dict[int, PlainLayer] = {}
        object.__setattr__(self, "_believed", None)

    def decide(self, view: View) -> Decision:
        if view.mode == "exploit" and view.rows.numel() == 1 and self._reads_plainly(view):
            return self._decide_for_one(view)
        context = self._features(view)
        price = self._row_price(context, self._index_price(view))
        arm = self._greedy_arm(view, context, price)
        wants_stop = arm == 0
        if view.mode != "exploit":
            index = self._index(view.layer, context, self.alpha, price)
            if view.logits is None:
                index[:, 0] = -torch.inf
            onward = choose(index[:, 1:]) + 1
            if view.mode == "explore":
                arm = torch.where(self._carried_on(view), onward, choose(index))
            else:
                wanders = self._row_draws(view, 1) < 0.5
                arm = torch.where(wanders, 1 + self._random_widths(view), onward)
            if view.mode == "survey":
                arm = torch.full_like(arm, len(self.widths))
        sets, choice = self._pick_sets(view, context, arm - 1)
        return Decision(sets, choice, arm, context, wants_stop, lasting=view.mode == "exploit")

    def reconsider(self, view: View) -> tuple[Tensor, Tensor]:
        """The context of every active row, [R, F], and where the greedy rule would stop, bool [R]."""
        context = self._features(view) if self.sees_exits else view.trace.context[view.rows, view.layer]
        price = self._row_price(context, self._index_price(view))
        return context, self._greedy_arm(view, context, price) == 0

    def _greedy_arm(self, view: View, context: Tensor, price: Tensor) -> Tensor:
        greedy = self._greedy(view.layer, context, price)
        if view.logits is None:  # no exit was read: there is nothing to stop with
            greedy[:, 0] = -torch.inf
        return greedy.argmax(-1)

    def would_spend(self, trace: Trace, price: float) -> Tensor:
        context, rows = trace.context, len(trace.units)
        stops = torch.zeros(rows, self.layers + 1, dtype=torch.bool, device=context.device)
        stops[:, self.layers] = True
        widths = torch.zeros(rows, self.layers, dtype=torch.long, device=context.device)
        for layer in range(self.layers):
            index = self._greedy(layer, context[:, layer], self._row_price(context[:, layer], price))
            stops[:, layer] = index.argmax(-1) == 0 if layer or self.leaves_at_once else False
            widths[:, layer] = index[:, 1:].argmax(-1)
        leaves = stops.int().argmax(-1)
        spent = torch.nn.functional.pad(self._spent(trace, widths), (1, 0))
        return spent.gather(1, leaves[:, None])[:, 0]

    def _greedy(self, layer: int, context: Tensor, price: Tensor) -> Tensor:
        """float64 [R, 1 + K], the index of every arm without optimism."""
        both = context @ self._greedy_weights(layer)
        worth, cost = both.tensor_split(2, 1)
        return worth - price[:, None] * cost

    def _reads_plainly(self, view: View) -> bool:
        """True if a row's decision is a few dozen plain numbers, fewer than tensor operations would be worth."""
        few = view.logits is None or view.logits.numel() <= FEW
        plain = self.task.reads_rows and self.max_sets == 1 and self.num_features == EXIT_FEATURES
        return few and plain and view.rows.is_cpu

    def _decide_for_one(self, view: View) -> Decision:
        """What `decide` says of a single row.

        Between two layers caches are cold, and everything touched counts: buffers are fetched without the module's
        `__getattr__`, and the tensors of a decision are made when its layer is first asked for.
        """
        logits = None if view.logits is None else view.logits.tolist()[0]
        previous = None if view.previous is None else view.previous.tolist()[0]
        phi = features_of_row(view.packed.max_length, logits, previous, self.task)
        price, mean = _buffer(self, "price").item(), _buffer(self, "mean_tokens").item()
        if mean:
            price = math.exp(phi[1] * LOG_LONGEST) * (price / mean)
        layer = self._plain_layer(view.layer)
        first = int(logits is None)  # no exit was read: there is nothing to stop with
        index = [
            sum(map(mul, phi, worth)) - price * sum(map(mul, phi, cost))
            for worth, cost in zip(layer.worth[first:], layer.cost[first:], strict=True)
        ]
        sets, choice, arm, wants_stop = layer.choices[first + index.index(max(index))]
        return Decision(sets, choice, arm, [phi], wants_stop, lasting=True)

    def _plain_layer(self, layer: int) -> PlainLayer:
        weights = self._greedy_weights(layer)
        if layer not in self._plain:
            worth, cost = weights.T.tensor_split(2)
            choices = []
            for arm in range(len(worth)):
                runs = torch.tensor([0 if arm else -1])
                units = self.head_sets[layer, max(arm - 1, 0), 0].clone()
                choices.append((units[None], runs, torch.tensor([arm]), runs < 0))
            self._plain[layer] = PlainLayer(worth.tolist(), cost.tolist(), choices)
        return self._plain[layer]

    def _greedy_weights(self, layer: int) -> Tensor:
        """float64 [F, 2 * (1 + K)]: context times this is each arm's quality, then each one's cost.

        The features of a width are the constant, or the confidence, times a number: they fold into the weights of those
        two. Kept until the posterior, or the head sets, change.
        """
        numbers = self.__dict__["_modules"]["numbers"]
        moment, gram, sets = _buffer(numbers, "moment"), _buffer(numbers, "gram"), _buffer(self, "head_sets")
        now = (moment.data_ptr(), moment._version, gram._version, sets.data_ptr(), sets._version)
        if self._kept_for != now:
            self._kept_for, self._kept, self._plain = now, self._weights_of_all_layers(), {}
        return self._kept[layer]

    def _weights_of_all_layers(self) -> list[Tensor]:
        theta = self.numbers.mean().unflatten(0, (self.layers, 2)).transpose(2, 3)  # [N, 2 arms, 2 targets, F + 3]
        stop, run = theta.unbind(1)
        share = self._shares(run.device)
        weights = run[..., : self.num_features, None].repeat(1, 1, 1, len(self.widths))
        linear, square, sure = run[..., self.num_features :, None].unbind(2)
        weights[:, :, 0] += linear * share + square * share.square()
        weights[:, :, 2] += sure * share
        for layer in range(self.layers):
            closed = self.closed(layer)
            weights[layer, ..., closed] = 0.0
            weights[layer, 0, 0, closed] = CLOSED
        both = torch.cat([stop[..., : self.num_features, None], weights], -1)
        return list(torch.cat([both[:, 0], both[:, 1]], -1))

    def _index(self, layer: int, context: Tensor, alpha: float, price: Tensor) -> Tensor:
        """UCB index of every arm, float64 [R, 1 + K], at each row's price [R]."""
        rows, count = len(context), len(self.widths)
        wide, each = self._with_every_width(context), price.repeat_interleave(count)
        run = ucb_index(self.numbers, wide, alpha, each, slice(2 * layer + 1, 2 * layer + 2)).view(rows, count)
        run[:, self.closed(layer)] = CLOSED
        still = torch.nn.functional.pad(context, (0, self.WIDTH_FEATURES))
        stop = ucb_index(self.numbers, still, alpha, price, slice(2 * layer, 2 * layer + 1))
        return torch.cat([stop, run], 1)

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets all numeric rewards and returns to the prior."""
        self._blend_prior(1.0, keep=0.0)

    @torch.no_grad()
    def merge(self, base: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]]) -> None:
        """As the base class; every rank has topped up the prior that faded, and it is topped up once."""
        super().merge(base, deltas)
        faded = [1.0 - self.numbers.forgetting ** int(delta["numbers.clock"]) for delta in deltas]
        self._blend_prior(max(faded, default=0.0) - sum(faded))

    def _blend_prior(self, share: float, keep: float = 1.0) -> None:
        """Statistics become `keep` times themselves plus `share` of the prior's."""
        prior = self._prior()
        for name in ("gram", "moment", "pulls"):
            getattr(self.numbers, name).mul_(keep).add_(getattr(prior, name).to(self.price.device), alpha=share)
        self.numbers.invalidate()

    def _prior(self) -> LinearPosterior:
        """What is believed before any reward, as the statistics of `PRIOR_ROWS` made-up rows a layer.

        An exit is right as often as it is confident. Running on from layer 1 repairs `REPAIR` of its doubt, from deeper
        layers less, in proportion to the cost to go, and no width more than another. That is one confidence threshold
        for all layers at the narrowest width, from which rewards move each layer.
        """
        if self._believed is not None:
            return self._believed
        prior = LinearPosterior(self.numbers.num_arms, self.numbers.num_features, 2)
        phi, sure = self._made_up_rows()
        wide = self._with_every_width(phi)
        doubt = (1 - sure).repeat_interleave(len(self.widths))
        shares = self._shares(phi.device).repeat(len(phi))
        still = torch.nn.functional.pad(phi, (0, self.WIDTH_FEATURES))
        blind = torch.cat([phi[:, :2], torch.zeros_like(phi[:, 2:])], 1)  # before layer 1 no exit has spoken
        trained = [self.width_at(layer, self.widths[0]) / self.heads for layer in range(self.layers)]
        later = [sum(trained[layer + 1 :]) / 2 for layer in range(self.layers)]  # a row leaves half-way, say
        for layer in range(self.layers):
            part = (trained[layer] + later[layer]) / (trained[0] + later[0])
            mended, to_go = 1 - doubt * (1 - REPAIR * part), (shares + later[layer]) / self.layers
            runs = wide if layer or self.leaves_at_once else self._with_every_width(blind)
            for arm, rows, quality, cost in (
                (2 * layer, still, sure, torch.zeros_like(sure)),
                (2 * layer + 1, runs, mended, to_go),
            ):
                weight = torch.zeros(len(rows), prior.num_arms, dtype=torch.float64)
                weight[:, arm] = PRIOR_ROWS / len(rows)
                target = torch.stack([quality, cost], -1)[:, None].expand(-1, prior.num_arms, -1)
                prior.update(rows, weight, target)
        # Not a submodule: it follows from the configuration, so it is neither saved nor loaded.
        object.__setattr__(self, "_believed", prior)
        return prior

    def _made_up_rows(self) -> tuple[Tensor, Tensor]:
        """Contexts [R, F] of every mix of confidence and what is believed not to matter, and the confidence [R].

        Length, agreement with the exit before and its confidence vary freely: a prior that held them still would say
        nothing of them, and a few hundred rewards would fill in noise.
        """
        least = self.task.least_sure + 0.01
        grid = torch.cartesian_prod(
            torch.linspace(least, 0.99, 25, dtype=torch.float64),
            torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64),
            torch.tensor([0.0, 1.0], dtype=torch.float64),
            torch.linspace(least, 0.99, 4, dtype=torch.float64),
        )
        sure = grid[:, 0]
        phi = torch.zeros(len(grid), self.num_features, dtype=torch.float64)
        phi[:, 0], phi[:, 1], phi[:, 6:8] = 1.0, grid[:, 1], grid[:, 2:]
        phi[:, 2:6] = self.task.typical(sure)
        return phi, sure

    @torch.no_grad()
    def observe(self, trace: Trace, quality: Tensor, at_once: Tensor | None = None) -> None:
        final, cost = returns(trace, quality)
        arms = trace.arm
        stopped = quality if at_once is None else torch.cat([at_once[:, None], quality], 1)
        first = int(at_once is None)  # layer before which a row can stop
        row, layer = (arms >= 0).nonzero(as_tuple=True)
        context, arm = trace.context[row, layer], arms[row, layer]
        ran, passed = arm > 0, layer >= first
        stops = torch.nn.functional.pad(context[passed], (0, self.WIDTH_FEATURES))
        runs = self._with_width(context[ran], self._executed_shares(trace)[row[ran], layer[ran]])
        phi = torch.cat([stops, runs])
        number = torch.cat([2 * layer[passed], 2 * layer[ran] + 1])
        paid = torch.cat([stopped[row[passed], layer[passed] - first], final[row[ran], layer[ran]]])
        spent = torch.cat([torch.zeros_like(stops[:, 0]), cost[row[ran], layer[ran]]])
        weight = torch.nn.functional.one_hot(number, self.numbers.num_arms).to(torch.float64)
        target = torch.stack([paid, spent], -1)[:, None] * weight[..., None]
        self.numbers.update(phi, weight, target)
        # What was seen fades with gamma, what was believed beforehand does not.
        self._blend_prior(1.0 - self.numbers.forgetting ** len(phi))
