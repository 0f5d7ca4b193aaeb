"""Two real processes: one policy on both, as if one process had seen all rows, also after resuming; ranks that skip
different layers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launching import launch
from tools import two_ranks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Where two ranks left what they ended with, and what they printed."""
    out = tmp_path_factory.mktemp("ranks")
    return out, launch("torchrun", HERE / "two_ranks.py", out)


def test_two_ranks_are_one_trainer(launched, tmp_path):
    out, _ = launched
    for name in ("exact", "full", "resumed"):
        ranks = [load_file(out / f"{name}-{rank}.safetensors") for rank in range(2)]
        for key, value in ranks[0].items():
            assert torch.equal(value, ranks[1][key]), f"{name}: {key} differs between the ranks"
        first, second = ((out / f"{name}-{rank}.json").read_text() for rank in range(2))
        assert first == second, "every rank's ledger counts the work of all"
    for key, value in load_file(out / "full-0.safetensors").items():
        assert torch.equal(value, load_file(out / "resumed-0.safetensors")[key]), f"{key} differs after resuming"
    whole, resumed = (json.loads((out / f"{name}-0.json").read_text()) for name in ("full", "resumed"))
    assert whole == resumed
    # Nothing forgotten: two ranks are one process that accumulates their batches.
    state, ledger = two_ranks.ending(two_ranks.trained(tmp_path, accumulate=2, forgetting=1.0))
    for key, value in load_file(out / "exact-0.safetensors").items():
        torch.testing.assert_close(value, state[key], atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    told = json.loads((out / "exact-0.json").read_text())
    assert told.pop("history")[0] == pytest.approx(ledger.pop("history")[0], rel=1e-4)
    assert told == pytest.approx(ledger, rel=1e-4)
    assert int(state["policy.numbers.clock"]) > 100


def test_ranks_that_run_different_layers_do_not_hang(launched):
    _, said = launched
    assert "rank 0 ran 3 layers" in said
    assert "rank 1 ran 1 layers" in said
