"""Quality of exits and the returns of running on, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dht.plan import Account, Decision, Exit, Trace
from dht.policy.reward import quality, returns
from dht.task import SingleLabel


def trace_of(layers, costs, wants_stop, exits=()):
    depth = len(costs[0])
    ran = torch.arange(depth) < torch.tensor(layers)[:, None]
    account = Account(SimpleNamespace(layers=depth), torch.ones(len(layers)))
    account.units, account.dense_flops = ran[..., None], torch.ones(len(layers))
    account.layer_flops = torch.tensor(costs, dtype=torch.float64)
    return Trace(
        account,
        exits=list(exits),
        decisions=[
            (torch.arange(len(layers)), Decision(torch.ones(1, 1), torch.zeros(1), wants_stop=stops))
            for stops in torch.tensor(wants_stop).unbind(1)
        ],
    )


def test_quality_reads_every_visited_exit():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    exits = [Exit(1, torch.tensor([0, 1]), logits), Exit(2, torch.tensor([1]), logits[:1])]
    trace = trace_of([1, 2], [[0.1, 0.0], [0.1, 0.2]], [[False, False]] * 2, exits)
    labels = torch.tensor([0, 1])
    assert quality(trace, labels).tolist() == [[1.0, 0.0], [1.0, 0.0]]
    sure = torch.tensor(2.0, dtype=torch.float64).sigmoid().item()
    expected = torch.tensor([[sure, 0.0], [sure, 1 - sure]], dtype=torch.float64)
    torch.testing.assert_close(quality(trace, labels, SingleLabel(2, "probability")), expected)


def test_returns_of_a_row_that_ran_as_it_wished():
    trace = trace_of([3], [[0.1, 0.2, 0.3]], [[False, False, False]])
    final, cost = returns(trace, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64))
    assert final.tolist() == [[1.0, 1.0, 1.0]]
    torch.testing.assert_close(cost, torch.tensor([[0.6, 0.5, 0.3]], dtype=torch.float64))


def test_returns_stop_where_the_policy_would_have_left():
    """Made to run 3 layers; it would have left after 1 and after 2: running on is still worth what it saw."""
    trace = trace_of([3], [[0.1, 0.2, 0.3]], [[False, True, True]])
    final, cost = returns(trace, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))
    assert final.tolist() == [[0.0, 1.0, 0.0]]
    torch.testing.assert_close(cost, torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64))


def test_returns_of_a_row_that_left_early():
    trace = trace_of([1, 2], [[0.1, 0.0], [0.1, 0.2]], [[False, False], [False, False]])
    final, cost = returns(trace, torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert final[:, 0].tolist() == [1.0, 1.0]
    torch.testing.assert_close(cost[:, 0], torch.tensor([0.1, 0.3], dtype=torch.float64))
