"""What tree and integrated search share: the bandits' state, the price, and which heads to run given their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bandit.posterior import LinearPosterior
from ..bandit.thompson import codebook, mean_scores, nearest_in_codebook, sample_scores
from ..cost import CostModel
from ..plan import Decision, Trace
from ..task import task_of
from .base import Policy, View
from .budget import price_for
from .context import EXIT_FEATURES, LOG_LONGEST, features

if TYPE_CHECKING:
    from ..hf.configuration import DHTConfig


CURVE = 13
"""Points of the price curve."""

PARTS = ("numbers", "units")
"""The posteriors of a learned policy."""


def _part(statistics: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): v for name, v in statistics.items() if name.startswith(f"{part}.")}


class LearnedPolicy(Policy):
    """UCB over numbers and combinatorial Thompson sampling over head units; state is sufficient statistics only.

    All state is buffers, so it is saved, loaded and moved with the model: posteriors in float64, the price, a step
    counter from which every random draw is derived (two runs with the same seed and data draw the same), the measured
    price curve, and the head sets that inference chooses among.

    Args:
        config: a `DHTConfig`.
        num_arms: numeric arms in all.
    """

    sees_exits = True
    """False if contexts are made of something else than exits."""
    WIDTH_FEATURES = 3  # x, x^2 and x * confidence of an arm that runs x = k / H of the units

    projection: Tensor
    price: Tensor
    mean_tokens: Tensor
    step: Tensor
    curve_price: Tensor
    curve_fraction: Tensor
    head_sets: Tensor

    def __init__(self, config: DHTConfig, num_arms: int) -> None:
        super().__init__()
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.task = task_of(config)
        self.widths = [int(width) for width in config.widths or []]
        self.leaves_at_once = config.lexical_pairs > 0
        directions = config.context_projection or 0
        self.num_features = EXIT_FEATURES + directions
        self.alpha, self.sigma = config.alpha, config.sigma
        self.max_sets, self.seed = config.head_sets, config.policy_seed
        self.wide_from = self.layers if config.wide_from is None else config.wide_from
        # Widths that no row trained with are not served either; runs of format 1 were measured serving them.
        self.chooses = config.train_widths == "all" or config.format_version < 2
        features = self.num_features + self.WIDTH_FEATURES
        self.numbers = LinearPosterior(num_arms, features, 2, config.ridge, config.forgetting)
        self.units = LinearPosterior(self.layers * self.heads, self.num_features, 1, config.ridge)
        self.unit_weight = config.unit_weight
        generator = torch.Generator().manual_seed(self.seed)
        sets = torch.zeros(self.layers, len(self.widths), self.max_sets, self.heads, dtype=torch.bool)
        for i, width in enumerate(self.widths):
            sets[:, i, :, :width] = True
        self.register_buffer("projection", torch.randn(directions, config.hidden_size, generator=generator))
        self.register_buffer("price", torch.tensor(0.02, dtype=torch.float64))
        self.register_buffer("mean_tokens", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("step", torch.tensor(0, dtype=torch.long))
        self.register_buffer("curve_price", torch.full((CURVE,), 0.02, dtype=torch.float64))
        self.register_buffer("curve_fraction", torch.ones(CURVE, dtype=torch.float64))
        self.register_buffer("head_sets", sets)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedPolicy:
        """Moves state between devices and never changes its dtype: a bfloat16 model keeps its float64 statistics."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As of every module; runs saved before lengths were known go on charging all rows alike."""
        state_dict.setdefault(f"{prefix}mean_tokens", torch.zeros_like(self.mean_tokens))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # Deciding

    def decide(self, view: View) -> Decision:
        raise NotImplementedError

    def _generator(self, layer: int, salt: int = 0) -> torch.Generator:
        """A generator that depends on seed, step and layer alone, so that choosing leaves no trace in the policy."""
        mixed = (self.seed * 1_000_003 + int(self.step)) * 4_099 + layer * 7 + salt
        return torch.Generator().manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)

    def _row_draws(self, view: View, salt: int) -> Tensor:
        """Uniform draws for the active rows, the same for a row at every layer of a step."""
        batch = view.input_ids.shape[0]
        return torch.rand(batch, generator=self._generator(0, salt)).to(view.rows.device)[view.rows]

    def _random_widths(self, view: View) -> Tensor:
        """int64 [R], a width index per row, kept through all layers."""
        offered = self.offered(view.layer)
        drawn = (self._row_draws(view, 2) * len(self.widths)).long()
        return drawn.clamp(offered.start, offered.stop - 1)

    def offered(self, layer: int) -> range:
        """Indices into `widths` that layer `layer` + 1 may run: the widest alone from `wide_from` on (decision 6)."""
        if layer >= self.wide_from:
            return range(len(self.widths) - 1, len(self.widths))
        return range(len(self.widths) if self.chooses else 1)

    def closed(self, layer: int) -> list[int]:
        """Indices into `widths` that layer `layer` + 1 may not run."""
        offered = self.offered(layer)
        return [i for i in range(len(self.widths)) if i not in offered]

    def width_at(self, layer: int, width: int) -> int:
        """Head units that a row of width `width` runs in layer `layer` + 1: all on offer from `wide_from` on."""
        return width if layer < self.wide_from else self.widths[-1]

    def sets_of(self, width: int) -> Tensor:
        """Bool [N, H], the best units of every layer at `width`."""
        sets = torch.zeros(self.layers, self.heads, dtype=torch.bool, device=self.price.device)
        for layer, ranked in enumerate(self.ranking()):
            sets[layer, ranked[: self.width_at(layer, width)]] = True
        return sets

    def run_on(self, view: View) -> Decision:
        """The decision to run every active row at its narrowest width, with the sets of inference."""
        context = self._features(view)
        width = torch.full_like(view.rows, self.offered(view.layer).start)
        sets, choice = self._pick_sets(view, context, width)
        return Decision(sets, choice, width + 1, context, torch.zeros_like(width, dtype=torch.bool), lasting=True)

    def would_spend(self, trace: Trace, price: float) -> Tensor:
        """float64 [B], the FLOPs fraction of each row at another price, from a trace in which every row ran on."""
        raise NotImplementedError

    def _spent(self, trace: Trace, widths: Tensor) -> Tensor:
        """float64 [B, N], fraction of dense FLOPs up to each layer if the layers run `widths` [B, N] (indices)."""
        wide = self._shares(widths.device)[widths] / self._executed_shares(trace)
        return (trace.layer_cost * wide).cumsum(-1)

    def _index_price(self, view: View) -> Tensor:
        """The price that arms are compared at.

        Exploiting, a negative one is a subsidy: a budget above what the policy wants is spent on the arms that gain
        most. Training, it would be spent on width, rows of a batch would run the same layer with many head sets, and no
        set would learn its part; below zero the arms are compared at no cost and depth is dealt out by `_carried_on`.
        """
        return self.price if view.mode == "exploit" else self.price.clamp_min(0.0)

    def _row_price(self, context: Tensor, price: float | Tensor) -> Tensor:
        """float64 [R], the price of a row's own dense run: `price` is that of a row of mean length.

        Costs are learned as shares of the row's dense FLOPs, while a budget counts the FLOPs of all rows: a layer of a
        row of twice the tokens takes twice as much from it. Until the mean is known all rows cost the same.
        """
        by_length = (context[:, 1] * LOG_LONGEST).exp() * (price / self.mean_tokens)
        return torch.where(self.mean_tokens > 0, by_length, price)  # a branch would wait for a GPU

    def expect_lengths(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Returns nothing; from now on `price` is that of a row of the mean length of these batches."""
        lengths = torch.cat([batch["attention_mask"].sum(-1) for batch in batches])
        self.mean_tokens.fill_(lengths.double().mean())

    def _carried_on(self, view: View) -> Tensor:
        """Bool [R], rows that run to the end whatever the policy wants: a share of -price, if that is above zero.

        They are drawn blindly, so that the deep exits also see what the policy would have let go.
        """
        share = -float(self.price)
        return self._row_draws(view, 4) < share if share > 0 else torch.zeros_like(view.rows, dtype=torch.bool)

    def _pick_sets(self, view: View, context: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Head sets [G, H] and each row's choice [R], given each row's width index (-1 = stops).

        Exploring: a joint posterior draw, then at most `max_sets` sets per width with the best sampled scores. Probing:
        the same with posterior means; one set that all rows share is the best at the mean context of training, as it
        will be served.
        Exploiting: the kept sets and posterior means, so that a row's sets do not depend on the rest of its batch.
        """
        arms = self._units_of(view.layer)
        device = width.device
        whole = view.layer >= self.wide_from and self.widths[-1] == self.heads  # all units run: none to choose
        if view.mode == "survey" or (whole and view.mode != "exploit"):
            return torch.ones(1, self.heads, dtype=torch.bool, device=device), width.clamp_max(0)
        if self.max_sets == 1 and view.mode == "exploit":
            return self.head_sets[view.layer, :, 0], width
        if self.max_sets == 1 and view.mode == "probe":
            return self._best_sets(view.layer), width
        if view.mode in ("exploit", "probe"):
            scores = mean_scores(self.units, context, arms)
        else:
            scores = sample_scores(self.units, context, self.sigma, self._generator(view.layer, 3), arms)
        sets, choice, total = [], torch.full_like(width, -1), 0
        for index in width.unique().tolist():
            if index < 0:
                continue
            rows = (width == index).nonzero()[:, 0]
            if self.widths[index] == self.heads:
                candidates = torch.ones(1, self.heads, dtype=torch.bool, device=device)
            elif view.mode == "exploit":
                candidates = self.head_sets[view.layer, index]
            else:
                candidates = codebook(scores[rows], self.widths[index], self.max_sets)
            choice[rows] = nearest_in_codebook(scores[rows], candidates) + total
            sets.append(candidates)
            total += len(candidates)
        return torch.cat(sets) if sets else torch.ones(1, self.heads, dtype=torch.bool, device=device), choice

    def _features(self, view: View) -> Tensor:
        return features(view, self.projection, self.task)

    def _shares(self, device: torch.device) -> Tensor:
        """float64 [K], x = k / H of every width."""
        return torch.tensor(self.widths, dtype=torch.float64, device=device) / self.heads

    def _with_width(self, context: Tensor, share: Tensor) -> Tensor:
        """Every row's context with the features of its width share x, [R, F + 3].

        Numbers of units are ordered, so what is learned of one says something of its neighbours, and the context's part
        is learned once for all.
        """
        return torch.cat([context, torch.stack([share, share.square(), share * context[:, 2]], -1)], -1)

    def _with_every_width(self, context: Tensor) -> Tensor:
        """Every row with every width in turn, [R * K, F + 3]."""
        shares = self._shares(context.device)
        return self._with_width(context.repeat_interleave(len(shares), 0), shares.repeat(len(context)))

    def _executed_shares(self, trace: Trace) -> Tensor:
        """float64 [B, N], share of the units that ran in each layer: what the arms are paid for."""
        return trace.units.sum(-1).to(torch.float64) / self.heads

    def decision_flops(self, layer: int, cost: CostModel) -> float:
        numbers = (1 + len(self.widths)) * (self.num_features + self.WIDTH_FEATURES) * 2
        return 2.0 * (numbers + self.num_features * self.heads + self.projection.numel())

    def _units_of(self, layer: int) -> slice:
        """The arms of `units` that are this layer's head units."""
        return slice(layer * self.heads, (layer + 1) * self.heads)

    # Learning

    def observe_units(self, *traces: Trace) -> None:
        """Semi-bandit update from gate gradients: each executed unit is paid |d loss / d gate|, scaled per layer.

        The gradient is the first-order change of the row's loss if the unit were removed (Michel et al. 2019,
        arXiv 1905.10650). Its size falls as training goes on, and the units that ran are the good ones, so the scale is
        such that they are paid on average what was expected of them: only their order and spread are news. Scaling them
        to a mean of 1 would wear down the best units until untried ones look better, and the sets would never settle.

        Several traces count as decided at once: what was expected of a unit is what was before all of them.
        """
        for context, weight, target in [self._paid_units(trace) for trace in traces if trace.gate_grads]:
            self.units.update(context, weight, target)

    def _paid_units(self, trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
        """Contexts, weights and targets of the update that a trace asks for."""
        rows, layers, heads = trace.units.shape
        value = torch.zeros(rows, layers, heads, dtype=torch.float64, device=trace.units.device)
        for layer, groups in trace.gate_grads.items():
            for row, units, grads in groups:
                value[row[:, None], layer, units[None, :]] += grads.double()
        value = value.abs()
        ran, context = trace.units, trace.context
        expected = torch.ones_like(value)
        if int(self.units.clock):
            expected = torch.einsum("bnf,nhf->bnh", context, self.units.mean().view(layers, heads, -1))
        total, hoped = value.sum((0, 2)), (expected * ran).sum((0, 2))
        scale = torch.where(hoped > 0, total / hoped, total / ran.sum((0, 2)).clamp_min(1))
        value = value / scale.clamp_min(1e-30)[None, :, None]
        good = (value.isfinite().all(-1) & ran.any(-1) & (scale > 0)).nonzero()
        row, at = good[:, 0], good[:, 1]
        weight = torch.zeros(len(good), layers, heads, dtype=torch.float64, device=value.device)
        target = torch.zeros_like(weight)
        pair = torch.arange(len(good), device=value.device)
        weight[pair, at] = self.unit_weight * ran[row, at].double()
        target[pair, at] = value[row, at]
        return context[row, at], weight.flatten(1), target.flatten(1)

    def finish_step(self) -> None:
        """Moves the random draws on; called once after each training or probe step."""
        self.step.add_(1)

    def check_sound(self) -> None:
        """Raises `ValueError` if a statistic is not finite or a posterior not positive definite, and names it."""
        for name, buffer in self.named_buffers():
            if not bool(buffer.isfinite().all()):
                raise ValueError(f"{name} of the policy is not finite")
        for posterior in (self.numbers, self.units):
            posterior.factor()

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets all numeric rewards: they were earned by other weights. The head units keep theirs."""
        for statistic in (self.numbers.gram, self.numbers.moment, self.numbers.pulls):
            statistic.zero_()
        self.numbers.invalidate()

    # Several ranks

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the statistics, for `delta_since` and `merge`."""
        return {f"{part}.{name}": value for part in PARTS for name, value in getattr(self, part).snapshot().items()}

    def delta_since(self, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this policy has learned since the snapshot."""
        return {
            f"{part}.{name}": value
            for part in PARTS
            for name, value in getattr(self, part).delta_since(_part(snapshot, part)).items()
        }

    @torch.no_grad()
    def merge(self, base: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]]) -> None:
        """Returns nothing; the policy becomes what one that saw the rows of all ranks would be.

        See `LinearPosterior.merge`.

        Args:
            base: the `snapshot` that all ranks started from.
            deltas: one `delta_since(base)` a rank, in the same order on every rank.
        """
        for part in PARTS:
            getattr(self, part).merge(_part(base, part), [_part(delta, part) for delta in deltas])

    # What serving needs

    @torch.no_grad()
    def fix_head_sets(self, contexts: Tensor) -> None:
        """Fixes the head sets that inference chooses among, from posterior means.

        A set that all rows share is the best at the mean context of the rows that trained in its layer. At the contexts
        of probed rows, all of which run every layer, the posteriors extrapolate, and name units that hardly ever ran.

        Args:
            contexts: float64 [B, N, F], contexts of probed rows, for several sets.
        """
        for layer in range(self.layers):
            if self.max_sets == 1:
                self.head_sets[layer, :, 0] = self._best_sets(layer)
                continue
            scores = mean_scores(self.units, contexts[:, layer], self._units_of(layer))
            for i, width in enumerate(self.widths):
                found = codebook(scores, width, self.max_sets)
                self.head_sets[layer, i] = found[0]
                self.head_sets[layer, i, : len(found)] = found

    def fix_curve(self, prices: Tensor, fractions: Tensor) -> None:
        """Keeps the (price, FLOPs fraction) pairs, at most `CURVE`, from which `set_budget` serves any budget."""
        spare = CURVE - len(prices)
        self.curve_price.copy_(torch.cat([prices, prices[-1:].expand(spare)]))
        self.curve_fraction.copy_(torch.cat([fractions, fractions[-1:].expand(spare)]))

    def set_budget(self, budget: float) -> None:
        """Sets the price at which the measured fraction is `budget` (as near as the curve allows)."""
        self.price.fill_(price_for(budget, self.curve_price, self.curve_fraction))

    def mean_context(self, layer: int) -> Tensor:
        """float64 [F], mean context seen at `layer` (feature 0 is the constant 1, so the Gram matrix holds it)."""
        gram = self.units.gram[self._units_of(layer)].sum(0)
        return gram[0] / gram[0, 0].clamp_min(1e-12)

    def ranking(self) -> Tensor:
        """int64 [N, H], head units of each layer, most useful first, at the mean context."""
        return torch.stack([self._ranked(layer) for layer in range(self.layers)])

    def _ranked(self, layer: int) -> Tensor:
        scores = mean_scores(self.units, self.mean_context(layer)[None], self._units_of(layer))
        return scores[0].argsort(descending=True, stable=True)

    def _best_sets(self, layer: int) -> Tensor:
        """Bool [K, H], the best units of a layer at every width."""
        place = self._ranked(layer).argsort()
        return place[None, :] < torch.tensor(self.widths, device=place.device)[:, None]
