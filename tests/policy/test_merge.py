"""Policies of several ranks: merged, they are the policy that one rank with all rows would have."""

from __future__ import annotations

import copy

import pytest
import torch

from builders import batch, dynamic_model
from dht.policy.reward import quality
from dht.policy.tree import PRIOR_ROWS


def observed(model, seeds):
    """The model's policy after the probes of `seeds`, decided by the policy as it was."""
    traces = []
    for seed in seeds:
        inputs = batch((5, 9, 3, 7), seed=seed)
        labels = inputs.pop("labels")
        with torch.no_grad():
            trace = model(**inputs, mode="probe").trace
        traces.append((trace, quality(trace, labels)))
    for trace, paid in traces:
        model.policy.observe(trace, paid)
    return model.policy


@pytest.mark.parametrize("search", ["tree", "integrated"])
def test_without_forgetting_merged_ranks_are_one_that_saw_all(search):
    model = dynamic_model(search=search, forgetting=1.0)
    base = model.policy.snapshot()
    ranks = [observed(copy.deepcopy(model), [0, 1]), observed(copy.deepcopy(model), [2]), copy.deepcopy(model.policy)]
    deltas = [policy.delta_since(base) for policy in ranks]
    one = observed(copy.deepcopy(model), [0, 1, 2])
    for policy in ranks:
        policy.merge(base, deltas)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(policy.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(policy.state_dict()[name], ranks[0].state_dict()[name]), name


def test_what_is_believed_beforehand_is_topped_up_once():
    gamma = 0.99
    model = dynamic_model(forgetting=gamma)
    base = model.policy.snapshot()
    ranks = [observed(copy.deepcopy(model), [0]), observed(copy.deepcopy(model), [1, 2])]
    counts = [int(policy.numbers.clock - base["numbers.clock"]) for policy in ranks]
    assert counts[0] < counts[1]
    ranks[0].merge(base, [policy.delta_since(base) for policy in ranks])
    seen = sum(gamma**age for count in counts for age in range(count))
    arms = ranks[0].numbers.num_arms
    assert float(ranks[0].numbers.pulls.sum()) == pytest.approx(arms * PRIOR_ROWS + seen, rel=1e-9)
