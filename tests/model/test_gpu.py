"""What only runs on a GPU, and what of it can be tried without one."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from builders import batch, dynamic_model, random_plan
from dht.bench.parity import check_parity
from dht.model.fused import fuses, sum_and_norm
from dht.model.packed import weighed_by_product
from dht.policy.baselines import DensePolicy, FixedPlan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def on_gpu(**inputs):
    return {name: value.to("cuda") for name, value in inputs.items()}


def test_nothing_is_fused_on_a_cpu():
    with torch.inference_mode():
        assert not fuses(torch.ones(2, 8), nn.LayerNorm(8))


def test_pooling_by_a_product_is_pooling():
    weight, tokens = torch.randn(3, 7, 4), torch.randn(3, 7, 20)
    each = (tokens.unflatten(-1, (4, 5)) * weight[..., None]).sum(1).flatten(1)
    torch.testing.assert_close(weighed_by_product(weight, tokens), each)


def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton")
    script = """
import torch
from torch import nn
from dht.model.fused import _launch
from dht.model.fused_kernel import sum_and_norm_kernel
for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
    for bias in (True, False):
        norm = nn.LayerNorm(40, eps=1e-12, bias=bias)
        nn.init.normal_(norm.weight)
        norm.to(dtype)
        hidden, product = torch.randn(9, 40).to(dtype), torch.randn(9, 40).to(dtype)
        normed = torch.empty_like(hidden)
        _launch(sum_and_norm_kernel, hidden, product, norm, normed)
        assert (normed - norm(hidden + product)).abs().max() < allowed
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "dht"])
def test_a_gpu_agrees_with_the_reference(family):
    model, rows = dynamic_model(family).to("cuda"), on_gpu(**batch())
    policies = {"plan": FixedPlan(random_plan(len(rows["labels"]))), "dense": DensePolicy(5)}
    check_parity(model, rows, policies, gradients=True)


@needs_gpu
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_fused_sum_and_norm(dtype, allowed):
    norm = nn.LayerNorm(96, eps=1e-12).to("cuda", dtype)
    hidden, product = torch.randn(300, 96, device="cuda", dtype=dtype), torch.randn(300, 96, device="cuda", dtype=dtype)
    with torch.inference_mode():
        assert fuses(hidden, norm)
        assert (sum_and_norm(hidden, product, norm) - norm(hidden + product)).abs().max() < allowed
        assert sum_and_norm(hidden[:0], product[:0], norm).shape == (0, 96)


@needs_gpu
@pytest.mark.parametrize("width", [60, 80])  # heads of 12 are padded, heads of 16 attend as they lie
def test_rows_of_different_lengths_in_half_precision(width):
    model = dynamic_model("dht", hidden_size=width).to("cuda")
    rows = on_gpu(**batch())
    del rows["labels"]
    plan = FixedPlan(random_plan(len(rows["input_ids"])))
    with torch.inference_mode():
        full = model(**rows, policy=plan).logits
        half = model.bfloat16()(**rows, policy=plan).logits
    assert (full - half).abs().max() < 0.05 * full.abs().max()


@needs_gpu
def test_a_fixed_plan_waits_for_the_device_once(monkeypatch):
    model, rows = dynamic_model().to("cuda"), on_gpu(**batch())
    del rows["labels"]
    waits, cpu = [], torch.Tensor.cpu
    with torch.inference_mode():
        monkeypatch.setattr(torch.Tensor, "cpu", lambda self: waits.append(self.is_cuda) or cpu(self))
        model(**rows, policy=FixedPlan(random_plan(len(rows["input_ids"]))))
    assert sum(waits) == 1, "the lengths of the rows"
