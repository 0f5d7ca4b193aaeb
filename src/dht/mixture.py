"""How exits add up when serving: what each of them counts in an answer, fitted to held-out rows after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from .hf.modeling import DHTForSequenceClassification
from .model.execute import mixed
from .plan import Exit, Trace
from .policy.base import View
from .policy.tree import TreePolicy

OWN, LEXICAL = 0.6, 0.3
"""What an exit's own logits and those of the lexical exit count before any row has spoken; the others nothing."""
STRENGTH = 20.0
"""Rows that this is worth: the weight of squared distances from it."""
STEPS = 50
"""Of L-BFGS, at most."""


@torch.no_grad()
def fit_mixture(model: DHTForSequenceClassification, traces: Sequence[Trace], labels: Sequence[Tensor]) -> None:
    """Fits what every exit counts in the answer after each layer, and keeps it in the model and its configuration.

    Exits that saw different layers err differently, and those of a short training are too sure of themselves: a number
    for each of them makes answers better, and their confidence comparable from one depth to the next.

    Args:
        traces: of held-out rows that ran every layer. labels: of each trace's rows.
    """
    encoder, task = model.encoder, model.task
    truth, layers = torch.cat(list(labels)), len(encoder.blocks)
    own = torch.cat([_own(trace) for trace in traces])
    first = 1 - int(encoder.lexical is not None)  # number of the first exit there is
    rows = []
    for exit_ in range(1, layers + 1):
        seen = own[:, : exit_ - first + 1]
        prior = seen.new_zeros(seen.shape[1])
        prior[0] = LEXICAL if not first else 0.0
        prior[-1] = OWN
        weights = fitted_weights(seen, truth, prior, task)
        rows.append([0.0] * first + weights.tolist() + [0.0] * (layers - exit_))
    model.config.exit_mixture = encoder.mixture = rows


def _own(trace: Trace) -> Tensor:
    """Every exit's own logits, float32 [B, e, C], the rows in the batch's order."""
    ordered = []
    for exit_ in trace.exits:
        own = cast(Tensor, exit_.own).float()
        ordered.append(own.new_empty(own.shape).index_copy(0, exit_.rows, own))
    return torch.stack(ordered, 1)


def fitted_weights(seen: Tensor, labels: Tensor, prior: Tensor, task: Any) -> Tensor:
    """What each of several answers counts in their sum, float [e], so that the sum is right as often as it is sure.

    Args:
        seen: logits [n, e, C] of held-out rows. labels: of these rows.
        prior: float [e], where it starts, and stays where rows have nothing to say.
    """
    weights = prior.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            logits = (seen * weights[:, None]).sum(1)
            total = task.losses(logits, labels).mean() + STRENGTH / len(labels) * (weights - prior).square().sum()
            total.backward()
        found: Tensor = total.detach()
        return found

    optimizer.step(loss)
    return weights.detach()


@torch.no_grad()
def mixed_anew(model: DHTForSequenceClassification, trace: Trace) -> Trace:
    """The trace of a probe as it would be had its exits added up as they do now: nothing is run again.

    Head sets and arms stay; answers, contexts and where the greedy rule would stop are worked out anew.
    """
    policy, own = cast(TreePolicy, model.policy), _own(trace)
    mixture = model.encoder.mixture_on(own.device)
    assert mixture is not None, "exits that answer alone have nothing to mix"
    every = torch.arange(len(own), device=own.device)
    answers = {0: own[:, 0]} if model.encoder.lexical is not None else {}
    for layer, weights in enumerate(mixture, start=1):
        answers[layer] = mixed(own[:, : len(answers) + 1], weights)
    exits = [Exit(layer, every, answers[layer], own[:, i]) for i, layer in enumerate(answers)]
    anew = replace(trace, exits=exits, logits=answers[len(mixture)], decisions=list(trace.decisions))
    for layer, (rows, decision) in enumerate(trace.decisions):
        if layer in answers:
            context, wants_stop = policy.reconsider(_view(anew, layer, rows, answers))
            anew.decisions[layer] = rows, replace(decision, context=context, wants_stop=wants_stop)
    return anew


def _view(trace: Trace, layer: int, rows: Tensor, answers: dict[int, Tensor]) -> View:
    """What a policy saw before layer `layer` + 1, without hidden states."""
    packed: Any = SimpleNamespace(rows=rows, lengths=trace.account.lengths[rows])
    previous = answers[layer - 1][rows] if layer - 1 in answers else None
    nothing = torch.empty(0)
    return View(layer, packed, answers[layer][rows], previous, nothing, nothing, trace, "probe")
