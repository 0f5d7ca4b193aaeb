"""The methods: ours and every rival of the protocol, each with what it trains and what it serves.

A rival is given what ours is given: the same splits, tokens, recipe and seeds, and validation to choose on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..policy.baselines import DensePolicy, PriorPolicy, StaticPolicy
from ..rivals import match_exits
from .arms import all_arms, best_fixed, fixed_policy, oracle
from .cells import Bench, Served
from .matching import match_confidence, match_plans, match_price
from .policies import Cascade, ShuffledPolicy
from .settings import CompareSettings
from .shapes import Sizes
from .trainings import Training, read_record, static_sets


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        group: "ours", "inference", "training" (rivals of the one or the other), "reference" or "bound".
        line: what it is, in words.
        trainings: the models whose weights it needs at (budget, seed).
        serve: what it does at (budget, seed).
        per_budget: False if it has one cell a seed, at budget 1.
    """

    group: str
    line: str
    trainings: Callable[[CompareSettings, Sizes, float, int], list[Training]]
    serve: Callable[[Bench, float, int], Served]
    per_budget: bool = True


def ours(settings: CompareSettings, sizes: Sizes, budget: float, seed: int, variant: str = "") -> list[Training]:
    """Our model, trained at the budget."""
    return [Training("dht", seed, budget, variant=variant)]


def serve_ours(bench: Bench, budget: float, seed: int, variant: str = "") -> Served:
    """Our method at the budget that it was trained for, or a variant of it."""
    training = Training("dht", seed, budget, variant=variant)
    model, met = bench.ours(training, budget)
    return Served(model, None, [training], {"price": float(model.policy.price), "met_on_validation": met})


def _largest(settings: CompareSettings, sizes: Sizes, budget: float, seed: int) -> list[Training]:
    return [Training("dht", seed, max(settings.budgets))]


def _serve_largest(bench: Bench, budget: float, seed: int) -> Served:
    training = Training("dht", seed, max(bench.settings.budgets))
    model, met = bench.ours(training, budget)
    choice = {"trained_at": training.budget, "price": float(model.policy.price), "met_on_validation": met}
    return Served(model, None, [training], choice)


def _dense(settings: CompareSettings, sizes: Sizes, budget: float, seed: int) -> list[Training]:
    return [Training("dense", seed)]


def _serve_dense(bench: Bench, budget: float, seed: int) -> Served:
    training = Training("dense", seed)
    return Served(bench.model(training), DensePolicy(bench.sizes.heads), [training])


# Static sub-networks


def _statics(settings: CompareSettings, sizes: Sizes, budget: float, seed: int) -> list[Training]:
    shapes = sizes.shapes(budget, settings.candidates)
    return [Training("static", seed, layers=layers, units=units) for layers, units in shapes]


def _serve_static(bench: Bench, budget: float, seed: int) -> Served:
    """The candidate that is most accurate on validation; all were trained to the end."""
    tried = _statics(bench.settings, bench.sizes, budget, seed)
    scores = {}
    for training in tried:
        model = bench.model(training)
        policy = StaticPolicy(training.layers, training.units, model.policy.ranking())
        scores[training] = bench.outcome(model, bench.validation(seed), policy).accuracy
    best = max(tried, key=scores.__getitem__)
    model = bench.model(best)
    choice = {"shape": [best.layers, best.units], "validation": {t.key: scores[t] for t in tried}}
    policy = StaticPolicy(best.layers, best.units, model.policy.ranking())
    return Served(model, policy, [best], choice, tried=tried)


def _serve_cut(bench: Bench, budget: float, seed: int) -> Served:
    """Our model, cut to one shape for all rows: the shape that is most accurate on validation."""
    training = Training("dht", seed, budget)
    model = bench.model(training)
    scores = {}
    for shape in bench.sizes.shapes(budget, 2 * bench.settings.candidates):
        policy = StaticPolicy(*shape, model.policy.ranking())
        scores[shape] = bench.outcome(model, bench.validation(seed), policy).accuracy
    best = max(scores, key=scores.__getitem__)
    return Served(model, StaticPolicy(*best, model.policy.ranking()), [training], {"shape": list(best)})


# Rivals on our own weights


def _serve_fixed(bench: Bench, budget: float, seed: int) -> Served:
    training = Training("dht", seed, budget)
    model, met = bench.ours(training, budget)
    arms = all_arms(model, bench.validation(seed), bench.dtype)
    dealt, words = best_fixed(arms, met)
    return Served(model, fixed_policy(arms, dealt, model.device), [training], words)


def _serve_lexical(bench: Bench, budget: float, seed: int) -> Served:
    training = Training("dht", seed, budget)
    model = bench.model(training)
    none = torch.zeros(bench.sizes.layers, bench.sizes.heads, dtype=torch.bool, device=model.device)
    return Served(model, PriorPolicy(none[None], "hash"), [training], {})


def _serve_blind(kind: str, bench: Bench, budget: float, seed: int) -> Served:
    """Plans dealt out by chance, by a hash or by length, as often as our policy picks them, at its FLOPs."""
    training = Training("dht", seed, budget)
    model, met = bench.ours(training, budget)
    held = bench.validation(seed)
    policy = match_plans(model, kind, held, bench.outcome(model, held), met, bench.dtype, seed)
    return Served(model, policy, [training], {"matched_to": met})


def _serve_threshold(bench: Bench, budget: float, seed: int) -> Served:
    """A confidence threshold in the place of our policy, at the width that our training rows run."""
    training = Training("dht", seed, budget)
    model, met = bench.ours(training, budget)
    sets = model.policy.sets_of(model.policy.widths[0])
    found = match_exits("confidence", model, sets, met, bench.validation(seed), bench.dtype)
    return Served(model, found.policy, [training], {"threshold": found.threshold, "matched_to": met})


def _serve_shuffled(bench: Bench, budget: float, seed: int) -> Served:
    training = Training("dht", seed, budget)
    model, met = bench.ours(training, budget)
    policy = ShuffledPolicy(model.policy, seed)
    now = match_price(model, policy, bench.validation(seed), met, bench.dtype)
    return Served(model, policy, [training], {"price": float(model.policy.price), "met_on_validation": now})


def _serve_oracle(bench: Bench, budget: float, seed: int) -> Served:
    training = Training("dht", seed, budget)
    model, _ = bench.ours(training, budget)
    test = bench.batches(seed, bench.held_out(seed))
    own = bench.outcome(model, test)
    return Served(model, None, [training], outcome=oracle(all_arms(model, test, bench.dtype), own))


# Exit rules


def _exit_models(settings: CompareSettings, sizes: Sizes, budget: float, seed: int) -> list[Training]:
    return [Training("exits", seed, layers=sizes.layers, units=sizes.heads)]


def _pruned_exit_models(settings: CompareSettings, sizes: Sizes, budget: float, seed: int) -> list[Training]:
    """Two pruned networks with exits: all layers, both dimensions' shares alike; two thirds of them, a third dearer."""
    width = max(1, min(sizes.heads, round(sizes.heads * math.sqrt(budget))))
    layers = max(1, math.ceil(sizes.layers * 2 / 3))
    units = max(1, min(sizes.heads, round(4 / 3 * budget * sizes.layers * sizes.heads / layers)))
    shapes = dict.fromkeys([(sizes.layers, width), (layers, units)])
    return [Training("exits", seed, layers=depth, units=count) for depth, count in shapes]


def _serve_exits(rule: str, pruned: bool, bench: Bench, budget: float, seed: int) -> Served:
    """The network whose rule, matched to the budget, is most accurate on validation."""
    tried = (_pruned_exit_models if pruned else _exit_models)(bench.settings, bench.sizes, budget, seed)
    found = []
    for training in tried:
        model = bench.model(training)
        sets = static_sets(model, training.layers, training.units)
        found.append((training, match_exits(rule, model, sets, budget, bench.validation(seed), bench.dtype)))
    training, best = max(found, key=lambda pair: (pair[1].affordable, pair[1].accuracy))
    choice = {"shape": [training.layers, training.units], "threshold": best.threshold}
    return Served(bench.model(training), best.policy, [training], choice, tried=tried)


# Two models


def _pair(settings: CompareSettings, sizes: Sizes, budget: float, seed: int) -> list[Training]:
    """A static model at half the budget, and the dense one: the other half pays for the rows that go on to it."""
    layers, units = sizes.shapes(budget / 2, 1)[0]
    return [Training("static", seed, layers=layers, units=units), Training("dense", seed)]


def _serve_cascade(bench: Bench, budget: float, seed: int) -> Served:
    first, second = _pair(bench.settings, bench.sizes, budget, seed)
    small, big = bench.model(first), bench.model(second)
    policy = StaticPolicy(first.layers, first.units, small.policy.ranking())
    outcome = bench.outcome(small, bench.validation(seed), policy)
    threshold = match_confidence(outcome, 1.0, budget)
    choice = {"shape": [first.layers, first.units], "threshold": threshold}
    return Served(Cascade(small, policy, big, threshold), None, [first, second], choice)


# Rivals in training: given what ours took, served densely


def _matched(
    kind: str, match: str, settings: CompareSettings, sizes: Sizes, budget: float, seed: int
) -> list[Training]:
    return [Training(kind, seed, budget, match=match)]


def _serve_matched(kind: str, match: str, bench: Bench, budget: float, seed: int) -> Served:
    training = Training(kind, seed, budget, match=match)
    record = read_record(bench.settings, training)
    model = bench.model(training)
    policy: Any = DensePolicy(bench.sizes.heads)
    if kind == "smaller-dense":
        policy = StaticPolicy(record["layers"], bench.sizes.heads, model.policy.ranking())
    notes = ("share", "layers", "mean_depth", "theta", "matched_flops")
    return Served(model, policy, [training], {name: record[name] for name in notes if name in record})


def _rival(kind: str, match: str, line: str) -> Method:
    return Method("training", line, partial(_matched, kind, match), partial(_serve_matched, kind, match))


METHODS = {
    "dense": Method("reference", "the full model, one exit, linear decay", _dense, _serve_dense, per_budget=False),
    "dht": Method("ours", "trained and served at the budget", ours, serve_ours),
    "dht-served": Method("ours", "trained at the largest budget, served at this one", _largest, _serve_largest),
    "static": Method("inference", "L layers of K units by gate gradients, trained alone", _statics, _serve_static),
    "static-cut": Method("inference", "our model cut to one shape for all rows", ours, _serve_cut),
    "lexical": Method(
        "inference", "our exit before layer 1 alone (training costs: our whole model's)", ours, _serve_lexical
    ),
    "fixed": Method("inference", "best fixed arm of our model, or the best mixture of two", ours, _serve_fixed),
    "random": Method("inference", "our arms at our frequencies, by chance", ours, partial(_serve_blind, "random")),
    "hash": Method("inference", "our arms at our frequencies, by a hash", ours, partial(_serve_blind, "hash")),
    "length": Method("inference", "our arms at our frequencies, by length", ours, partial(_serve_blind, "length")),
    "shuffled": Method("inference", "our policy on another row's context", ours, _serve_shuffled),
    "confidence-same": Method("inference", "leaves when sure; our weights, widths and exits", ours, _serve_threshold),
    "confidence": Method(
        "inference", "leaves when sure; mean loss of all exits, full width", _exit_models,
        partial(_serve_exits, "confidence", False),
    ),
    "patience": Method(
        "inference", "leaves when exits agree; mean loss of all exits, full width", _exit_models,
        partial(_serve_exits, "patience", False),
    ),
    "confidence-pruned": Method(
        "inference", "leaves when sure; exits on a statically pruned network", _pruned_exit_models,
        partial(_serve_exits, "confidence", True),
    ),
    "patience-pruned": Method(
        "inference", "leaves when exits agree; exits on a statically pruned network", _pruned_exit_models,
        partial(_serve_exits, "patience", True),
    ),
    "epsilon-greedy": Method(
        "inference", "our policy, exploring by epsilon-greedy", partial(ours, variant="epsilon-greedy"),
        partial(serve_ours, variant="epsilon-greedy"),
    ),
    "cascade": Method("inference", "a small static model, then dense if not sure", _pair, _serve_cascade),
    "oracle": Method("bound", "the cheapest right arm: reads the label", ours, _serve_oracle),
    "dense-decay": _rival("dense-decay", "flops", "dense, fewer steps, fully decayed; our training FLOPs"),
    "dense-decay-seconds": _rival("dense-decay", "seconds", "the same; our training seconds"),
    "smaller-dense": _rival("smaller-dense", "flops", "the first layers, trained alone; our training FLOPs"),
    "layer-dropout": _rival("layer-dropout", "flops", "random layers left out; our training FLOPs"),
    "layer-dropout-seconds": _rival("layer-dropout", "seconds", "the same; our training seconds"),
    "progressive": _rival("progressive", "flops", "progressive layer dropping; our training FLOPs"),
}  # fmt: skip
"""Every method by the name that `--methods` takes."""

DEFAULT = tuple(name for name in METHODS if name != "dht-served")
"""What `dht compare` runs unasked: all of them, but not one model at other budgets than its own."""
