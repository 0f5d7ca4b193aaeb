"""The division of a training budget, and layers that imitate themselves."""

from __future__ import annotations

import pytest
import torch

from builders import batch, dynamic_model
from dht.imitation import EveryRow, _hidden, imitate
from dht.spending import CROPPED, ENOUGH, FEWEST, FEWEST_ROWS, IMITATION, divide

FORWARD = {"epoch": 100.0, "epochs": 3.0, "whole": 900, "rows": 32, "fixed": 12.0}
DENSE = 3 * 3 * 100.0


@pytest.mark.parametrize("budget", [0.1, 0.26, 0.5, 0.9])
@pytest.mark.parametrize("imitates", [True, False])
def test_the_parts_add_up_to_the_budget(budget, imitates):
    warm = {"warm_start": 0.8, "settle": 0.5}
    spending = divide(budget, budget, **FORWARD, **warm, surveys=0.02, probes=0.03, imitates=imitates)
    assert spending.share == spending.steps * spending.rows / (900 * 32)
    share = spending.share
    step = sum(spending.schedule.at(i / 1000) for i in range(1000)) / 1000
    spent = 12.0 + spending.imitation + share * DENSE * (step * 0.98 + 0.02 + 0.03 / 3)
    assert spent == pytest.approx(budget * DENSE, abs=DENSE / 900)
    assert spending.imitation == pytest.approx(IMITATION * budget * DENSE if imitates else 0.0)


@pytest.mark.parametrize(("warm_start", "settle"), [(0.4, 0.35), (0.8, 1.0), (0.2, 0.0)])
def test_cut_rows_buy_steps(warm_start, settle):
    told = {"warm_start": warm_start, "settle": settle, "surveys": 0.1}
    whole, cut = (divide(0.2, 0.2, **FORWARD, **told, crop=crop) for crop in (1.0, 0.3))
    assert (whole.cropped, cut.cropped) == (0, round(CROPPED * cut.steps))
    assert cut.share > 1.5 * whole.share
    step = (
        sum((0.9 * cut.schedule.at(i / 1000) + 0.1) * (0.3 if i < 1000 * CROPPED else 1.0) for i in range(1000)) / 1000
    )
    assert 12.0 + cut.imitation + cut.share * DENSE * step == pytest.approx(0.2 * DENSE, rel=0.01)


def test_more_than_all_steps_are_never_taken():
    spending = divide(0.5, 10.0, **FORWARD)
    assert (spending.steps, spending.schedule.budget) == (900, 0.7)
    assert divide(0.9, 10.0, **FORWARD).schedule.at(0.5) == 1.0


def test_little_data_leaves_a_few_steps_all_the_same():
    spending = divide(0.26, 0.26, **FORWARD | {"fixed": 5000.0})
    assert spending.share == pytest.approx(FEWEST, rel=0.01)
    assert spending.imitation == 0.0
    assert divide(0.26, 0.01, epoch=1.0, epochs=0.1, whole=1, rows=1, fixed=5.0).steps == 1


@pytest.mark.parametrize(("budget", "whole", "rows"), [(0.26, 2000, 32), (0.26, 400, 23), (0.1, 120, 15)])
def test_few_steps_take_fewer_rows_each(budget, whole, rows):
    spending = divide(budget, budget, **FORWARD | {"whole": whole})
    assert spending.rows == rows
    assert spending.steps == pytest.approx(spending.share * whole * 32 / rows)
    assert spending.steps >= min(ENOUGH, whole)
    assert divide(budget, budget, **FORWARD | {"whole": whole, "rows": 6}).rows == 6, "they are few already"


def test_steps_are_not_cut_into_single_rows():
    assert divide(0.26, 0.26, **FORWARD | {"fixed": 5000.0}).rows == 14
    assert divide(0.26, 0.26, **FORWARD | {"fixed": 5000.0, "whole": 300}).rows == FEWEST_ROWS


def test_all_steps_take_all_rows():
    assert divide(0.5, 10.0, **FORWARD | {"whole": 30}).rows == 32, "the dense model takes no more steps"


def cut():
    model = dynamic_model()
    sets = torch.zeros(3, 5, dtype=torch.bool)
    sets[0, [0, 2]] = sets[1, [1, 2, 4]] = True
    inputs = [batch(seed=i) for i in range(2)]
    return model, sets, inputs


def error(model, whole, sets, inputs):
    given = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        wanted, _ = _hidden(whole, given, EveryRow(sets.any(-1, keepdim=True).expand_as(sets)))
        said, _ = _hidden(model, given, EveryRow(sets))
    assert len(said) == len(wanted) == 2, "the layers above the cut ones do not run"
    return float(sum((x - y).square().mean() / y.var() for x, y in zip(said, wanted, strict=True)))


def test_narrow_layers_come_closer_to_the_whole():
    (model, sets, inputs), (whole, *_) = cut(), cut()
    untouched = {n: p.clone() for n, p in model.named_parameters() if ".blocks.0" not in n and ".blocks.1" not in n}
    before = error(model, whole, sets, inputs[0])
    model.train()
    imitate(model, inputs * 30, sets)
    assert model.training
    assert error(model, whole, sets, inputs[0]) < 0.5 * before
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        if name in untouched:
            assert torch.equal(parameter, untouched[name]), name
    for layer, unit in (~sets[:2]).nonzero().tolist():
        now, before = (m.encoder.blocks[layer].qkv_weight[unit] for m in (model, whole))
        assert torch.equal(now, before), "units that do not run are not trained"


def test_the_flops_are_those_of_a_forward_and_a_step():
    model, sets, inputs = cut()
    given = {k: v for k, v in inputs[0].items() if k != "labels"}
    run = {
        name: float(model(**given, policy=EveryRow(which)).trace.flops.sum())
        for name, which in (("whole", sets.any(-1, keepdim=True).expand_as(sets)), ("part", sets))
    }
    assert imitate(model, inputs[:1], sets) == pytest.approx(run["whole"] + 3 * run["part"])
    assert imitate(model, [], sets) == 0.0
