"""Accuracy against budget, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from .table import percent


def dial_table(report: Mapping[str, Any]) -> Table:
    """One row a budget, in at most 80 columns; the dense model first.

    Args:
        report: what `dht fit` writes.

    Returns:
        A table of FLOPs, accuracy and agreement with the full model as measured, FLOPs and agreement as
        expected from the fit rows, and FLOPs and accuracy (without labels agreement) of the threshold rival.
    """
    key = "agreement" if report.get("accuracy") is None else "accuracy"
    title = f"{report['num_examples']} texts ({report['split']}), fitted on {report['fit_rows']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    columns = ("budget", "FLOPs", "accuracy", "as\ndense", "expected\nFLOPs", "expected\nas dense")
    for header in (*columns, "threshold\nFLOPs", f"threshold\n{key}"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row("dense", percent(1.0), percent(report.get("dense_accuracy")), percent(1.0))
    for point in report["dial"]:
        measured, expected = point["measured"], point["expected"]
        rival = measured["confidence"]
        table.add_row(
            f"{measured['budget']:g}",
            percent(measured["flops_fraction"]),
            percent(measured.get("accuracy")),
            percent(measured["agreement"]),
            percent(expected["flops_fraction"]),
            percent(expected["agreement"]),
            percent(rival["flops_fraction"]),
            percent(rival[key]),
        )
    return table
