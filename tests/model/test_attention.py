"""Attention step by step, where the fused kernel's backward is slow: the same answers and gradients."""

from __future__ import annotations

import pytest
import torch

from dht.model import block
from dht.model.block import Block
from dht.model.packed import Packed

LENGTHS = torch.tensor([9, 4, 7])


def ready(window: int | None = None) -> Block:
    """A block of 4 heads with weights that attend to something."""
    torch.manual_seed(0)
    made = Block(32, 4, 64, window=window)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return made.train()


def run(made: Block, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, the input's gradient and that of the weights of query, key and value, computed in bfloat16."""
    torch.manual_seed(1)
    hidden = torch.randn(int(lengths.sum()), 32, requires_grad=True)
    made.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = made(Packed(hidden, lengths, torch.arange(len(lengths))), None, None)
    output.float().square().sum().backward()
    assert hidden.grad is not None
    assert made.qkv_weight.grad is not None
    return output.detach().float(), hidden.grad, made.qkv_weight.grad


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.new_full((3,), 8)], ids=["ragged", "equal"])
def test_steps_say_what_the_fused_kernel_says(
    monkeypatch: pytest.MonkeyPatch, lengths: torch.Tensor, window: int | None
) -> None:
    made = ready(window)
    stepwise = run(made, lengths)
    monkeypatch.setattr(block, "STEPWISE", 0)
    fused = run(made, lengths)
    for ours, reference in zip(stepwise, fused, strict=True):
        assert ours.isfinite().all()
        assert (ours - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize(("dtype", "gradient", "tokens", "steps"), [
    (torch.bfloat16, True, 9, True),
    (torch.bfloat16, True, block.STEPWISE + 1, False),
    (torch.bfloat16, False, 9, False),
    (torch.float32, True, 9, False),
])  # fmt: skip
def test_steps_are_taken_only_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, gradient: bool, tokens: int, steps: bool
) -> None:
    taken, real = [], block._attend_step_by_step
    monkeypatch.setattr(block, "_attend_step_by_step", lambda *args: taken.append(1) or real(*args))
    made, lengths = ready(), torch.tensor([tokens, tokens])
    rows = Packed(torch.randn(2 * tokens, 32), lengths, torch.arange(2))
    with torch.set_grad_enabled(gradient), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        made(rows, None, None)
    assert bool(taken) == steps
