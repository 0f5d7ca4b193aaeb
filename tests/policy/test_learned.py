"""Tree and integrated search: read-only deciding, exploration, learning from a trace, prices and budgets."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from builders import batch, dynamic_model
from dht.curve import measure_curve
from dht.hf.configuration import DHTConfig
from dht.measure import run_policy
from dht.policy.budget import price_for
from dht.policy.learned import CURVE
from dht.policy.reward import quality
from dht.training import DHTTrainer

SEARCHES = ("tree", "integrated")


def run(model, mode="exploit", rows=7, **kwargs):
    inputs = batch(tuple(range(3, 3 + rows)), seed=1)
    labels = inputs.pop("labels")
    return model(**inputs, labels=labels, mode=mode, **kwargs), labels


def state_of(model):
    return copy.deepcopy(model.policy.state_dict())


def taught(search="tree", rounds=8, **settings):
    """A policy that has seen that deeper exits are right and that shallow ones are not."""
    model = dynamic_model(search=search, **settings)
    for _ in range(rounds):
        output, _ = run(model, "probe")
        depth = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64).expand(7, 3)
        model.policy.observe(output.trace, depth)
        model.policy.finish_step()
    return model


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("mode", ["exploit", "explore", "probe", "survey"])
def test_deciding_changes_nothing(search, mode):
    model = taught(search, rounds=2)
    before = state_of(model)
    run(model, mode)
    for name, tensor in state_of(model).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("search", SEARCHES)
def test_same_seed_and_step_draw_the_same_and_the_next_step_does_not(search):
    first, second = taught(search), taught(search)
    assert torch.equal(run(first, "probe")[0].trace.units, run(second, "probe")[0].trace.units)
    second.policy.finish_step()
    plans = []
    for _ in range(4):
        second.policy.finish_step()
        plans.append(run(second, "probe")[0].trace.units)
    assert any(not torch.equal(plans[0], other) for other in plans[1:])


@pytest.mark.parametrize("search", SEARCHES)
def test_probe_runs_every_layer_and_survey_every_unit(search):
    model = taught(search)
    model.policy.price.fill_(10.0)
    assert run(model, "probe")[0].trace.layers.tolist() == [3] * 7
    assert bool(run(model, "survey")[0].trace.units.all())
    assert run(model, "exploit")[0].trace.layers.tolist() == [1] * 7


@pytest.mark.parametrize("search", SEARCHES)
def test_the_price_moves_the_choice_without_new_data(search):
    model = taught(search)
    spent = []
    for price in (0.0, 0.5, 5.0):
        model.policy.price.fill_(price)
        spent.append(run(model)[0].trace.flops_fraction)
    assert spent[0] > spent[-1]
    assert sorted(spent, reverse=True) == spent
    model.policy.price.fill_(0.0)
    assert run(model)[0].trace.layers.float().mean() > 2, "free compute and better deep exits: go deep"


def test_exploration_is_the_share_of_survey_steps():
    for exploration, expected in ((0.0, 0), (0.02, 2), (0.25, 25), (1.0, 100)):
        model = dynamic_model(exploration=exploration)
        modes = [
            DHTTrainer._mode(SimpleNamespace(dynamic=model, state=SimpleNamespace(global_step=step)))
            for step in range(100)
        ]
        assert modes.count("survey") == expected
        assert modes.count("explore") == 100 - expected


def test_optimism_acts():
    """An arm that nobody has tried is tried while exploring, and not while exploiting."""
    model = taught(alpha=50.0, exploration=0.0, train_widths="all")
    model.policy.numbers.gram[-1] = 0.0  # the last layer at full width: unseen again
    model.policy.numbers.moment[-1] = 0.0
    explored = run(model, "explore")[0].trace
    assert bool((explored.arm[:, 2] == len(model.policy.widths)).all())
    exploited = run(model, "exploit")[0].trace
    assert not bool((exploited.arm[:, 2] == len(model.policy.widths)).any())


@pytest.mark.parametrize("search", SEARCHES)
def test_one_pass_tells_what_every_price_spends(search):
    """What the curve says of a price is what the policy then executes, padding and its own arithmetic aside."""
    model = taught(search, widths=[2])
    model.policy.fix_head_sets(run(model, "probe")[0].trace.context)
    batches = [batch(tuple(range(3, 15)), seed=seed) for seed in range(6)]
    cost = measure_curve(model, batches, 0.3)
    assert cost > 0
    served = price_for(0.3, model.policy.curve_price, model.policy.curve_fraction)
    assert float(model.policy.price) == served
    spent = []
    for price, told in zip(model.policy.curve_price.tolist(), model.policy.curve_fraction.tolist(), strict=True):
        model.policy.price.fill_(price)
        executed = run_policy(model, batches).flops_fraction
        assert executed == pytest.approx(told, abs=0.03)
        spent.append(executed)
    assert len({round(fraction, 2) for fraction in spent}) > 2


@pytest.mark.parametrize("search", SEARCHES)
def test_from_wide_from_on_a_layer_offers_the_widest_only(search):
    model = taught(search, wide_from=1, widths=[2, 4])
    for mode, price in (("exploit", 0.0), ("exploit", 0.3), ("explore", 0.0), ("explore", -1.0), ("probe", 0.0)):
        model.policy.price.fill_(price)
        units = run(model, mode)[0].trace.units.sum(-1)
        assert set(units[:, 1:].flatten().tolist()) <= {0, 4}, (mode, price)
        assert set(units[:, 0].tolist()) <= {2, 4}
    assert model.policy.sets_of(2).sum(-1).tolist() == [2, 4, 4]
    assert dynamic_model(widths=[2, 5]).config.wide_from == 3, "the builder's own"
    assert DHTConfig(num_hidden_layers=6).wide_from == 4


@pytest.mark.parametrize("search", SEARCHES)
def test_training_rows_choose_their_width_only_if_asked(search):
    for train_widths, expected in (("narrowest", {0, 2}), ("all", {0, 2, 4, 5})):
        model = dynamic_model(search=search, alpha=0.0, train_widths=train_widths)
        model.policy.price.fill_(0.0)
        used = set()
        for _ in range(3):  # running on with all units is worth most, as the first rewards often say
            wide = torch.ones(1, model.policy.numbers.num_features, dtype=torch.float64)
            arms = model.policy.numbers.num_arms
            model.policy.numbers.update(wide, torch.full((1, arms), 1e4), torch.ones(1, arms, 2))
        for mode in ("explore", "probe"):
            for _ in range(4):
                trace = run(model, mode)[0].trace
                used |= set(trace.units.sum(-1).flatten().tolist()) if mode == "explore" else set()
                model.policy.finish_step()
        assert used <= expected
    assert len(set(run(model, "probe")[0].trace.units.sum(-1)[:, 0].tolist())) > 1, "held-out rows try every width"


def test_sigma_and_head_sets_act():
    plans = {}
    for sigma in (0.0, 5.0):
        model = taught(sigma=sigma)
        drawn = []
        model.policy.price.fill_(-1.0)  # every row runs to the end
        for _ in range(5):
            drawn.append(run(model, "explore")[0].trace.units)
            model.policy.finish_step()
        plans[sigma] = drawn
    width = int(plans[0.0][0][0, 0].sum())
    narrow = [units[units.sum(-1) == width].unique(dim=0) for units in plans[5.0]]
    assert len(torch.cat(narrow).unique(dim=0)) > 1, "a wide posterior draws different sets"
    steady = torch.cat([units[:, 0][units[:, 0].sum(-1) == width] for units in plans[0.0]])
    assert len(steady.unique(dim=0)) == 1, "without noise and knowledge of the units there is one set"


def test_gate_gradients_pay_the_units_that_ran():
    model = taught()
    before = model.policy.units.pulls.clone()
    output, _ = run(model, "explore", tap_gates=True)
    output.loss.backward()
    model.policy.observe_units(output.trace)
    pulled = (model.policy.units.pulls - before * model.policy.units.forgetting**21).view(3, 5)
    ran = output.trace.units.sum(0) > 0
    assert torch.equal(pulled > 0.1, ran)


def test_useful_units_are_ranked_first():
    """Units whose output is cut off get no gradient, so they end last."""
    model = dynamic_model()
    for block in model.encoder.blocks:
        for weight in (block.out_weight, block.down_weight):
            weight.data[1] = 0.0
    for _ in range(5):
        output, _ = run(model, "survey", tap_gates=True)
        output.loss.backward()
        model.policy.observe_units(output.trace)
        model.policy.finish_step()
    assert model.policy.ranking()[:, -1].tolist() == [1, 1, 1]
    model.policy.fix_head_sets(output.trace.context)
    assert not bool(model.policy.head_sets[:, :2, :, 1].any())
    assert model.policy.head_sets.sum(-1).unique().tolist() == [2, 4, 5]


def test_one_set_for_all_rows_is_the_one_that_trained():
    """Units that did well for the rows that train are served, whatever other contexts make of the posteriors."""
    model = taught(train_widths="narrowest")
    policy = model.policy
    for _ in range(3):
        output, _ = run(model, "explore", tap_gates=True)
        output.loss.backward()
        policy.observe_units(output.trace)
        policy.finish_step()
    far = torch.randn(50, 3, policy.num_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy.fix_head_sets(50 * far)
    assert torch.equal(policy.head_sets[:, 0, 0], policy.sets_of(2))
    probed = run(model, "probe")[0].trace.units
    assert bool((probed == policy.head_sets[:, 0, 0]).all()), "held-out rows run what will be served"


def test_integrated_learns_all_shallower_arms_at_once():
    model = dynamic_model(search="integrated")
    output, labels = run(model, "survey")
    model.policy.observe(output.trace, quality(output.trace, labels))
    assert bool((model.policy.numbers.pulls > 6).all()), "seven rows, each paid for every depth"


def test_set_budget_reads_the_curve():
    model = dynamic_model()
    prices = torch.logspace(-2, 1, CURVE, dtype=torch.float64)
    model.policy.fix_curve(prices, torch.linspace(0.9, 0.1, CURVE, dtype=torch.float64))
    model.policy.set_budget(0.9)
    assert float(model.policy.price) == pytest.approx(0.01)
    model.policy.set_budget(0.1)
    assert float(model.policy.price) == pytest.approx(10.0)


def test_non_finite_gate_gradients_are_left_out():
    model = taught()
    output, _ = run(model, "explore", tap_gates=True)
    output.loss.backward()
    _, _, grads = output.trace.gate_grads[0][0]
    grads[0] = float("nan")
    model.policy.observe_units(output.trace)
    assert bool(model.policy.units.moment.isfinite().all())


def test_below_zero_the_price_deals_out_depth_and_not_width():
    for search in ("tree", "integrated"):
        model = dynamic_model(search=search)
        inputs = batch((6,) * 40)
        inputs.pop("labels")
        model.policy.price.fill_(0.0)
        free = model(**inputs, mode="explore").trace
        for price, share in ((-1.0, 1.0), (-0.5, 0.5)):
            model.policy.price.fill_(price)
            trace = model(**inputs, mode="explore").trace
            deep = trace.layers == 3
            assert bool((trace.layers >= free.layers).all())
            assert float(deep.double().mean()) >= share - 0.2
            assert torch.equal(trace.units[:, 0].sum(-1), free.units[:, 0].sum(-1)), "widths are as at no price"


def test_folded_greedy_weights_equal_the_index():
    model = taught(rounds=4)
    policy = model.policy
    context = torch.randn(9, policy.num_features, dtype=torch.float64)
    context[:, 0] = 1.0
    for price in (torch.zeros(9), torch.linspace(-0.3, 0.6, 9)):
        for layer in range(3):
            plain = policy._index(layer, context, 0.0, price)
            torch.testing.assert_close(policy._greedy(layer, context, price), plain)
    policy.numbers.update(torch.ones(1, 14, dtype=torch.float64), torch.ones(1, 6), torch.ones(1, 6, 2))
    plain = policy._index(1, context, 0.0, price)
    torch.testing.assert_close(policy._greedy(1, context, price), plain, msg="kept weights follow the posterior")


def test_one_row_decides_as_it_does_among_others():
    """Alone it decides in plain numbers: the same arm, set, context and wish, also after everything has changed."""
    model = taught(rounds=4, context_projection=0, head_sets=1).eval()
    policy = model.policy
    inputs = batch((3, 9, 4, 12, 7), seed=3)
    del inputs["labels"]
    seen = set()
    for turn, price in enumerate((-0.2, 0.0, 0.05, 0.1, 0.3)):
        policy.price.fill_(price)
        policy.mean_tokens.fill_(6.0 * (turn % 2))
        policy.numbers.update(torch.ones(1, 11, dtype=torch.float64), torch.ones(1, 6), torch.ones(1, 6, 2))
        policy.head_sets.copy_(policy.head_sets.roll(1, -1))
        with torch.no_grad():
            together = model(**inputs).trace
            for i, mask in enumerate(inputs["attention_mask"]):
                alone = model(**{k: v[i : i + 1, : mask.sum()] for k, v in inputs.items()}).trace
                assert isinstance(alone.decisions[0][1].context, list), "tensors were made for one row"
                assert torch.equal(alone.arm[0], together.arm[i])
                assert torch.equal(alone.wants_stop[0], together.wants_stop[i])
                assert torch.equal(alone.units[0], together.units[i])
                torch.testing.assert_close(alone.context[0], together.context[i], atol=1e-5, rtol=1e-5)
                seen.add((int(alone.layers), int(alone.units.sum())))
    assert len(seen) > 3, "rows that all do the same test little"


@pytest.mark.parametrize("search", SEARCHES)
def test_a_long_row_pays_for_its_tokens(search):
    policy = taught(search, rounds=4).policy
    context = torch.zeros(3, policy.num_features, dtype=torch.float64)
    context[:, 0] = 1.0
    context[:, 1] = torch.tensor([10.0, 20.0, 40.0], dtype=torch.float64).log() / math.log(512)
    policy.mean_tokens.zero_()
    assert policy._row_price(context, 0.3).tolist() == [0.3, 0.3, 0.3], "all alike until lengths are known"
    mask = torch.ones(4, 30, dtype=torch.long)
    mask[2:, 10:] = 0
    policy.expect_lengths([{"attention_mask": mask}])
    torch.testing.assert_close(policy._row_price(context, 0.3), torch.tensor([0.15, 0.3, 0.6], dtype=torch.float64))
    saved = policy.state_dict()
    del saved["mean_tokens"]
    policy.load_state_dict(saved)
    assert float(policy.mean_tokens) == 0.0, "an older run charges all rows alike, as it was trained"


def test_the_prior_is_one_confidence_threshold_at_the_narrowest_width_and_does_not_fade():
    model = dynamic_model(forgetting=0.9)
    policy = model.policy
    sure = torch.linspace(0.4, 0.99, 60, dtype=torch.float64)
    context = torch.zeros(60, policy.num_features, dtype=torch.float64)
    context[:, 0], context[:, 1], context[:, 2], context[:, 3], context[:, 6] = 1.0, 0.5, sure, sure.square(), 1.0
    context[:, 4], context[:, 5], context[:, 7] = 1 - sure, 2 * sure - 1, sure
    blind = torch.zeros_like(context)
    blind[:, :2] = context[:, :2]
    left = []
    for layer in range(3):
        index = policy._index(layer, context if layer else blind, 0.0, torch.full((60,), 0.3))
        assert index[:, 1:].argmax(-1).eq(0).all(), "the narrowest width"
        if layer:
            stops = index.argmax(-1) == 0
            assert stops.tolist() == sorted(stops.tolist()), "the surer, the sooner it leaves"
            left.append(int(stops.sum()))
    assert min(left) > 0
    assert max(left) - min(left) <= 6, "one threshold for all layers"
    pulls = policy.numbers.pulls[2:].clone()
    for _ in range(30):
        run(model, "probe")
        output, labels = run(model, "probe")
        policy.observe(output.trace, quality(output.trace, labels))
    assert bool((policy.numbers.pulls[2:] >= 0.99 * pulls).all())
