"""Numbers that are not finite: refused, counted, told, and the run stopped when they do not end."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from dht import train, training
from dht.bandit.posterior import LinearPosterior
from dht.checkpoints import complete_checkpoints
from dht.config import TrainSettings
from dht.errors import ConfigError, DHTError, NonFiniteError
from dht.hf.configuration import DHTConfig
from dht.policy import learned
from dht.training import LONGEST_LOG, Ledger
from killing import small_settings

FAULTS = ("nan loss", "infinite loss", "nan gradient", "infinite gradient", "context", "reward")


def faulty(monkeypatch, fault, steps):
    """A `make` whose trainer meets the fault at `steps`; `trainer.before` and `.after` hold the weights around them."""

    def make(*given):
        trainer = (train.dense_trainer if given[0].dense else train.dynamic_trainer)(*given)
        due = lambda: trainer.model.training and trainer.state.global_step in steps  # noqa: E731
        bad = math.nan if "nan" in fault else math.inf
        weight = trainer.model.encoder.blocks[0].up_bias
        if fault.endswith("loss"):
            compute = trainer.compute_loss
            trainer.compute_loss = lambda *a, **k: compute(*a, **k) * (bad if due() else 1.0)
        elif fault.endswith("gradient"):
            weight.register_hook(lambda grad: grad * bad if due() else grad)
        elif fault == "context":
            monkeypatch.setattr(learned, "features", spoilt(learned.features, due))
        else:
            monkeypatch.setattr(training, "quality", spoilt(training.quality, due))
        trainer.kept = {}
        step = trainer.training_step

        def watched(*args, **kwargs):
            trainer.kept[trainer.state.global_step] = weight.detach().clone()
            return step(*args, **kwargs)

        trainer.training_step = watched
        return trainer

    return make


def spoilt(function, due):
    @functools.wraps(function)
    def called(*args):
        values = function(*args)
        if due():
            values[0, 0] = math.nan
        return values

    return called


def trained(settings, make, **options):
    trainers = []

    def noted(*given):
        trainers.append(make(*given))
        return trainers[0]

    return train.fit(settings, make=noted, **options), trainers[0]


@pytest.fixture
def settings(tmp_path):
    return small_settings(tmp_path / "x", out=tmp_path / "out", epochs=1, save_every=4)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_update_is_refused_counted_and_told(fault, settings, monkeypatch):
    news: list[str] = []
    fitted, trainer = trained(settings, faulty(monkeypatch, fault, {3, 5, 6, 12}), say=news.append)
    assert fitted.report["refused_updates"] == trainer.refusals.count == 4
    assert [reason.split(":")[0] for reason in trainer.refusals.reasons] == ["step 3", "step 5", "step 6", "step 12"]
    assert any(line.startswith("4 updates were refused: step 3: ") for line in news)
    kept = trainer.kept
    for step in range(1, 17):  # the rate of step 0 is 0
        moved = not torch.equal(kept[step], kept[step + 1])
        assert moved == (step not in {3, 5, 6, 12}), step
    fitted.model.policy.check_sound()
    assert all(parameter.isfinite().all() for parameter in fitted.model.parameters())
    assert all(math.isfinite(value) for line in fitted.history for value in line.values())


def test_a_bad_update_of_dense_training_is_refused_too(settings, monkeypatch):
    dense = small_settings(settings.out.parent / "y", out=settings.out, epochs=1, dense=True, train_budget=None)
    fitted, trainer = trained(dense, faulty(monkeypatch, "nan gradient", {3}))
    assert trainer.refusals.reasons == ["step 3: the norm of the gradients is nan"]
    assert all(parameter.isfinite().all() for parameter in fitted.model.parameters())


def test_one_bad_batch_refuses_the_accumulated_update(settings, monkeypatch):
    accumulating = small_settings(settings.out.parent / "y", out=settings.out, epochs=1, accumulate=2)
    _, trainer = trained(accumulating, faulty(monkeypatch, "nan loss", {3}))
    assert trainer.refusals.count == 1
    assert torch.equal(trainer.kept[3], trainer.kept[4])


@pytest.mark.parametrize("fault", ["nan loss", "context"])
def test_three_in_a_row_stop_the_run_and_the_last_checkpoint_is_good(fault, settings, monkeypatch):
    text = r"3 updates in a row were refused, the last at step 12: .*lower --lr; .*checkpoint-12 is whole: then go on"
    with monkeypatch.context() as patch, pytest.raises(DHTError, match=text):
        trained(settings, faulty(patch, fault, {5, 6, 10, 11, 12, 13}))
    folder = settings.out / "checkpoints"
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-8", "checkpoint-12"]
    fitted = train.fit(settings, resume=True)
    assert fitted.report["refused_updates"] == 4, "the count goes on where the checkpoint left it"
    fitted.model.policy.check_sound()
    assert all(parameter.isfinite().all() for parameter in fitted.model.parameters())


def test_logs_stay_small():
    ledger = Ledger()
    for step in range(200_000):
        ledger.note(step, 0.5, 0.5, 0.0, 1.0)
    assert LONGEST_LOG / 2 <= len(ledger.history) <= LONGEST_LOG
    steps = [line["step"] for line in ledger.history]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1] > 190_000) == (0, True)
    restored = Ledger.from_state(ledger.state())
    assert restored.state() == ledger.state()


# The posterior


def test_rows_whose_sum_overflows_leave_the_statistics_alone():
    posterior = LinearPosterior(2, 2)
    posterior.update(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    before = posterior.snapshot()
    big = torch.full((4, 2), 9e153, dtype=torch.float64)
    only = torch.tensor([[0.0, 1.0]]).expand(4, 2)
    with pytest.raises(NonFiniteError, match="arm 1: the sum of its rows overflows float64; scale contexts and target"):
        posterior.update(big, only, torch.ones(4, 2))
    with pytest.raises(NonFiniteError, match="arm 1: the sum of its rows overflows float64"):
        posterior.update(torch.full((1, 2), 1e10), only[:1], torch.full((1, 2), 1e300, dtype=torch.float64))
    assert all(torch.equal(before[name], value) for name, value in posterior.snapshot().items())
    assert posterior.width(torch.ones(1, 2)).isfinite().all()


@pytest.mark.parametrize("forgetting", [0.9, 0.99, 0.9998, 1.0])
def test_ten_million_updates_of_duplicate_and_constant_features(forgetting):
    """The rows repeat, so that their decayed sums have a closed form, which is taken with 60 digits."""
    period, repeats, calls, ridge = 1000, 100, 100, 1e-2
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(period, 2, generator=generator, dtype=torch.float64)
    ones = torch.ones(period, 1, dtype=torch.float64)
    # Twice the same feature, nearly the same once more, and a constant twice.
    near = free[:, :1] + 1e-7 * torch.randn(period, 1, generator=generator, dtype=torch.float64)
    rows = torch.cat([free, free[:, :1], near, ones, 2 * ones], dim=1)
    target = free[:, :1] - 2 * free[:, 1:] + 0.5
    posterior = LinearPosterior(1, 6, ridge=ridge, forgetting=forgetting)
    context, reward = rows.repeat(repeats, 1), target.repeat(repeats, 1)
    weight = torch.ones(period * repeats, 1)
    for _ in range(calls):
        posterior.update(context, weight, reward)
        lower = posterior.factor()
        assert (lower.diagonal(dim1=1, dim2=2) > 0).all()
        torch.testing.assert_close(lower @ lower.mT, posterior.precision, rtol=1e-9, atol=0.0)
    assert int(posterior.clock) == 10_000_000

    with mpmath.workdps(60):
        gamma = mpmath.mpf(forgetting)
        whole = gamma**period
        cycles = repeats * calls
        times = mpmath.mpf(cycles) if gamma == 1 else (1 - whole**cycles) / (1 - whole)
        ages = [gamma ** (period - 1 - i) * times for i in range(period)]
        cells = [[mpmath.mpf(v) for v in row] for row in rows.tolist()]
        wanted = [mpmath.mpf(v) for (v,) in target.tolist()]
        size = range(6)
        gram = mpmath.matrix(
            [[mpmath.fsum(a * c[i] * c[j] for a, c in zip(ages, cells, strict=True)) for j in size] for i in size]
        )
        moment = mpmath.matrix(
            [mpmath.fsum(a * c[i] * r for a, c, r in zip(ages, cells, wanted, strict=True)) for i in size]
        )
        inverse = (gram + ridge * mpmath.eye(6)) ** -1
        theta = inverse * moment
        # A usual row, and the direction in which two equal features differ: no row has shown it.
        queries = torch.tensor([[0.5, -1.0, 0.5, 0.5, 1.0, 2.0], [1.0, 0.0, -1.0, 0, 0, 0]], dtype=torch.float64)
        columns = [mpmath.matrix(query.tolist()) for query in queries]
        widths = [float(mpmath.sqrt((c.T * inverse * c)[0])) for c in columns]
        means = [float((c.T * theta)[0]) for c in columns]
    # Condition number up to 6 * 10^7 / ridge = 6e9: of float64's 16 digits 6 are left.
    np.testing.assert_allclose(posterior.width(queries)[:, 0], widths, rtol=2e-6)
    np.testing.assert_allclose(posterior.predict(queries)[:, 0, 0], means, rtol=2e-6, atol=2e-6)


# Settings


def test_settings_that_are_no_numbers_are_all_told():
    bad = TrainSettings(
        "d", "m", Path("o"), epochs=math.inf, lr=math.nan, batch_size=1.5, seed="x", budget=None, settle=[]
    )
    with pytest.raises(ConfigError) as caught:
        bad.check()
    for text in (
        "--epochs: got inf, allowed: a number above 0",
        "--lr: got nan, allowed: a number above 0",
        "--batch-size: got 1.5, allowed: 1 or more",
        "--seed: got 'x', allowed: 0 to 2^32 - 1",
        "--budget: got None, allowed: a number in (0, 1]",
        "--settle: got [], allowed: a number in [0, 1]",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_hidden_layers": "x"}, "^num_hidden_layers: got 'x', allowed: a whole number$"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000, must be in 1..4096"),
        ({"budget": math.nan}, "^budget: got nan, allowed: a number$"),
        ({"widths": {"a": 1}}, "^widths: got {'a': 1}, allowed: whole numbers$"),
        ({"class_weights": 2.5}, "^class_weights: got 2.5, allowed: null, or a number for every class$"),
        ({"head": [1]}, r"^head: got \[1\], allowed: classifier, embedding, token$"),
        ({"hidden_act": 3}, "^hidden_act: got 3, allowed: a name$"),
        ({"hidden_act": "sine"}, "^hidden_act: transformers has no activation 'sine'$"),
        ({"windows": 3}, "^windows: got 3, allowed: null, or a number or null for every layer$"),
        ({"pad_token_id": 99, "vocab_size": 9}, r"^pad_token_id: got 99, must be in 0\.\.8 or null$"),
        ({"layer_norm_eps": -1.0}, r"^layer_norm_eps: got -1.0, must be in 0\.\.1$"),
    ],
)
def test_configurations_that_make_no_sense(changes, text):
    with pytest.raises(ConfigError, match=text):
        DHTConfig(**changes).check()
