"""A finished comparison as a terminal table and as one self-contained HTML page, both drawn from `compare.json`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from dht._files import write_text
from dht.report.charts import CHART_CSS
from dht.report.frontier import frontier_chart, regret_chart
from dht.report.page import page_environment, page_part
from dht.report.table import MISSING, decimal, finite, percent

COLUMNS = (
    ("accuracy", "accuracy"),
    ("macro F1", "macro_f1"),
    ("FLOPs", "flops_fraction"),
    ("p95 FLOPs", "flops_fraction_p95"),
    ("seconds", "time_fraction"),
    ("training FLOPs", "train_flops_fraction"),
    ("training seconds", "train_time_fraction"),
)
SHORT = ("accuracy", "FLOPs", "seconds", "training FLOPs", "training seconds")

ON_OUR_WEIGHTS = ("static-cut", "confidence-same", "fixed", "random", "hash", "length", "shuffled", "dht-served")

Entry = Mapping[str, Any]


def with_interval(entry: Entry, field: str) -> str:
    """Mean and half width of a fraction as percentages, without the sign.

    >>> with_interval({"accuracy": 0.8712, "accuracy_ci": 0.004}, "accuracy")
    '87.1 ± 0.4'
    """
    mean, half = finite(entry.get(field)), finite(entry.get(f"{field}_ci"))
    if mean is None:
        return MISSING
    return f"{100 * mean:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def comparison_table(result: Mapping[str, Any]) -> Table:
    """One row per method and budget with mean ± half width of the 95% interval, in percent; costs are of dense."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("budget")
    table.add_column("method", overflow="fold", min_width=10)
    table.add_column("seeds", justify="right")
    for title in SHORT:
        table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    fields = dict(COLUMNS)
    for budget, entries in _by_budget(result["summary"]):
        for index, entry in enumerate(entries):
            cells = [with_interval(entry, fields[title]) for title in SHORT]
            label = _label(entry, result["methods"])
            table.add_row("" if index else f"{budget:g}", Text(label), str(len(entry["seeds"])), *cells)
    return table


def _label(entry: Entry, methods: Mapping[str, Entry]) -> str:
    bound = methods.get(entry["method"], {}).get("group") == "bound"
    return f"{entry['method']} (upper bound)" if bound else str(entry["method"])


def _by_budget(summary: Sequence[Entry]) -> list[tuple[float, list[Entry]]]:
    budgets = sorted({entry["budget"] for entry in summary}, reverse=True)
    return [(budget, [entry for entry in summary if entry["budget"] == budget]) for budget in budgets]


def comparison_page(result: Mapping[str, Any]) -> str:
    """A complete HTML document: verdicts, frontiers, tables, regret, settings.

    Args:
        result: the content of `compare.json`, of an unfinished comparison too.
    """
    rows, settings = result["rows"], result["settings"]
    page = (
        page_environment()
        .from_string(page_part("comparison.html.j2"))
        .render(
            title=f"dht on {settings['data']}: {len(settings['methods'])} methods",
            intro=_intro(result),
            warnings=_warnings(result),
            claims=_claims(result["verdicts"]),
            pictures=_pictures(result),
            tables=[_table(budget, entries, result["methods"]) for budget, entries in _by_budget(result["summary"])],
            columns=[title for title, _ in COLUMNS],
            regret=Markup(regret_chart(mean_curves(result["regret"]))) if result["regret"] else "",
            figures=[(key, _words(value)) for key, value in settings.items()] + _versions(rows),
            base_css=Markup(page_part("base.css")),
            chart_css=Markup(CHART_CSS),
        )
    )
    return str(page).encode("utf-8", "replace").decode("utf-8")


def write_comparison(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes `page.html` into the comparison's folder."""
    write_text(folder / "page.html", comparison_page(result))


def _intro(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    return (
        f"{settings['model']}, epochs {settings['epochs']:g}, batch {settings['batch_size']}, {settings['dtype']}; "
        f"seeds {_words(settings['seeds'])}; budgets {_words(settings['budgets'])} of the dense FLOPs."
    )


def _warnings(result: Mapping[str, Any]) -> list[str]:
    said = []
    if result["missing"]:
        said.append(f"Unfinished: {result['missing']} of {result['cells']} cells have not been run.")
    timings = [row.get("timing") for row in result["rows"] if row["method"] != "oracle"]
    if untimed := timings.count(None):
        said.append(f"The seconds of {untimed} cells have not been measured.")
    if any(timing and timing["contended"] for timing in timings):
        said.append(
            "Some cells were timed beside other work on the same machine: their seconds are ratios measured in turn "
            "within one process, but contended ones. A claim in seconds needs a quiet machine."
        )
    commits = {row["versions"]["commit"] for row in result["rows"]}
    if len(commits) > 1:
        said.append(f"The rows come from {len(commits)} versions of the code: {', '.join(sorted(map(str, commits)))}.")
    return said


def _claims(verdicts: Sequence[Entry]) -> list[dict[str, Any]]:
    """The verdicts of each claim, budget by budget."""
    from dht.compare.verdict import CLAIMS

    claims = []
    for name, line in CLAIMS.items():
        members = [verdict for verdict in verdicts if verdict["claim"] == name]
        budgets = [
            {
                "budget": f"{verdict['budget']:g}",
                "word": verdict["word"],
                "sentence": verdict["sentence"],
                "versus": [_versus(one) for one in verdict["versus"]],
            }
            for verdict in members
        ]
        if budgets:
            claims.append({"name": name, "line": line, "budgets": budgets})
    return claims


def _versus(one: Entry) -> list[str]:
    half = "" if one["half"] is None else f" ± {100 * one['half']:.1f}"
    gap = MISSING if one["difference"] is None else f"{100 * one['difference']:+.1f}{half}"
    return [one["rival"], one["measure"], gap, percent(one["ours"]), percent(one["theirs"]), one["outcome"]]


def _pictures(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = {name: method["group"] for name, method in result["methods"].items()}
    rivals = [e for e in result["summary"] if groups.get(e["method"]) not in ("ablation",)]
    serving = [e for e in rivals if groups.get(e["method"]) != "training"]
    timed = [e for e in serving if groups.get(e["method"]) != "bound"]
    # Those that run on our weights share our training: one point stands for all.
    trained = [e for e in rivals if groups.get(e["method"]) != "bound" and e["method"] not in ON_OUR_WEIGHTS]
    everything = (
        ("Accuracy against inference FLOPs", serving, "flops_fraction", "inference FLOPs, % of dense (log scale)",
         "Up and to the left is better. The oracle reads the label: an upper bound, not a result."),
        ("Accuracy against inference seconds", timed, "time_fraction", "inference seconds, % of dense (log scale)",
         "The same methods on a clock, against the faster of two dense implementations."),
        ("Accuracy against training seconds", trained, "train_time_fraction",
         "training seconds, % of dense (log scale)",
         "Everything a training took, calibration and feedback included. Rivals that only serve our weights in another "
         "way are left out; training rivals are served densely."),
    )  # fmt: skip
    return [
        {"title": title, "caption": caption, "svg": Markup(frontier_chart(entries, field, title, axis))}
        for title, entries, field, axis, caption in everything
        if any(finite(entry.get(field)) for entry in entries)
    ]


def _table(budget: float, entries: Sequence[Entry], methods: Mapping[str, Entry]) -> dict[str, Any]:
    rows = [
        {
            "name": _label(entry, methods),
            "line": methods.get(entry["method"], {}).get("line", ""),
            "ours": entry["method"] == "dht",
            "cells": [
                str(len(entry["seeds"])),
                *(with_interval(entry, field) for _, field in COLUMNS),
                decimal(entry["arm_entropy"]),
                decimal(entry["mean_layers"]),
            ],
        }
        for entry in entries
    ]
    return {"budget": f"{budget:g}", "rows": rows}


def mean_curves(curves: Mapping[str, Entry]) -> dict[str, dict[str, list[float]]]:
    """Regret curves averaged over seeds, one a budget; probes that not all seeds made are left out.

    Args:
        curves: by "budget-sSEED", dicts with `step`, `fixed` and `oracle`.
    """
    groups: dict[str, list[Entry]] = {}
    for name, curve in curves.items():
        groups.setdefault(f"budget {name.rpartition('-s')[0]}", []).append(curve)
    means = {}
    for name, members in groups.items():
        shortest = min(len(curve["step"]) for curve in members)
        means[name] = {
            key: [statistics.fmean(curve[key][i] for curve in members) for i in range(shortest)]
            for key in ("step", "fixed", "oracle")
        }
    return means


def _versions(rows: Sequence[Entry]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for key, value in (
            row["versions"] | ({"threads": row["timing"]["threads"]} if row.get("timing") else {})
        ).items():
            found.setdefault(key, {})[str(value)] = None
    return [(key, ", ".join(values)) for key, values in found.items()]


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_words(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
