"""How exits add up: weights fitted to held-out rows, what they change in a trace, and that nothing is run again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import dht.train as training
from builders import batch, dynamic_model
from dht.errors import ConfigError
from dht.load import load_run
from dht.mixture import LEXICAL, OWN, fit_mixture, mixed_anew
from dht.model.execute import execute
from dht.model.reference import reference
from dht.plan import Plan
from dht.policy.baselines import FixedPlan
from test_lexical import lexical_model
from test_train import encoder, finished, sentences, settings  # noqa: F401  (fixtures)

LENGTHS = tuple(range(3, 43))
WEIGHTS = [[0.5, 2.0, 0.0, 0.0], [0.25, -1.0, 0.5, 0.0], [0.0, 0.125, 0.0, 1.5]]


def held_out(model, seeds=6):
    """Traces of probed rows, their inputs and their labels."""
    batches = [batch(LENGTHS, seed) for seed in range(seeds)]
    labels = [made.pop("labels") for made in batches]
    with torch.no_grad():
        return [model(**made, mode="probe").trace for made in batches], batches, labels


@pytest.mark.parametrize("lexical", [True, False])
def test_the_executor_adds_up_as_the_reference_does(lexical):
    model = lexical_model() if lexical else dynamic_model(exit_memory=0.5)
    model.encoder.mixture = WEIGHTS
    made = batch(LENGTHS)
    made.pop("labels")
    units = torch.zeros(len(LENGTHS), 3, 5, dtype=torch.bool)
    for layer in range(3):
        units[layer:, layer, layer:] = True  # other heads in each layer; some rows leave after one layer or two
    trace = execute(model.encoder, FixedPlan(Plan(units)), **made)
    expected = reference(model.encoder, Plan(units), **made)
    for exit_ in trace.exits:
        if exit_.layer:
            torch.testing.assert_close(exit_.logits, expected[exit_.layer - 1][exit_.rows], atol=1e-5, rtol=1e-5)


def test_a_useful_exit_counts_and_noise_does_not():
    model = lexical_model()
    traces, _, labels = held_out(model, 12)
    for trace, truth in zip(traces, labels, strict=True):
        for exit_ in trace.exits:  # the second exit knows, the others guess
            useful = exit_.layer == 2
            noise = torch.randn(len(truth), 3, generator=torch.Generator().manual_seed(exit_.layer))
            exit_.own = (3.0 * F.one_hot(truth, 3).float()[exit_.rows] if useful else 0.0) + noise[exit_.rows]
    fit_mixture(model, traces, labels)
    first, second, third = model.config.exit_mixture
    assert model.encoder.mixture == model.config.exit_mixture == model.config.mixture
    assert (first[2:], second[3:]) == ([0.0, 0.0], [0.0])
    assert abs(first[0]) < LEXICAL
    assert second[2] > OWN > 0.2 > max(map(abs, second[:2]))
    assert third[2] > 0.5 > max(abs(third[0]), abs(third[1]), abs(third[3]))


def test_few_rows_change_little():
    model = lexical_model()
    traces, _, labels = held_out(model, 1)
    fit_mixture(model, [traces[0]], [labels[0]])
    for exit_, row in enumerate(model.config.exit_mixture, start=1):
        prior = [LEXICAL] + [0.0] * (exit_ - 1) + [OWN]
        assert row[: exit_ + 1] == pytest.approx(prior, abs=0.5)


@pytest.mark.parametrize("options", [{}, {"train_widths": "narrowest"}])
@pytest.mark.parametrize("lexical", [True, False])
def test_mixing_a_trace_anew_is_running_it_anew(lexical, options):
    model = lexical_model(**options) if lexical else dynamic_model(exit_memory=0.5, **options)
    model.policy.restart()
    model.policy.price.fill_(0.1)
    traces, batches, _ = held_out(model, 2)
    model.encoder.mixture = WEIGHTS
    for trace, made in zip(traces, batches, strict=True):
        with torch.no_grad():
            expected = model(**made, mode="probe").trace
        anew = mixed_anew(model, trace)
        torch.testing.assert_close(anew.logits, expected.logits)
        torch.testing.assert_close(anew.exit_table()[0], expected.exit_table()[0])
        torch.testing.assert_close(anew.context, expected.context)
        assert torch.equal(anew.wants_stop, expected.wants_stop)
        assert not torch.equal(anew.context, trace.context)
        assert torch.equal(anew.units, trace.units)
        assert torch.equal(anew.flops, trace.flops)


def test_training_fits_and_saves_it(finished):  # noqa: F811
    model, _ = load_run(finished[0])
    rows = model.config.exit_mixture
    assert [len(row) for row in rows] == [4, 4, 4]
    assert model.encoder.mixture == rows
    assert rows[2][3] != OWN


def test_exits_that_answer_alone_are_not_mixed(settings, tmp_path):  # noqa: F811
    fitted = training.fit(replace(settings, out=tmp_path / "run", epochs=1), options={"exit_memory": 0.0})
    assert fitted.model.config.exit_mixture is None
    assert fitted.model.encoder.mixture is None


def test_a_mixture_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="exit_mixture: must have 3 rows of 4 numbers, one a layer"):
        dynamic_model(exit_mixture=[[1.0, 2.0]])
    with pytest.raises(ConfigError, match="exit_mixture: got .*, allowed: null, or a list of numbers for every layer"):
        dynamic_model(exit_mixture=[["a"]])
