"""Deferred AdamW against AdamW."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import dht.adamw
from dht.adamw import DeferredAdamW
from dht.guarded import GuardedTrainer
from dht.train import Fitted, dense_trainer, fit
from killing import small_settings

STEPS = 60


class Bag(nn.Module):
    """A table of which a batch reads a few rows, and a layer on top."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.top = nn.Embedding(50, 6), nn.Linear(6, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 1e4 * self.top(self.words(ids).tanh()).square().mean()  # gradients far above eps, as they mostly are


def batches(count: int = STEPS) -> list[torch.Tensor]:
    """Half of the reads fall on five rows; rows from 45 on are never read."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(5 if i % 2 else 45, (2, 4), generator=draw) for i in range(count)]


def trained(model: Bag, optimizer: torch.optim.Optimizer, reads: list[torch.Tensor], largest: float = 500.0) -> None:
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    for ids in reads:
        model(ids).backward()
        if isinstance(optimizer, DeferredAdamW):
            optimizer.clip(largest)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step()
        optimizer.zero_grad()
        slower.step()


def pair(**options: float) -> tuple[Bag, torch.optim.AdamW, Bag, DeferredAdamW]:
    torch.manual_seed(0)
    plain = Bag()
    ours = copy.deepcopy(plain)
    options = {"lr": 0.01, "weight_decay": 0.0, **options}
    deferred = DeferredAdamW(ours.parameters(), fused=True, **options)
    return plain, torch.optim.AdamW(plain.parameters(), fused=True, **options), ours, deferred


@pytest.mark.parametrize("window", [256, 7])
def test_ends_where_adamw_ends(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht.adamw, "WINDOW", window)
    plain, adamw, ours, deferred = pair()
    start = ours.words.weight.detach().clone()
    assert deferred.attach(ours.words)
    trained(plain, adamw, batches())
    trained(ours, deferred, batches())
    behind = (ours.words.weight - plain.words.weight).abs().max()
    assert behind > 1e-3 or window == 7
    deferred.detach()
    for (name, right), got in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(got, right, atol=2e-5), name
    assert torch.equal(ours.words.weight[45:], start[45:])
    for parameter, other in zip(plain.parameters(), ours.parameters(), strict=True):
        for name, value in adamw.state[parameter].items():
            assert torch.allclose(
                deferred.state[other][name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max())
            ), name


def test_a_row_is_up_to_date_when_it_is_read() -> None:
    plain, adamw, ours, deferred = pair()
    deferred.attach(ours.words)
    trained(plain, adamw, batches(20))
    trained(ours, deferred, batches(20))
    rows = torch.arange(45)
    with torch.no_grad():
        assert torch.allclose(ours.words(rows), plain.words(rows), atol=2e-5)


def test_a_step_leaves_rows_that_nobody_read_as_they_are() -> None:
    _, _, ours, deferred = pair()
    deferred.attach(ours.words)
    trained(ours, deferred, batches(20))
    before = ours.words.weight.detach().clone()
    trained(ours, deferred, [torch.tensor([[3, 4]])])
    changed = (ours.words.weight != before).any(-1).nonzero()[:, 0]
    assert changed.tolist() == [3, 4]


def test_state_goes_over_to_another_optimizer() -> None:
    _, _, ours, deferred = pair()
    deferred.attach(ours.words)
    trained(ours, deferred, batches(20))
    state = copy.deepcopy(deferred.state_dict())
    other = copy.deepcopy(ours)
    other.words = nn.Embedding.from_pretrained(ours.words.weight.detach().clone(), freeze=False)
    plain = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    plain.load_state_dict(state)
    resumed = DeferredAdamW(ours.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    deferred.detach()
    resumed.attach(ours.words)
    resumed.load_state_dict(copy.deepcopy(state))
    for model, optimizer in ((other, plain), (ours, resumed)):
        for ids in batches(10):
            model(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    resumed.detach()
    assert torch.allclose(ours.words.weight, other.words.weight, atol=2e-5)
    assert not torch.equal(ours.words.weight, state["state"][0]["exp_avg"])


def test_weight_decay_is_not_deferred() -> None:
    plain, adamw, ours, deferred = pair(weight_decay=0.1)
    assert not deferred.attach(ours.words)
    trained(plain, adamw, batches())
    trained(ours, deferred, batches())
    assert torch.allclose(ours.words.weight, plain.words.weight, atol=1e-5)


def test_a_step_without_gradients_changes_nothing() -> None:
    _, _, ours, deferred = pair()
    deferred.attach(ours.words)
    trained(ours, deferred, batches(5))
    deferred.settle()
    before = copy.deepcopy(deferred.state_dict()), ours.words.weight.detach().clone()
    deferred.step()
    deferred.settle()
    assert torch.equal(before[1], ours.words.weight)
    assert torch.equal(before[0]["state"][0]["exp_avg"], deferred.state[ours.words.weight]["exp_avg"])


@pytest.mark.parametrize("largest", [100.0, 1e9])
def test_clips_as_torch_does(largest: float) -> None:
    plain, adamw, ours, deferred = pair()
    deferred.attach(ours.words)
    ids = torch.tensor([[1, 1, 2], [3, 2, 1]])
    for model in (plain, ours):
        model(ids).backward()
        model(ids[:1]).backward()  # accumulates
    assert ours.words.weight.grad is not None
    assert ours.words.weight.grad.is_sparse
    right = torch.nn.utils.clip_grad_norm_(plain.parameters(), largest)
    assert torch.allclose(deferred.clip(largest), right)
    adamw.step()
    deferred.step()
    deferred.detach()
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(deferred.state[other]["exp_avg"], adamw.state[one]["exp_avg"], rtol=1e-5, atol=1e-6)


def trained_run(out: Path, monkeypatch: pytest.MonkeyPatch, deferred: bool, **changes: object) -> tuple[Fitted, list]:
    made: list = []

    def make(*given):
        trainer = dense_trainer(*given)
        made.append((trainer, trainer.model.get_input_embeddings().weight.detach().clone()))
        for name, value in changes.items():
            setattr(trainer.args, name, value)
        return trainer

    if not deferred:
        monkeypatch.setattr(DeferredAdamW, "attach", lambda *_: False)
    return fit(small_settings(out, dense=True, train_budget=None), make=make), made[0]


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.0}])
def test_a_training_ends_as_with_plain_adamw(changes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, (trainer, start) = trained_run(tmp_path / "ours", monkeypatch, True, **changes)
    words = ours.model.get_input_embeddings()
    assert trainer._deferred is not None
    assert not words.sparse
    assert not words._forward_pre_hooks
    plain, _ = trained_run(tmp_path / "plain", monkeypatch, False, **changes)
    for (name, got), right in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(got, right, atol=1e-4), name  # eps', where gradients are as small; moved by up to 1.5e-2
    read = {token for row in ours.rows["train"] for token in row["input_ids"]}
    changed = (words.weight != start).any(-1).nonzero()[:, 0].tolist()
    assert changed
    assert set(changed) <= read


def test_a_loaded_state_that_decays_weights_is_not_deferred() -> None:
    plain, reference, ours, deferred = pair(weight_decay=0.5)
    group = deferred.param_groups[0]
    group["weight_decay"] = 0.0
    assert deferred.attach(ours.words)
    deferred.load_state_dict(reference.state_dict())  # whose options decay
    assert deferred.tables == []
    reads = batches(8)
    trained(plain, reference, reads)
    trained(ours, deferred, reads)
    torch.testing.assert_close(ours.words.weight, plain.words.weight)


def test_a_state_of_an_optimizer_that_is_not_fused_goes_on_fused() -> None:
    _, _, ours, deferred = pair()
    deferred.attach(ours.words)
    deferred.load_state_dict(torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.0, fused=False).state_dict())
    trained(ours, deferred, batches(4), largest=1e-3)  # clips
    assert bool(ours.words.weight.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_clips_gradients_of_other_types(dtype: torch.dtype) -> None:
    _, _, ours, _ = pair()
    ours = ours.to(dtype)
    before = ours.words.weight.clone()
    deferred = DeferredAdamW(ours.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    deferred.attach(ours.words)
    trained(ours, deferred, batches(4), largest=1e-3)
    deferred.detach()
    assert ours.words.weight.dtype == dtype
    assert not torch.equal(ours.words.weight, before)
    assert bool(ours.words.weight.isfinite().all())


def test_takes_no_closure() -> None:
    *_, deferred = pair()
    with pytest.raises(ValueError, match="takes no closure"):
        deferred.step(lambda: 0.0)


def test_the_best_weights_are_loaded_as_they_were(tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "run")
    made: list[GuardedTrainer] = []

    def make(*given):
        trainer = dense_trainer(*given)
        made.append(trainer)
        return trainer

    fit(settings, make=make)
    trainer = made[0]
    optimizer = trainer._deferred
    assert optimizer is not None
    words = trainer.model.get_input_embeddings()
    optimizer.attach(words)
    ids = torch.arange(5)
    trainer.model(input_ids=ids[None], labels=torch.tensor([0])).loss.backward()
    optimizer.step()
    optimizer.step()  # rows 5 and above, and then all, are owed a move
    best = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.state.best_model_checkpoint = str(tmp_path / "best")
    trainer.model.save_pretrained(tmp_path / "best")
    trainer._load_best_model()
    optimizer.detach()
    torch.testing.assert_close(words.weight, best["encoder.embeddings.words.weight"], rtol=0, atol=0)
