"""The exit before layer 1: what it reads, how it is fitted, and that rows which are sure of it run no layer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import dht.train as training
from builders import LENGTHS, batch, dynamic_model
from dht.bench.parity import check_parity
from dht.compare.arms import all_arms, best_fixed, fixed_policy
from dht.convolution import fit_convolution, fitting_cost
from dht.curve import ToTheEnd, keep_curve
from dht.errors import ConfigError
from dht.hf.modeling import exit_loss
from dht.lexical import fit_lexical
from dht.load import load_run
from dht.measure import run_policy
from dht.model.convolution import Convolution
from dht.model.execute import execute
from dht.model.lexical import LexicalExit
from dht.model.reference import lexical_reference, reference
from dht.plan import Plan
from dht.policy.baselines import ConfidencePolicy, DensePolicy, FixedPlan, PriorPolicy
from dht.policy.reward import quality, quality_at_once
from dht.predict import predict
from dht.rivals import match_exits
from dht.task import SINGLE_LABEL
from test_train import encoder, finished, sentences, settings  # noqa: F401  (fixtures)

PAIRS, FILTERS = 64, 4


def lexical_model(**options):
    """A small model whose lexical exit has opinions."""
    model = dynamic_model(lexical_pairs=PAIRS, **{"lexical_filters": FILTERS, "exit_memory": 0.5, **options})
    generator = torch.Generator().manual_seed(3)
    for table in model.encoder.lexical.buffers():
        table.copy_(2.0 * torch.randn(table.shape, generator=generator))
    return model


def inputs_of(lengths=LENGTHS, seed=0):
    made = batch(lengths, seed)
    return made.pop("labels"), made


def plan_with_none():
    """Every second row runs no layer, the others one or two."""
    units = torch.zeros(len(LENGTHS), 3, 5, dtype=torch.bool)
    units[1::2, 0, :3] = True
    units[3::4, 1] = True
    return Plan(units)


# What it reads


def test_it_reads_each_token_and_each_pair_once():
    exit_ = LexicalExit(10, 4, 2)
    ids, mask = torch.tensor([[3, 5, 3, 5, 9], [7, 0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    seen, share = exit_.features(ids, mask)
    pairs = {10 + (a * 1_000_003 + b * 7_919) % 4 for a, b in ((3, 5), (5, 3))}
    assert set(seen[0][share[0] > 0].tolist()) == {3, 5} | pairs
    assert share[0].square().sum() == pytest.approx(1.0)
    assert (seen[1][share[1] > 0].tolist(), share[1].max()) == ([7], 1.0)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("ids", [[8], [8, 6], [8, 6, 9], [8, 6, 9, 8, 4]], ids=len)
def test_padding_changes_nothing(left, ids):
    exit_ = lexical_model().encoder.lexical
    ids, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
    sides = (2, 0) if left else (0, 2)
    torch.testing.assert_close(exit_(F.pad(ids, sides, value=4), F.pad(mask, sides)), exit_(ids, mask))


@pytest.mark.parametrize("filters", [0, FILTERS])
def test_the_reference_agrees(filters):
    model = lexical_model(lexical_filters=filters)
    assert (model.encoder.lexical.convolution is not None) == bool(filters)
    _, inputs = inputs_of((1, 2, *LENGTHS))
    expected = lexical_reference(model.encoder, inputs["input_ids"], inputs["attention_mask"].bool())
    torch.testing.assert_close(model.encoder.lexical(**inputs), expected)
    for i, row in enumerate(expected):  # one row goes another way
        one = {name: x[i : i + 1] for name, x in inputs.items()}
        torch.testing.assert_close(model.encoder.lexical(**one)[0], row)


# What the executor does with it


def test_rows_without_a_layer_answer_with_it_and_the_others_add_it_up():
    model = lexical_model()
    _, inputs = inputs_of()
    plan = plan_with_none()
    trace = execute(model.encoder, FixedPlan(plan), **inputs)
    exits = reference(model.encoder, plan, **inputs)
    first = lexical_reference(model.encoder, inputs["input_ids"], inputs["attention_mask"].bool())
    expected = torch.stack([first, *exits], 1)[torch.arange(len(LENGTHS)), plan.layers]
    torch.testing.assert_close(trace.logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(trace.layers, plan.layers)
    alone = reference(model.encoder, plan, **inputs, alone=True)[0]
    torch.testing.assert_close(exits[0], alone + 0.5 * first)


def test_a_row_without_a_layer_pays_for_its_words_alone():
    model = lexical_model()
    _, inputs = inputs_of()
    trace = execute(model.encoder, FixedPlan(plan_with_none()), **inputs)
    cost = model.encoder.cost.lexical(torch.tensor(LENGTHS))
    assert torch.equal(trace.flops[::2], cost[::2])
    assert cost[0] == (2 * LENGTHS[0] - 1) * 2 * 3 + 2 * FILTERS * (3 * LENGTHS[0] + 2 * 3)
    assert bool((trace.flops[1::2] > cost[1::2]).all())


@pytest.mark.parametrize("mode", ["explore", "survey"])
def test_training_steps_do_not_read_it(mode):
    model = lexical_model()
    labels, inputs = inputs_of()
    trace = model(**inputs, labels=labels, mode=mode).trace
    assert min(e.layer for e in trace.exits) == 1
    assert bool((trace.layers > 0).all())
    assert quality_at_once(trace, labels) is None
    model.train()
    exit_loss(model(**inputs, mode="explore", every_exit=True).trace, labels).backward()
    assert all(not table.requires_grad for table in model.encoder.lexical.buffers())


def test_one_row_decides_as_a_batch_does():
    model = lexical_model()
    taught(model)
    _, inputs = inputs_of(tuple(range(3, 15)))
    for price in (0.0, 0.1, 0.5):
        model.policy.price.fill_(price)
        together = model(**inputs).trace
        for i in range(12):
            one = model(**{name: x[i : i + 1] for name, x in inputs.items()}).trace
            assert int(one.layers) == int(together.layers[i])
            torch.testing.assert_close(one.logits[0], together.logits[i], atol=1e-5, rtol=1e-5)


def test_bench_compares_rows_without_a_layer_too():
    model = lexical_model()
    check_parity(model, batch(), {"plan": FixedPlan(plan_with_none()), "dense": DensePolicy(5)}, gradients=True)


# What the policy learns


def taught(model, rounds=6):
    """A policy that has seen what every exit is worth, with the price at which half is spent."""
    traces = []
    model.policy.restart()
    for seed in range(rounds):
        labels, inputs = inputs_of(tuple(range(3, 15)), seed)
        trace = model(**inputs, mode="probe").trace
        model.policy.observe(trace, quality(trace, labels), quality_at_once(trace, labels))
        traces.append(model(**inputs, policy=ToTheEnd(model.policy)).trace)
    with torch.no_grad():
        keep_curve(model.policy, traces, 0.5)
    return traces


def test_leaving_at_once_is_paid_what_the_exit_is_worth():
    """Where the lexical exit is always right and the others never are, every row leaves at once."""
    layers = []
    for right in (1.0, 0.0):
        model = lexical_model(forgetting=1.0)
        model.policy.price.fill_(0.01)
        for seed in range(60):
            _, inputs = inputs_of(tuple(range(3, 43)), seed)
            trace = model(**inputs, mode="probe").trace
            others = torch.full((40, 3), 1 - right, dtype=torch.float64)
            model.policy.observe(trace, others, torch.full((40,), right, dtype=torch.float64))
        layers.append(model(**inputs).trace.layers)
    assert bool((layers[0] == 0).all())
    assert bool((layers[1] > 0).all())


def test_the_price_moves_rows_from_all_layers_to_none():
    model = lexical_model()
    traces = taught(model)
    _, inputs = inputs_of(tuple(range(3, 15)))
    ran = []
    for price in (-1.0, 0.3, 10.0):
        model.policy.price.fill_(price)
        ran.append(model(**inputs).trace.layers.double().mean())
    assert ran[0] > ran[1] > ran[2] == 0
    assert float(model.policy.would_spend(traces[0], 10.0).sum()) == 0.0


def test_the_prior_leaves_when_sure():
    model = lexical_model()
    model.policy.restart()
    model.policy.price.fill_(0.3)
    _, inputs = inputs_of(tuple(range(3, 43)))
    trace = model(**inputs).trace
    sure = model.encoder.lexical(**inputs).softmax(-1).amax(-1)
    assert 0 < int((trace.layers == 0).sum()) < 40
    assert sure[trace.layers == 0].min() > sure[trace.layers > 0].max() - 0.2


# Rivals on the same weights


def test_the_threshold_rival_may_leave_at_once():
    model = lexical_model()
    held = [batch(tuple(range(3, 43)), seed) for seed in range(4)]
    sets = torch.ones(3, 5, dtype=torch.bool)
    found = match_exits("confidence", model, sets, 0.2, held)
    outcome = run_policy(model, held, found.policy)
    assert found.affordable
    assert outcome.flops_fraction == pytest.approx(0.2, abs=0.07)
    assert int((outcome.layers == 0).sum()) > 0
    assert outcome.at_once.shape == (160, 3)
    assert match_exits("patience", model, sets, 0.5, held).affordable


def test_leaving_at_once_is_a_fixed_arm():
    model = lexical_model()
    held = [batch(tuple(range(3, 43)), 0)]
    arms = all_arms(model, held, torch.float32)
    assert arms.shapes[-1] == (0, 0)
    none = run_policy(model, held, PriorPolicy(torch.zeros(1, 3, 5, dtype=torch.bool), "hash"))
    assert torch.equal(arms.answers[:, -1], none.predictions)
    assert torch.equal(arms.flops[:, -1], none.flops)
    dealt, _ = best_fixed(arms, 0.05)
    spent = run_policy(model, held, fixed_policy(arms, dealt, model.device))
    assert spent.flops_fraction < 0.15
    for i, (depth, width) in enumerate(arms.shapes[:-1]):  # an arm costs and answers what running it does
        plan = FixedPlan(Plan(arms.plans[i].expand(40, -1, -1)))
        ran = run_policy(model, held, plan)
        assert torch.equal(arms.answers[:, i], ran.predictions), (depth, width)
        assert float(arms.flops[:, i].sum()) == pytest.approx(float(ran.flops.sum()), rel=0.02)


def test_confidence_alone_never_stops_before_layer_1_where_nothing_was_read():
    model = dynamic_model()
    _, inputs = inputs_of()
    assert bool(
        (model(**inputs, policy=ConfidencePolicy(torch.ones(3, 5, dtype=torch.bool), 0.0)).trace.layers == 1).all()
    )


# Fitting


def worded_batches(rows=400, seed=0):
    """Rows whose class is told by one word in two thirds of them, and by a pair of words in the others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 90, (rows, 8), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    ids[:, 3] = torch.where(labels == 1, 7, 8)
    third = torch.arange(rows) % 3 == 0
    ids[third, 3], ids[third, 4] = 11, torch.where(labels[third] == 1, 12, 13)
    swapped = third & (torch.arange(rows) % 2 == 0)
    ids[swapped, 3], ids[swapped, 4] = torch.where(labels[swapped] == 1, 13, 12), 11
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [{name: x[i : i + 50] for name, x in made.items()} for i in range(0, rows, 50)]


def fitted(embeddings, rows=400):
    exit_ = LexicalExit(97, 256, 2)
    held = worded_batches(200, seed=1)
    flops = fit_lexical(exit_, embeddings, worded_batches(rows), held, SINGLE_LABEL)
    logits = torch.cat([exit_(b["input_ids"], b["attention_mask"]) for b in held])
    return exit_, logits, torch.cat([b["labels"] for b in held]), flops


def test_it_learns_words_and_the_order_of_two_words():
    _, logits, labels, flops = fitted(torch.zeros(97, 4))
    assert float((logits.argmax(-1) == labels).double().mean()) > 0.95
    assert flops > 0


@pytest.mark.parametrize("filters", [0, FILTERS])
def test_it_is_as_sure_as_it_is_right(filters):
    """Of held-out rows a tenth has the wrong label: no scale of the logits says them better."""
    exit_, held = LexicalExit(97, 256, 2, filters), worded_batches(200, seed=1)
    for wrong in held:
        wrong["labels"][::10] = 1 - wrong["labels"][::10]
    fit_lexical(exit_, torch.randn(97, 4), worded_batches(), held, SINGLE_LABEL)
    logits = torch.cat([exit_(b["input_ids"], b["attention_mask"]) for b in held])
    labels = torch.cat([b["labels"] for b in held])
    best = min(F.cross_entropy(scale * logits, labels) for scale in 2.0 ** (torch.arange(-12, 13) / 4))
    assert float(F.cross_entropy(logits, labels)) < float(best) + 0.005


def test_filters_learn_where_a_word_stands():
    """Class 1 has its two words with one between them, in this order; the other class has them the other way round."""
    embeddings = torch.randn(97, 64, generator=torch.Generator().manual_seed(0))
    convolution = Convolution(97, 16, 2)

    def rows(seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(20, 90, (800, 8), generator=generator)
        labels = torch.randint(0, 2, (800,), generator=generator)
        place, every = torch.randint(0, 6, (800,), generator=generator), torch.arange(800)
        ids[every, place], ids[every, place + 2] = 7 + labels, 8 - labels
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return [{name: x[i : i + 200] for name, x in made.items()} for i in range(0, 800, 200)]

    flops = fit_convolution(convolution, embeddings, [*rows(0), *rows(1), *rows(2)], SINGLE_LABEL)
    held = rows(3)
    right = [convolution(b["input_ids"], b["attention_mask"]).argmax(-1) == b["labels"] for b in held]
    assert float(torch.cat(right).double().mean()) > 0.9
    tokens = sum(len(ids.unique()) for seed in range(3) for b in rows(seed) for ids in b["input_ids"].split(64))
    assert flops == pytest.approx(fitting_cost(64, 16, tokens), rel=0.3)
    again = Convolution(97, 16, 2)
    fit_convolution(again, embeddings, [*rows(0), *rows(1), *rows(2)], SINGLE_LABEL)
    assert torch.equal(again.table, convolution.table)


def test_words_that_no_row_has_say_what_words_like_them_say():
    embeddings = torch.randn(97, 16, generator=torch.Generator().manual_seed(0))
    embeddings[5], embeddings[6] = embeddings[7], embeddings[8]  # 5 is like 7, 6 like 8; no row has 5 or 6
    exit_, *_ = fitted(embeddings)
    lean = exit_.weight[:, 1] - exit_.weight[:, 0]
    assert lean[7] > lean[5] > 0 > lean[6] > lean[8]


# In a training


def test_a_training_has_it_and_serves_with_it(finished):  # noqa: F811
    model, tokenizer = load_run(finished[0])
    assert 0.4 < finished[1]["lexical_accuracy"] < 1
    assert model.config.lexical_pairs > 0
    assert float(model.encoder.lexical.weight.abs().sum()) > 0
    assert model.config.lexical_filters == len(model.encoder.lexical.convolution.bias) > 0
    assert float(model.encoder.lexical.convolution.table.abs().sum()) > 0
    told = [
        json.loads(json.dumps(row))
        for row in predict(model, tokenizer, ["good", "what a dull film it is"], details=True)
    ]
    assert all(len(row["heads"]) == len(row["exits"]) - 1 == row["layers"] for row in told)
    model.policy.price.fill_(100.0)
    (row,) = predict(model, tokenizer, ["good"], details=True)
    assert (row["layers"], row["heads"], len(row["exits"])) == (0, [], 1)
    assert row["exits"][0] == {"prediction": row["label"], "score": row["score"]}
    assert row["label"] in ("negative", "positive")


def test_without_it_every_row_runs_a_layer(settings, tmp_path):  # noqa: F811
    fitted_ = training.fit(replace(settings, out=tmp_path / "run", lexical=False))
    assert fitted_.model.encoder.lexical is None
    assert fitted_.model.config.lexical_pairs == 0


def test_filters_can_be_left_out(settings, tmp_path):  # noqa: F811
    fitted_ = training.fit(replace(settings, out=tmp_path / "run", epochs=1), options={"lexical_filters": 0})
    assert fitted_.model.encoder.lexical.convolution is None
    assert float(fitted_.model.encoder.lexical.weight.abs().sum()) > 0


@pytest.mark.parametrize("changes", [{"search": "integrated"}, {"dense": True, "train_budget": None}])
def test_where_there_is_none(settings, tmp_path, changes):  # noqa: F811
    assert training.fit(replace(settings, out=tmp_path / "run", epochs=1, **changes)).model.encoder.lexical is None


@pytest.mark.parametrize("options", [{"search": "integrated"}, {"problem_type": "multi_label_classification"}])
def test_it_is_for_single_labels_in_tree_search(options):
    with pytest.raises(ConfigError, match="lexical_pairs: got 64; allowed: 0 but for single labels and search='tree'"):
        dynamic_model(lexical_pairs=PAIRS, **options)


def test_filters_need_the_exit():
    with pytest.raises(ConfigError, match="lexical_filters: got 4; allowed: 0 where lexical_pairs is 0"):
        dynamic_model(lexical_filters=FILTERS)
