"""The FLOPs formula against what torch counts while the same plan runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from builders import LENGTHS, batch, dynamic_model, random_plan
from dht.hf.convert import export
from dht.model.execute import execute
from dht.policy.baselines import DensePolicy, FixedPlan


def counted(run) -> int:
    # The counter knows the fused kernels only; the plain one shows every product.
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("ffn", ["coupled", "dense"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "electra", "modernbert", "dht"])
@pytest.mark.parametrize("seed", [0, 1])
def test_executed_flops_equal_the_counter(family, ffn, seed):
    model = dynamic_model(family, ffn=ffn)
    inputs = batch(pad=model.config.pad_token_id)
    inputs.pop("labels")
    plan = random_plan(len(LENGTHS), seed=seed)
    trace = execute(model.encoder, FixedPlan(plan), **inputs)
    assert float(trace.flops.sum()) == counted(lambda: execute(model.encoder, FixedPlan(plan), **inputs))


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "modernbert"])
def test_dense_flops_equal_the_counter_and_transformers_on_equal_lengths(family):
    model = dynamic_model(family)
    inputs = batch((8, 8, 8))
    inputs.pop("labels")
    dense = float(execute(model.encoder, DensePolicy(5), **inputs).dense_flops.sum())
    assert dense == counted(lambda: execute(model.encoder, DensePolicy(5), **inputs))
    assert dense == counted(lambda: export(model).eval()(**inputs))


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_layer_costs_sum_to_the_total(family):
    model = dynamic_model(family)
    inputs = batch()
    inputs.pop("labels")
    trace = execute(model.encoder, FixedPlan(random_plan(7)), **inputs)
    embedding = 2 * 36 * 60 * inputs["attention_mask"].sum(-1) * (family == "electra")
    torch.testing.assert_close(trace.layer_cost.sum(-1) * trace.dense_flops + embedding, trace.flops)


def test_the_policy_pays_for_itself():
    model = dynamic_model()
    inputs = batch()
    inputs.pop("labels")
    model.policy.price.fill_(0.0)
    with torch.inference_mode():
        trace = model(**inputs, mode="survey").trace
    arithmetic = trace.flops - (trace.layer_cost * trace.dense_flops[:, None]).sum(-1)
    assert bool((arithmetic > 0).all())
