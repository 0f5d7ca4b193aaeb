"""The page of tools is executed, block by block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dht
from builders import dynamic_model
from dht.hf.card import write_card

PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_every_block_runs(rows, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason='needs the extra "peft"')
    pytest.importorskip("tensorboard", reason='needs the extra "tensorboard"')
    model, folder = dynamic_model(), tmp_path / "runs" / "mine"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, model, {"accuracy": 0.9, "data": "texts", "model": "minilm", "num_examples": 10})
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 8
    space: dict[str, object] = {"rows": rows}
    for block in blocks:
        exec(compile(block, "docs/tools.md", "exec"), space)
    assert len(space["answers"]) == 2
    assert {"flops_fraction", "price"} & set(space["trainer"].state.log_history[-1]) or space["trainer"].ledger.history
    assert isinstance(space["small"], dht.DHTForSequenceClassification)
    assert (tmp_path / "runs" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "runs" / "merged" / "model.safetensors").is_file()
    assert space["card"].data.library_name == "transformers"
