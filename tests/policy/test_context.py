"""Contexts of few rows are worked out without tensors: they must be the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dht.policy import context
from dht.task import Embedding, MultiLabel, Regression, SingleLabel


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("first", [False, True])
def test_few_rows_have_the_features_of_many(classes, first, monkeypatch):
    torch.manual_seed(classes)
    logits, before = torch.randn(6, classes) * 3, torch.randn(6, classes)
    logits[0] = torch.tensor([200.0] + [-200.0] * (classes - 1))  # certain: 0 log 0 is 0
    view = SimpleNamespace(
        layer=1, logits=logits, previous=None if first else before, lengths=torch.tensor([1, 2, 3, 40, 500, 512])
    )
    projection = torch.zeros(3, 7)
    few = context.features(view, projection, SingleLabel(classes))
    monkeypatch.setattr(context, "FEW", 0)
    many = context.features(view, projection, SingleLabel(classes))
    assert few.shape == (6, context.EXIT_FEATURES + 3)
    assert few.dtype == many.dtype == torch.float64
    torch.testing.assert_close(few, many, atol=1e-12, rtol=1e-12)
    assert bool(many[:, 6].any()) != first, "agreement with the exit before is seen, where there is one"


@pytest.mark.parametrize("task", [MultiLabel(), Regression(), Embedding()])
def test_other_tasks_read_few_rows_as_they_read_many(task, monkeypatch):
    torch.manual_seed(0)
    logits, before = torch.randn(2, 5, 1 if task == Regression() else 4)
    view = SimpleNamespace(layer=1, logits=logits, previous=before, lengths=torch.tensor([1, 2, 3, 40, 512]))
    few = context.features(view, torch.zeros(0, 7), task)
    monkeypatch.setattr(context, "FEW", 0)
    assert torch.equal(few, context.features(view, torch.zeros(0, 7), task))
    assert torch.equal(few[:, 2:], task.context(logits, before))
    assert few.dtype == torch.float64
