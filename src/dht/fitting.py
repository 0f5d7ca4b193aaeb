"""`dht.fit`: a budget dial for a classifier that is already fine-tuned. Its weights stay as they are, bit for bit.

Every layer gets an exit head and the policy its posteriors, from a few hundred texts and the full model's own answers
to them. Labels only tell what the dial costs in accuracy. Rewards on fitted rows lie, so the policy is paid, and its
prices are measured, with exits that were fitted without the row at hand (cross-fitting).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .curve import keep_curve
from .data import Text, split_of
from .errors import DataError, DHTError, listed, shown
from .exits import fit_exits, lent
from .hf.convert import convert
from .hf.modeling import DHTForSequenceClassification
from .load import by_length, check_budget, tokenise
from .measure import Batch, Outcome, run_policy
from .model.encoder import ExitHead, Stack
from .policy.base import Policy
from .policy.baselines import ConfidencePolicy, DensePolicy
from .policy.reward import quality
from .rivals import match_exits

FOLDS = 5
FEWEST_ROWS = 50
BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.33, 0.26, 0.2, 0.15)

Run = Callable[[Policy | None], Outcome]
"""Runs a policy (None = the learned one) on some rows."""


@dataclass
class Fit:
    """A frozen classifier with a budget dial.

    Attributes:
        model: ready to serve; `model.policy.set_budget(b)` turns the dial, a full plan gives the original's logits.
        folds: batches of the fit rows, fold by fold; their labels are the given ones, or the full model's answers.
        exits: of each fold, fitted without its rows.
        labelled: whether labels were given.
    """

    model: DHTForSequenceClassification
    folds: list[list[Batch]]
    exits: list[Stack[ExitHead]]
    labelled: bool

    def run(self, policy: Policy | None = None) -> Outcome:
        """What a policy does on the fit rows, each answered by exits that never saw it."""
        parts = []
        for exits, batches in zip(self.exits, self.folds, strict=True):
            with lent(self.model.encoder, exits):
                parts.append(run_policy(self.model, batches, policy))
        joined = {
            f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Outcome) if f.name != "task"
        }
        return Outcome(**joined, task=self.model.task)

    def dial(
        self, budgets: Sequence[float] = BUDGETS, run: Run | None = None, labelled: bool | None = None
    ) -> list[dict[str, Any]]:
        """One dict a budget: `figures` of the learned policy, and under `confidence` those of the threshold rival.

        Both run on the same exits, with the price and the threshold at which the cross-fitted fit rows meet the budget.

        Args:
            budgets: fractions of dense FLOPs in (0, 1].
            run: on which rows; None = the fit rows, cross-fitted.
            labelled: whether those rows have labels; None = if the fit rows have.
        """
        model, run = self.model, run or self.run
        heads = model.config.num_attention_heads
        sets = torch.ones(model.config.num_hidden_layers, heads, dtype=torch.bool, device=model.device)
        flat = [batch for fold in self.folds for batch in fold]
        known, full = self.run(ConfidencePolicy(sets, 2.0)), run(DensePolicy(heads))
        labelled = self.labelled if labelled is None else labelled
        points = []
        for budget in budgets:
            model.policy.set_budget(check_budget(budget))
            rule = match_exits("confidence", model, sets, budget, flat, outcome=known).policy
            rival = figures(run(rule), full, labelled)
            points.append({"budget": budget} | figures(run(None), full, labelled) | {"confidence": rival})
        model.policy.set_budget(model.config.budget)
        return points

    @property
    def lowest(self) -> float:
        """The smallest fraction that any budget can reach: every row leaves at the first exit."""
        return float(self.model.policy.curve_fraction.min())


def figures(outcome: Outcome, full: Outcome, labelled: bool) -> dict[str, float]:
    """flops_fraction, mean_layers, agreement with the full model on the same rows; with labels also accuracy."""
    found = {
        "flops_fraction": outcome.flops_fraction,
        "mean_layers": float(outcome.layers.double().mean()),
        "agreement": float((outcome.predictions == full.predictions).double().mean()),
    }
    return found | ({"accuracy": outcome.accuracy} if labelled else {})


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    labels: Sequence[int | str] | None = None,
    *,
    budget: float = 0.5,
    max_length: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Fit:
    """A dynamic model with the weights and the head of a fine-tuned classifier, and a policy that serves any budget.

    The texts run three times through the encoder: for the full model's answers, for the exits, for the policy. Only
    depth is chosen: a unit less costs a network that never trained without it more than a layer less does.

    Args:
        model: a `transformers` sequence classifier of one of the families, or a dynamic one; it is not changed.
        tokenizer: that of `model`.
        texts: `FEWEST_ROWS` or more, all single or all pairs; a few hundred are enough. Better not those that `model`
            was trained on.
        labels: a class index or name for each text; None = accuracy stays unknown. Nothing is fitted to them.
        budget: fraction of dense FLOPs that the model serves until it is told otherwise, in (0, 1].
        max_length: tokens that a text is cut to.
        batch_size: rows that run together.
        seed: of the folds.
        device: where to run; None = where `model` is.

    Raises:
        DataError: too few texts, or labels that do not fit.
        DHTError: no classification head, or one for another task; a family that does not convert.
    """
    check_budget(budget)
    dynamic = _depth_only(model, budget, seed)
    classes = _indices(texts, labels, dynamic.config.label_names)
    cast(nn.Module, dynamic).to(device or model.device).eval()
    rows = tokenise(tokenizer, split_of(texts, classes, "texts"), max_length)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    folds = [by_length(tokenizer, [rows[i] for i in order[k::FOLDS]], batch_size)[0] for k in range(FOLDS)]
    folds = [[{name: x.to(dynamic.device) for name, x in batch.items()} for batch in fold] for fold in folds]
    flat = [batch for fold in folds for batch in fold]

    full = run_policy(dynamic, flat, DensePolicy(dynamic.config.num_attention_heads))
    if len(full.predictions.unique()) < 2:
        name = dynamic.config.label_names[int(full.predictions[0])]
        raise DataError(f"texts: the model answers {shown(name)} to all {len(rows)}; give texts of several classes")
    if labels is None:
        for batch, answers in zip(flat, full.predictions.split([len(b["labels"]) for b in flat]), strict=True):
            batch["labels"] = answers.to(dynamic.device)
    teacher = full.exit_logits[:, -1].softmax(-1).to(dynamic.device)
    sizes = torch.tensor([sum(len(batch["labels"]) for batch in fold) for fold in folds])
    fold = torch.arange(FOLDS).repeat_interleave(sizes).to(dynamic.device)
    fitted = Fit(dynamic, folds, fit_exits(dynamic.encoder, flat, teacher, fold), labels is not None)
    _pay(fitted)
    return fitted


@torch.no_grad()
def _pay(fitted: Fit) -> None:
    """Gives the policy its posteriors and prices: an exit is worth 1 if it answers as the full model does."""
    model, traces = fitted.model, []
    model.policy.restart()
    model.policy.expect_lengths(batch for batches in fitted.folds for batch in batches)
    for exits, batches in zip(fitted.exits, fitted.folds, strict=True):
        with lent(model.encoder, exits):
            for batch in batches:
                inputs = {name: part for name, part in batch.items() if name != "labels"}
                trace = model(**inputs, mode="probe").trace
                answers = trace.exit_table()[0][:, -1].argmax(-1)
                model.policy.observe(trace, quality(trace, answers, model.task))
                model.policy.finish_step()
                traces.append(trace)
    keep_curve(model.policy, traces, model.config.budget)


def _depth_only(model: PreTrainedModel, budget: float, seed: int) -> DHTForSequenceClassification:
    """A dynamic model whose rows choose their depth alone, every layer with all units.

    Raises:
        DHTError: there is no head to keep, or it is none of a single-label classifier.
    """
    config = model.config
    kind = type(model).__name__
    if not kind.endswith("ForSequenceClassification"):
        raise DHTError(
            f"model: {kind} has no sequence classification head to keep; fine-tune one first, or train a dynamic model"
            " from this encoder with dht train"
        )
    task = getattr(config, "problem_type", None) or "single_label_classification"
    outputs = int(config.num_labels or 0)
    if task != "single_label_classification" or outputs < 2:
        raise DHTError(
            f"model: a dial is fitted to classifiers with one label a text; this one has {outputs} output(s)"
            f" and problem_type {task!r}"
        )
    settings: dict[str, Any] = {
        "widths": [config.num_attention_heads], "search": "tree", "pooling": "attention", "budget": budget,
        "policy_seed": seed, "lexical_pairs": 0,
    }  # fmt: skip
    if isinstance(model, DHTForSequenceClassification):
        config = copy.deepcopy(model.config)
        config.last_pooling = config.last_pooling or config.pooling
        for name, value in settings.items():
            setattr(config, name, value)
        dynamic = DHTForSequenceClassification(config)
        kept = {k: v for k, v in model.encoder.state_dict().items() if k in dynamic.encoder.state_dict()}
        dynamic.encoder.load_state_dict(kept, strict=False)
    else:
        dynamic = convert(model, **settings)
    if dynamic.config.num_hidden_layers < 2:
        raise DHTError("model: it has one layer, so there is no depth to choose")
    return dynamic


def _indices(texts: Sequence[Text], labels: Sequence[int | str] | None, names: dict[int, str]) -> list[int]:
    """The class index of every text; zeros where there are no labels.

    Raises:
        DataError: texts or labels that cannot be used.
    """
    if isinstance(texts, str) or len(texts) < FEWEST_ROWS:
        count = 1 if isinstance(texts, str) else len(texts)
        raise DataError(f"texts: got {count}, a dial needs {FEWEST_ROWS} or more (a few hundred are better)")
    for i, text in enumerate(texts):
        parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise DataError(f"texts: number {i} is {shown(text)}; allowed: strings with something in them, or pairs")
    if labels is None:
        return [0] * len(texts)
    if len(labels) != len(texts):
        raise DataError(f"labels: got {len(labels)} for {len(texts)} texts; give one each, or None")
    known: dict[Any, int] = {name: i for i, name in names.items()} | {i: i for i in names}
    for i, label in enumerate(labels):
        if label not in known:
            raise DataError(f"labels: number {i} is {shown(label)}; allowed: {listed(known)}")
    return [known[label] for label in labels]
