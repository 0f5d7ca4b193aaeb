"""Groups that each thread runs by itself: values, modes, errors and thread counts as of one after the other."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from builders import batch, dynamic_model, random_plan
from dht.bench.plans import PreparedPlan
from dht.model import block as block_module
from dht.model import side_by_side as module
from dht.model.execute import execute
from dht.model.reference import reference
from dht.model.side_by_side import shares, side_by_side
from dht.policy.baselines import FixedPlan

FAMILIES = ("bert", "mpnet", "electra", "modernbert", "dht")
LENGTHS = (13, 1, 4, 9, 9, 2, 7, 20, 3, 1, 11, 6, 17)


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """Two threads, shares however small they are; returns the shares that were made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(module, "FEWEST", 1)
    monkeypatch.setattr(module, "GROUPS", 1)
    monkeypatch.setattr(module, "SHARE", 20)
    made = []

    def counted(runs):
        made.append(len(runs))
        return side_by_side(runs)

    monkeypatch.setattr(block_module, "side_by_side", counted)
    yield made
    torch.set_num_threads(threads)


def own_sets(model, lengths=LENGTHS):
    inputs = batch(lengths, pad=model.config.pad_token_id)
    del inputs["labels"]
    return inputs, random_plan(len(lengths), seed=len(lengths))


def expected(model, inputs, plan):
    exits = torch.stack(reference(model.encoder, plan, **inputs), 1)
    return exits[torch.arange(len(plan.units)), plan.layers - 1]


@pytest.mark.parametrize("ffn", ["coupled", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [LENGTHS, (6,) * 9], ids=["mixed", "equal"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_outputs_equal_the_reference_and_those_of_one_thread(shared, family, ffn, lengths, mode):
    model = dynamic_model(family, ffn=ffn)
    inputs, plan = own_sets(model, lengths)
    with mode():
        fast = execute(model.encoder, FixedPlan(plan), **inputs)
        assert shared, "no shares were made: nothing is tested"
        torch.set_num_threads(1)
        made = len(shared)
        plain = execute(model.encoder, FixedPlan(plan), **inputs)
        assert len(shared) == made
        torch.testing.assert_close(fast.logits, plain.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fast.logits, expected(model, inputs, plan), atol=1e-5, rtol=1e-5)
    assert fast.logits.is_inference() == (mode is torch.inference_mode)
    assert not fast.logits.requires_grad


def test_autocast_reaches_the_workers(shared):
    model = dynamic_model()
    inputs, plan = own_sets(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fast = execute(model.encoder, FixedPlan(plan), **inputs).logits
        assert shared
        torch.set_num_threads(1)
        plain = execute(model.encoder, FixedPlan(plan), **inputs).logits
    assert fast.dtype == plain.dtype
    torch.testing.assert_close(fast, plain, atol=0.02, rtol=0.02)
    slow = expected(model, inputs, plan)
    assert 1e-5 < (fast.float() - slow).abs().max() < 0.05 * slow.abs().max(), "in bfloat16, and right"
    with torch.inference_mode():
        torch.set_num_threads(2)
        again = execute(model.encoder, FixedPlan(plan), **inputs).logits
    torch.testing.assert_close(again, slow, atol=1e-5, rtol=1e-5)


def test_int8_weights(shared):
    from dht.model.quantize import quantize

    model = quantize(dynamic_model())
    inputs, plan = own_sets(model)
    with torch.inference_mode():
        fast = execute(model.encoder, FixedPlan(plan), **inputs).logits
        assert shared
        torch.set_num_threads(1)
        torch.testing.assert_close(fast, execute(model.encoder, FixedPlan(plan), **inputs).logits)


def test_gradients_training_lasting_sets_and_counted_calls_are_left_alone(shared):
    model = dynamic_model()
    inputs, plan = own_sets(model)
    assert execute(model.encoder, FixedPlan(plan), **inputs).logits.requires_grad
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            execute(model.encoder, FixedPlan(plan), **inputs)
        assert counter.get_total_flops() > 0
        with torch.autograd.profiler.profile():
            execute(model.encoder, FixedPlan(plan), **inputs)
        model.train()
        execute(model.encoder, FixedPlan(plan), **inputs)
        model.eval()
        execute(model.encoder, PreparedPlan(plan, lasting=True), **inputs)
    assert not shared


def test_threads_are_as_many_as_before(shared):
    model = dynamic_model()
    inputs, plan = own_sets(model)
    for threads in (3, 2):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            execute(model.encoder, FixedPlan(plan), **inputs)
        assert torch.get_num_threads() == threads
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == threads
        inside = side_by_side([lambda: torch.tensor([torch.get_num_threads()])] * threads)
        assert inside.tolist() == [1] * threads
    assert shared


def test_an_error_reaches_the_caller(shared, monkeypatch):
    model = dynamic_model()
    inputs, plan = own_sets(model)
    with torch.inference_mode():
        before = execute(model.encoder, FixedPlan(plan), **inputs).logits
        with monkeypatch.context() as broken:
            broken.setattr(block_module, "activated", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                execute(model.encoder, FixedPlan(plan), **inputs)
        assert torch.equal(execute(model.encoder, FixedPlan(plan), **inputs).logits, before)


def test_callers_in_several_threads(shared):
    models = [dynamic_model(seed=seed) for seed in range(2)]
    asked = [(models[i % 2], *own_sets(models[i % 2], LENGTHS[i:] + LENGTHS[:i])) for i in range(8)]

    def answer(model, inputs, plan):
        torch.set_num_threads(2)
        with torch.inference_mode():
            return [execute(model.encoder, FixedPlan(plan), **inputs).logits for _ in range(5)]

    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda each: answer(*each), asked))
    assert len(shared) > 8
    for each, got in zip(asked, answers, strict=True):
        for logits in got:
            torch.testing.assert_close(logits, expected(*each), atol=1e-5, rtol=1e-5)


def test_shares_have_equal_work_and_few_tokens(monkeypatch):
    monkeypatch.undo()
    torch.set_num_threads(2)
    assert shares([3] * 32, 2048) == [16, 16]
    assert shares([3] * 32, 4096) == [8, 8, 8, 8]
    assert shares([10, *[1] * 10], 1024) == [1, 10]
    assert shares([100, *[1] * 10], 1024) == [1, 10], "a share is never empty"
    for alone in (shares([3] * 7, 4096), shares([3] * 32, 255)):
        assert len(alone) == 1
    torch.set_num_threads(1)
    assert shares([3] * 32, 4096) == [32]


@pytest.mark.skipif(not hasattr(module.os, "fork"), reason="no fork here")
def test_a_forked_process_starts_its_own_threads():
    code = """
import os, torch
from dht.model.side_by_side import side_by_side
torch.set_num_threads(2)
ones = [lambda: torch.ones(1)] * 2
side_by_side(ones)
child = os.fork()
if not child:
    os._exit(0 if side_by_side(ones).tolist() == [1, 1] else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
