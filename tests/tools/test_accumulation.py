"""An optimizer step is one step of the policy, however many batches it has, and logs say what it spent."""

from __future__ import annotations

import pytest
import torch

from dht import training
from dht.policy.learned import LearnedPolicy
from tools.two_ranks import ending, trained


def test_accumulated_batches_equal_a_bigger_one(tmp_path):
    """While every row runs everything, only what is a mean over a batch differs: padding, units' scale."""
    free = {"forgetting": 1.0, "exploration": 1.0}
    whole, wide = ending(trained(tmp_path, accumulate=1, batch_size=8, **free))
    halves, narrow = ending(trained(tmp_path, accumulate=2, batch_size=4, **free))
    for name, value in whole.items():
        other = halves[name]
        if name == "policy.units.moment":
            assert torch.corrcoef(torch.stack([value.flatten(), other.flatten()]))[0, 1] > 0.99
            continue
        if name == "policy.numbers.moment":  # of quality, then of cost, which padding is part of
            torch.testing.assert_close(value[..., 1], other[..., 1], atol=0.05, rtol=0.05)
            value, other = value[..., 0], other[..., 0]
        assert torch.allclose(value, other, atol=1e-5, rtol=1e-3), name
    # Padding is executed and charged, and a smaller batch has less of it.
    assert narrow["dense"] == pytest.approx(wide["dense"], rel=0.05)
    assert narrow["executed"] == pytest.approx(wide["executed"], rel=0.1)


def test_the_policy_moves_once_an_optimizer_step(tmp_path, monkeypatch):
    moved, seen = [], []
    finish_step, observe_units = LearnedPolicy.finish_step, LearnedPolicy.observe_units
    monkeypatch.setattr(LearnedPolicy, "finish_step", lambda self: (moved.append(1), finish_step(self)))
    monkeypatch.setattr(LearnedPolicy, "observe_units", lambda self, *t: (seen.append(len(t)), observe_units(self, *t)))
    trainer = trained(tmp_path, accumulate=3, steps=2)
    assert (moved, seen) == ([1, 1], [3, 3])
    assert int(trainer.dynamic.policy.step) == 2
    assert trainer.state.global_step == 2
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 2
    for line in logged:
        assert {"flops_fraction", "flops_target", "price"} <= set(line)
        assert 0 < line["flops_fraction"] < 1.2


def test_of_a_refused_update_nothing_is_learned(tmp_path, monkeypatch):
    """One of the accumulated batches has a loss that is not finite: neither weights nor policy nor price move."""
    losses, updates = iter([1.0, 1.0, 1.0, torch.nan, 1.0, 1.0]), []
    real = training.exit_loss
    monkeypatch.setattr(training, "exit_loss", lambda *a: real(*a) * next(losses))
    learn = training.DHTTrainer._learn

    def watched(self):
        before = self.dynamic.policy.snapshot() | {"price": self.dynamic.policy.price.clone()}
        weights = self.dynamic.encoder.blocks[0].out_weight.detach().clone()
        learn(self)
        after = self.dynamic.policy.snapshot() | {"price": self.dynamic.policy.price}
        updates.append((all(torch.equal(before[name], after[name]) for name in before), weights))

    monkeypatch.setattr(training.DHTTrainer, "_learn", watched)
    trainer = trained(tmp_path, accumulate=2, steps=3)
    assert [kept for kept, _ in updates] == [False, True, False]
    weights = [weights for _, weights in updates]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert trainer.refusals.count == 1
    assert "the loss is nan" in trainer.refusals.reasons[0]
    assert trainer.ledger.executed > 0
