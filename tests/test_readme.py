"""The README is a promise: its numbers are those of the committed JSON, its commands and options exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from typer.testing import CliRunner

from dht.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_numbers_are_those_of_the_committed_results():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    expected = table.block(json.loads(table.SOURCE.read_text(encoding="utf-8")))
    shown = README.split(table.START)[1].split(table.END)[0].strip()
    assert shown == expected


def test_commands_and_options_exist():
    calls = re.findall(r"^(?:echo .* \| )?dht (\w+) ([^#\n]*)", README, flags=re.MULTILINE)
    assert {name for name, _ in calls} == {"train", "fit", "evaluate", "predict", "compare"}
    for name, rest in calls:
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown, f"dht {name} has no {option}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_fault_figures_are_those_of_the_committed_results():
    found = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    for kind in ("kills", "damaged_files", "numbers"):
        figures = found[kind]
        assert f"| {figures['injected']} | {figures['survived']} | {figures['lost']} |" in page, kind
    assert f"{found['kills']['while_writing']} of them while a checkpoint was half-written" in page
    for kind in ("fuzz", "guided_fuzz"):
        inputs, crashed = found[kind]["inputs"], found[kind]["crashed"]
        assert f"| {inputs:,} | {inputs - crashed:,} | {crashed} |" in page, kind
    for kind, digits in (("rss_mb", 0), ("rss_mb_with_4_kernels_kept", 1)):
        for step in ("200", "2000"):
            assert f"{found['long_run'][kind][step]:.{digits}f} MB" in page
