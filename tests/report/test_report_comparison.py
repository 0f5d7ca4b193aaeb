"""The page of a comparison, from hand-made results."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from dht.compare.verdict import summaries, verdicts
from dht.report.comparison import comparison_page, comparison_table, mean_curves, with_interval
from dht.report.frontier import frontier_chart, regret_chart

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</style><script>alert(1)</script>"


def result(seeds=2, contended=False, missing=0, commits=("abc",)):
    methods = {"dht": "ours", "random": "inference", "dense-decay": "training", "oracle": "bound", HOSTILE: "ablation"}
    rows = [
        {
            "method": method, "budget": budget, "seed": seed, "accuracy": 0.8 + 0.01 * seed, "flops_fraction": budget,
            "time_fraction": None if method == "oracle" else budget, "train_flops_fraction": budget,
            "train_time_fraction": budget, "arm_entropy": 0.5, "mean_layers": 2.0,
            "timing": {"contended": contended, "threads": 1}, "versions": {"commit": commits[seed % len(commits)]},
        }
        for method in methods for budget in (0.5, 0.1) for seed in range(seeds)
    ]  # fmt: skip
    lists = {"methods": list(methods), "budgets": [0.5, 0.1], "seeds": list(range(seeds)), "ablations": []}
    return {
        "settings": {"data": "sst2", "model": "minilm", "epochs": 3.0, "batch_size": 32, "dtype": "float32", **lists},
        "methods": {name: {"group": group, "line": f"what {name} is"} for name, group in methods.items()},
        "cells": len(rows) + missing, "missing": missing, "rows": rows, "summary": summaries(rows),
        "verdicts": [verdict.as_json() for verdict in verdicts(rows)],
        "regret": {"0.5-s0": {"step": [0, 16], "fixed": [0.1, 0.2], "oracle": [0.2, 0.4]}},
    }  # fmt: skip


def test_the_page_is_whole_and_safe():
    page = comparison_page(result())
    assert "<script" not in page
    assert "&lt;/style&gt;" in page
    assert "default-src 'none'" in page
    assert page.count("<svg") == 4
    assert "oracle (upper bound)" in page
    assert "Deciding per sample beats every choice" in page
    assert "80.5 ± 6.4" in page


def test_the_page_says_what_is_wrong_with_the_run():
    page = comparison_page(result(contended=True, missing=3, commits=("abc", "def")))
    assert "Unfinished: 3 of 23 cells have not been run." in page
    assert "A claim in seconds needs a quiet machine." in page
    assert "The rows come from 2 versions of the code: abc, def." in page
    clean = comparison_page(result())
    assert 'class="warn' not in clean


def test_a_page_without_rows():
    empty = result() | {"rows": [], "summary": [], "verdicts": [], "regret": {}}
    assert "No verdict: our own method is not among the rows." in comparison_page(empty)


def test_the_frontier_has_a_mark_and_a_bar_per_point():
    entries = result()["summary"]
    chart = ET.fromstring(frontier_chart(entries, "flops_fraction", "Accuracy", "FLOPs"))
    marks = [e for e in chart.iter(SVG + "path") if e.get("class") == "mark"]
    tips = [mark.find(SVG + "title").text for mark in marks if mark.find(SVG + "title") is not None]
    assert len(tips) == len(entries)
    assert tips[0].startswith("random at budget 0.10: accuracy 80.5% ± 6.4 points at 10.0% of dense, 2 seeds")
    assert len([e for e in chart.iter(SVG + "path") if e.get("class") == "error"]) == len(entries)
    assert len(ET.fromstring(frontier_chart([], "flops_fraction", "Accuracy", "FLOPs"))) > 0
    timed = ET.fromstring(frontier_chart(entries, "time_fraction", "Accuracy", "seconds"))
    assert "oracle" not in [e.text for e in timed.iter(SVG + "text")], "it has no seconds"


def test_regret_is_averaged_over_seeds():
    curves = {
        "0.5-s0": {"step": [0, 16, 32], "fixed": [0.1, 0.2, 0.3], "oracle": [1, 1, 1]},
        "0.5-s1": {"step": [0, 16], "fixed": [0.3, 0.4], "oracle": [1, 3]},
        "0.1-s0": {"step": [0], "fixed": [-0.5], "oracle": [0.5]},
    }
    means = mean_curves(curves)
    assert means["budget 0.5"]["fixed"] == pytest.approx([0.2, 0.3])
    assert means["budget 0.1"]["fixed"] == [-0.5]
    assert len(ET.fromstring(regret_chart(means))) > 0


def test_the_table_has_a_row_per_method_and_budget():
    console = Console(record=True, width=120)
    console.print(comparison_table(result()))
    text = console.export_text()
    assert text.count("oracle (upper bound)") == 2
    assert "80.5 ± 6.4" in text
    assert with_interval({}, "accuracy") == "–"
