"""The rivals of a comparison, one by one, on a small model: what each does, and that its cost is what was asked."""

from __future__ import annotations

import pytest
import torch

from builders import batch, dynamic_model, random_plan
from dht.compare.arms import all_arms, best_fixed, fixed_policy, oracle
from dht.compare.dropping import progressive_cost, progressive_layers, random_layers, run_layers
from dht.compare.matching import match_confidence, match_plans, match_price, nearest
from dht.compare.policies import Cascade, ShuffledPolicy
from dht.compare.trainings import mean_exit_loss, static_sets
from dht.measure import Outcome, run_policy, time_policy
from dht.policy.baselines import ConfidencePolicy, DensePolicy, StaticPolicy
from dht.rivals import match_exits

LENGTHS = tuple(range(3, 15))


def held(count=10, seed=50):
    return [batch(LENGTHS, seed=seed + i) for i in range(count)]


def taught(**settings):
    made = dynamic_model(**settings)
    for i in range(6):
        inputs = batch(LENGTHS, seed=i)
        inputs.pop("labels")
        trace = made(**inputs, mode="probe").trace
        made.policy.observe(trace, torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64).expand(len(LENGTHS), 3))
        made.policy.finish_step()
    return made


@pytest.fixture
def model():
    return taught()


def test_nearest_finds_the_step_of_a_staircase():
    asked = []

    def fraction(price):
        asked.append(price)
        return 0.9 if price < 0.3 else 0.4 if price < 0.55 else 0.2

    price, met = nearest(fraction, 0.02, 0.4)
    assert 0.3 <= price < 0.55
    assert met == 0.4
    assert len(asked) <= 12
    assert nearest(lambda price: 0.5, 0.02, 0.1)[1] == 0.5, "a policy that cannot be made cheaper"


def test_our_price_meets_the_budget_on_validation():
    model = taught(widths=[5])  # with several, all rows change their first width at one price: a step
    met = match_price(model, None, held(), 0.6, torch.float32)
    assert met == pytest.approx(0.6, abs=0.05)
    assert run_policy(model, held()).flops_fraction == met


def plans_like_ours(model):
    """An outcome in which every row has a plan of its own."""
    outcome = run_policy(model, held())
    outcome.units = random_plan(len(outcome.labels)).units
    return outcome


@pytest.mark.parametrize("kind", ["random", "hash", "length"])
def test_blind_rivals_spend_the_budget(model, kind):
    outcome = plans_like_ours(model)
    for budget in (0.35, 0.6):
        policy = match_plans(model, kind, held(), outcome, budget, torch.float32)
        assert run_policy(model, held(), policy).flops_fraction == pytest.approx(budget, rel=0.06)


def test_random_differs_from_hash_with_seed_0(model):
    outcome = plans_like_ours(model)
    both = [match_plans(model, kind, held(), outcome, 0.5, torch.float32, 0) for kind in ("random", "hash")]
    assert not torch.equal(*(run_policy(model, held(), policy).units for policy in both))


def test_shuffled_decides_on_another_rows_context(model):
    inputs = batch(LENGTHS, seed=3)
    inputs.pop("labels")
    plain = model(**inputs).trace.context[:, 0]
    policy = ShuffledPolicy(model.policy)
    mixed = model(**inputs, policy=policy).trace.context[:, 0]
    assert not torch.allclose(plain, mixed)
    torch.testing.assert_close(plain.sort(0).values, mixed.sort(0).values)
    again = model(**inputs, policy=policy).trace
    assert torch.equal(again.context[:, 0], mixed), "a batch is always shuffled alike"


def test_shuffled_of_integrated_search_is_shuffled_once():
    model = dynamic_model(search="integrated")
    inputs = batch(LENGTHS, seed=3)
    inputs.pop("labels")
    trace = model(**inputs, policy=ShuffledPolicy(model.policy)).trace
    for layer in range(1, 3):
        ran = trace.arm[:, layer] >= 0
        assert torch.equal(trace.arm[ran, layer], trace.arm[ran, 0])


def test_shuffled_is_matched_to_the_budget():
    model = taught(widths=[5])
    policy = ShuffledPolicy(model.policy)
    assert match_price(model, policy, held(), 0.6, torch.float32) == pytest.approx(0.6, abs=0.05)


def test_a_cascade_pays_for_both_models(model):
    big = dynamic_model(seed=1)
    first = StaticPolicy(1, 2, model.policy.ranking())
    alone, dense = run_policy(model, held(), first), run_policy(big, held(), DensePolicy(5))
    nobody = run_policy(Cascade(model, first, big, 0.0), held())
    assert torch.equal(nobody.flops, alone.flops)
    everybody = run_policy(Cascade(model, first, big, 2.0), held())
    assert torch.equal(everybody.predictions, dense.predictions)
    torch.testing.assert_close(everybody.flops, alone.flops + dense.flops)
    for budget in (0.4, 0.8):
        cascade = Cascade(model, first, big, match_confidence(alone, 1.0, budget))
        assert run_policy(cascade, held()).flops_fraction == pytest.approx(budget, abs=0.06)
    assert match_confidence(alone, 1.0, 0.01) == 0.0
    assert match_confidence(alone, 1.0, 5.0) == float("inf")
    timing = time_policy(cascade, held(2), repeats=1)
    assert set(timing.seconds) == {"dht", "dense", "transformers"}


@pytest.mark.parametrize("rule", ["confidence", "patience"])
def test_exit_rules_on_a_pruned_network(model, rule):
    sets = static_sets(model, 2, 3)
    never = run_policy(model, held(), ConfidencePolicy(sets, 2.0))
    assert never.layers.unique().tolist() == [2]
    found = match_exits(rule, model, sets, 0.3, held())
    outcome = run_policy(model, held(), found.policy)
    assert found.affordable
    assert outcome.flops_fraction == pytest.approx(0.3, abs=0.05)
    assert rule == "patience" or outcome.accuracy == found.accuracy
    assert outcome.units.sum(-1).unique().tolist() == [0, 3]
    assert not match_exits(rule, model, sets, 0.01, held()).affordable


def test_the_best_fixed_arm_spends_the_budget_and_beats_every_affordable_arm(model):
    arms = all_arms(model, held(), torch.float32)
    for index, (layers, units) in enumerate(arms.shapes):
        sets = model.policy.ranking().argsort(-1) < units
        sets[layers:] = False
        outcome = run_policy(model, held(), ConfidencePolicy(sets, 2.0))  # passes every exit on the way
        assert torch.equal(arms.answers[:, index], outcome.predictions)
        torch.testing.assert_close(arms.flops[:, index], outcome.flops)
    dealt, words = best_fixed(arms, 0.5)
    chosen = arms.accuracy[dealt].mean(), arms.cost[dealt].mean()
    assert chosen[1] <= 0.5 + 1e-3
    assert chosen[0] >= arms.accuracy[arms.cost <= 0.5].max() - 1e-3
    assert set(words) <= {"arm", "dearer_arm", "share_dearer"}
    outcome = run_policy(model, held(), fixed_policy(arms, dealt, model.device))
    assert outcome.flops_fraction == pytest.approx(float(chosen[1]), abs=0.04)
    assert best_fixed(arms, 0.01)[1]["arm"] == list(arms.shapes[int(arms.cost.argmin())])


def test_the_oracle_is_at_least_as_right_as_every_policy_of_its_arms(model):
    arms, own = all_arms(model, held(), torch.float32), run_policy(model, held())
    best = oracle(arms, own)
    assert best.accuracy >= max(own.accuracy, float(arms.accuracy.max()))
    right = best.predictions == best.labels
    # The cheapest right arm: nothing that is right costs less.
    for index in range(len(arms.shapes)):
        also = right & (arms.answers[:, index] == arms.labels)
        assert (best.flops[also] <= arms.flops[also, index]).all()
    assert (best.flops[~right] <= own.flops[~right]).all()
    assert isinstance(best, Outcome)


def test_all_layers_kept_is_the_dense_model(model):
    inputs = batch(LENGTHS, seed=1)
    labels = inputs.pop("labels")
    dense = model(**inputs, policy=DensePolicy(5)).trace
    kept = run_layers(model, inputs, [0, 1, 2])
    torch.testing.assert_close(kept.logits, dense.logits)
    torch.testing.assert_close(kept.flops, dense.flops)
    some = run_layers(model, inputs, [0, 2])
    assert float(some.flops.sum() / dense.flops.sum()) == pytest.approx(2 / 3, abs=0.02)
    assert some.units.any(-1)[0].tolist() == [True, False, True]
    exits = model(**inputs, policy=ConfidencePolicy(torch.ones(3, 5, dtype=torch.bool), 2.0)).trace
    each = [torch.nn.functional.cross_entropy(e.logits, labels) for e in exits.exits]
    torch.testing.assert_close(mean_exit_loss(exits, labels), sum(each) / 3)


def test_layers_are_dropped_as_often_as_they_should():
    generator = torch.Generator().manual_seed(0)
    keep = random_layers(6, 1.56)
    drawn = [keep(0.5, generator) for _ in range(2000)]
    assert sum(map(len, drawn)) / 2000 == pytest.approx(1.56, abs=0.03)
    assert {len(layers) for layers in drawn} == {1, 2}
    assert all(sum(layer in layers for layers in drawn) / 2000 == pytest.approx(0.26, abs=0.04) for layer in range(6))
    keep = progressive_layers(6, 0.5)
    share = sum(len(keep(step / 4000, generator)) for step in range(4000)) / (6 * 4000)
    assert share == pytest.approx(progressive_cost(6, 0.5), abs=0.015)
    assert keep(0.0, generator) == [0, 1, 2, 3, 4, 5], "it starts dense"
