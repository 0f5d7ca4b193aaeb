"""The pages in `docs/`: their commands and options exist, and their Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dht.cli import app
from test_sklearn import THINGS, X, Y
from test_train import encoder  # noqa: F401

PAGE = (Path(__file__).parents[1] / "docs" / "data-and-export.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_commands_and_options_exist():
    calls = re.findall(r"^dht (\w*) ?([^#\n]*)", PAGE, flags=re.MULTILINE)
    assert {name for name, _ in calls} == {"train", "export", "doctor", ""}
    for name, rest in calls:
        shown = CliRunner().invoke(app, [*([name] if name else []), "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown, f"dht {name} has no {option}"
    for name in re.findall(r"--format (\S+)", PAGE):
        assert name in CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).output


def test_data_block():
    datasets = pytest.importorskip("datasets")
    rows = {"review": [f"{text} {i}" for i, text in enumerate(X)], "sentiment": Y}
    known = {"my_dataset": datasets.Dataset.from_dict(rows).to_iterable_dataset()}
    exec(BLOCKS[0], known)
    assert len(known["data"].notes) == 3


def test_sklearn_block(encoder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    known = {"texts": X, "labels": Y}
    exec(BLOCKS[1].replace('"minilm"', repr(str(encoder))), known)
    assert len(known["layers"]) == len(X) == 10 * len(THINGS)
    assert (tmp_path / "runs" / "classifier" / "config.json").is_file()
