"""Products and dropout that replace torch's defaults on CPUs: equal values, equal gradients, one choice a machine."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dht.model import linear as module
from dht.model.linear import activated, dropout, linear, prefers_onednn

HAS_ONEDNN = pytest.mark.skipif(not module._HAS_ONEDNN, reason="this build of torch has no oneDNN")


@pytest.fixture(params=["MKL", pytest.param("oneDNN", marks=HAS_ONEDNN)])
def library(request, monkeypatch):
    monkeypatch.setattr(module, "prefers_onednn", lambda: request.param == "oneDNN")
    return request.param


def operands(rows, transposed):
    torch.manual_seed(rows)
    x = torch.randn(rows, 24, requires_grad=True)
    weight = (torch.randn(24, 40).t() if transposed else torch.randn(40, 24)).requires_grad_()
    return x, weight, torch.randn(40, requires_grad=True)


@pytest.mark.parametrize("rows", [0, 1, 9, 63, 65, 1025])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_at_odd_sizes(library, rows, transposed):
    x, weight, bias = operands(rows, transposed)
    torch.manual_seed(1)
    direction = torch.randn(rows, 40)
    expected = F.linear(x.double(), weight.double(), bias.double())
    wanted = torch.autograd.grad((expected * direction).sum(), (x, weight, bias))
    got = linear(x, weight, bias)
    assert got.shape == (rows, 40)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((got * direction).sum(), (x, weight, bias))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), got)
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "silu"])
def test_a_fused_activation_is_the_activation(library, name):
    from transformers.activations import ACT2FN

    x, weight, bias = operands(33, False)
    expected = ACT2FN[name](F.linear(x, weight, bias))
    torch.testing.assert_close(activated(x, weight, bias, name, ACT2FN[name]), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(activated(x, weight, bias, name, ACT2FN[name]), expected, atol=1e-5, rtol=1e-5)


def test_flops_are_those_of_the_product(library):
    x, weight, bias = operands(33, False)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 33 * 24 * 40


def test_other_dtypes_and_autocast_are_left_to_torch(library):
    x, weight, bias = (t.detach() for t in operands(5, False))
    assert linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


def test_the_choice_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("DHT_CACHE", str(tmp_path))
    shares = iter([0.4, 0.99])
    monkeypatch.setattr(module, "_HAS_ONEDNN", True)
    monkeypatch.setattr(module, "_onednn_over_mkl", lambda: next(shares))
    for _ in range(2):
        prefers_onednn.cache_clear()
        assert prefers_onednn(), "the second time from the file, or it would be .99"
    kept = tmp_path / "linear.json"
    assert list(json.loads(kept.read_text()).values()) == [0.4]
    kept.write_text("{")
    prefers_onednn.cache_clear()
    assert not prefers_onednn(), "a broken file is measured again, and .99 is no gain"
    assert list(json.loads(kept.read_text()).values()) == [0.99]
    monkeypatch.setattr(module, "_HAS_ONEDNN", False)
    prefers_onednn.cache_clear()
    assert not prefers_onednn()
    prefers_onednn.cache_clear()


@HAS_ONEDNN
def test_the_measurement_is_a_ratio():
    assert 0.05 < module._onednn_over_mkl() < 20


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 301, requires_grad=True)
    dropped = dropout(x, p)
    share = float((dropped == 0).double().mean())
    assert abs(share - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5, "within four standard errors"
    values = dropped.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - p)]), atol=1e-4, rtol=1e-4)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, dropped.detach())
    neighbours = (dropped[:, :-1] == 0) & (dropped[:, 1:] == 0)
    assert abs(float(neighbours.double().mean()) - p * p) < 0.003, "four draws of one number do not follow each other"
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(1000, 301), p), dropped), "the same seed drops the same"


def test_everything_can_be_dropped():
    assert not dropout(torch.ones(3, 5), 1.0).any()
