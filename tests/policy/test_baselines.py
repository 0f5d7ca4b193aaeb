"""The rival policies: what each one does, and that matching to a budget holds."""

from __future__ import annotations

import pytest
import torch

from builders import batch, dynamic_model
from dht.errors import DHTError
from dht.measure import run_policy
from dht.policy.baselines import ConfidencePolicy, PatiencePolicy, PriorPolicy
from dht.rivals import rival

SETS = torch.ones(3, 5, dtype=torch.bool)


def batches(count=6, seed=0):
    return [batch(tuple(range(2, 12)), seed=seed + i) for i in range(count)]


@pytest.fixture(scope="module")
def model():
    made = dynamic_model()
    for i in range(6):
        inputs = batch(tuple(range(2, 12)), seed=i)
        inputs.pop("labels")
        trace = made(**inputs, mode="probe").trace
        made.policy.observe(trace, torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64).expand(10, 3))
        made.policy.finish_step()
    return made


def test_confidence_leaves_at_the_first_sure_exit(model):
    never = run_policy(model, batches(), ConfidencePolicy(SETS, 2.0))
    assert never.layers.unique().tolist() == [3]
    sure = never.exit_logits.softmax(-1).amax(-1)
    threshold = float(sure.median())
    outcome = run_policy(model, batches(), ConfidencePolicy(SETS, threshold))
    passes = sure > threshold
    passes[:, -1] = True
    assert torch.equal(outcome.layers, passes.int().argmax(-1) + 1)


def test_patience_counts_agreements(model):
    answers = run_policy(model, batches(), ConfidencePolicy(SETS, 2.0)).exit_logits.argmax(-1)
    assert run_policy(model, batches(), PatiencePolicy(SETS, 0.0)).layers.unique().tolist() == [1]
    once = run_policy(model, batches(), PatiencePolicy(SETS, 1.0)).layers
    assert torch.equal(once == 2, answers[:, 0] == answers[:, 1])
    between = run_policy(model, batches(), PatiencePolicy(SETS, 0.5)).layers.float().mean()
    assert 1 < between < once.float().mean()


def test_prior_policies_ignore_the_content_and_keep_the_frequencies():
    model = dynamic_model()
    plans = torch.zeros(4, 3, 5, dtype=torch.bool)
    for i, depth in enumerate((1, 1, 2, 3)):
        plans[i, :depth] = True
    lengths = torch.tensor([10, 20, 40, 80])
    many = [batch((4,) * 50, seed=i) for i in range(20)]
    for kind in ("random", "hash"):
        policy = PriorPolicy(plans, kind)
        share = torch.bincount(run_policy(model, many, policy).layers, minlength=4) / 1000
        torch.testing.assert_close(share, torch.tensor([0.0, 0.5, 0.25, 0.25]), atol=0.06, rtol=0)
    by_length = run_policy(
        model, [batch((5, 30, 60), seed=0)], PriorPolicy(plans, "length", lengths.double(), lengths)
    ).layers
    assert by_length.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["random", "hash", "length"])
def test_blind_rivals_spend_what_the_policy_spends(model, name):
    held = batches(60, seed=50)
    policy = rival(name, model, 0.6, held)
    assert policy.name == name
    model.policy.set_budget(0.6)
    assert run_policy(model, held, policy).flops_fraction == pytest.approx(
        run_policy(model, held).flops_fraction, abs=0.03
    )


@pytest.mark.parametrize("name", ["confidence", "patience"])
def test_exit_rules_are_matched_to_the_budget(name):
    """With one width that can spend it: among several the most accurate may be one that cannot."""
    model, held = dynamic_model(widths=[5]), batches(12, seed=50)
    policy = rival(name, model, 0.6, held)
    assert policy.name == name
    assert run_policy(model, held, policy).flops_fraction == pytest.approx(0.6, abs=0.05)


def test_plans_count_by_the_flops_of_their_rows():
    model = dynamic_model()
    plans = torch.zeros(2, 3, 5, dtype=torch.bool)
    plans[0, :1], plans[1, :] = True, True
    weights, many = torch.tensor([1.0, 3.0]), [batch((4,) * 50, seed=i) for i in range(20)]
    layers = run_policy(model, many, PriorPolicy(plans, "random", weights)).layers
    assert float((layers == 3).double().mean()) == pytest.approx(0.75, abs=0.05)
    lengths = torch.tensor([10, 30])  # a quarter of the tokens is short
    rows = run_policy(model, [batch((10, 30), seed=0)], PriorPolicy(plans, "length", weights, lengths)).layers
    assert rows.tolist() == [1, 3]
    alike = PriorPolicy(plans, "length", weights, torch.tensor([4, 4]))
    layers = run_policy(model, many, alike).layers
    assert float((layers == 3).double().mean()) == pytest.approx(0.75, abs=0.05), "rows of one length share them out"


def test_rival_names(model):
    assert rival("dense", model, 1.0, []).name == "dense"
    assert rival("learned", model, 0.5, []) is model.policy
    assert run_policy(model, batches(1), rival("static:2x4", model, 1.0, [])).units.sum((1, 2)).unique().tolist() == [8]
    for name, text in (
        ("static:9x1", "static takes static:LxK with L in 1..3 and K in 1..5"),
        ("static", "static takes static:LxK"),
        ("best", "--policy: got 'best', allowed: learned, dense, random, hash, length, confidence, patience"),
    ):
        with pytest.raises(DHTError, match=text):
            rival(name, model, 0.5, [])
