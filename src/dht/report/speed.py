"""The speed table for people, from the rows of `dht bench`: seconds, fractions, and how much of a saving is real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .table import MISSING, decimal, finite, percent

COLUMNS = (
    "rows", "plan", "transf.\nms", "dense\nms", "dht\nms", "FLOPs", "time", "real-\nised", "policy", "peak\nMB",
    "p50/p95\nms", "rows/s",
)  # fmt: skip


def print_speed(result: Mapping[str, Any], console: Console) -> None:
    """Prints a header line, one table for every model, kind and dtype, and what was left out.

    Args:
        result: of `dht bench`.
        console: where to.
    """
    console.print(header_line(result["header"]), soft_wrap=True, highlight=False)
    ordered = sorted(result["rows"], key=lambda row: (row["model"], row["what"], row["dtype"]))
    for (model, what, dtype), rows in groupby(ordered, key=lambda row: (row["model"], row["what"], row["dtype"])):
        console.print()
        console.print(speed_table(list(rows), f"{model}, {what}, {dtype}"))
    if "bandits" in result:
        console.print()
        console.print(bandit_table(result["bandits"]))
    if "whole" in result:
        console.print()
        console.print(whole_table(result["whole"]))
    console.print()
    for sentence in result["left_out"]:
        console.print(f"left out: {sentence}", soft_wrap=True, highlight=False, markup=False)


def bandit_table(found: Mapping[str, Any]) -> Table:
    """A line for each contender: rows decided for and learned from in a second, and its mean regret."""
    setting = found["setting"]
    title = f"bandits: {setting['arms']} arms, {setting['features']} features, batches of {setting['batch']}"
    table = _plain_table(title, ("", "rows/s", "dht UCB is\ntimes as fast", "regret", "in the last\nquarter"))
    for name, result in found["results"].items():
        table.add_row(
            name, f"{result['rows_per_second']:,.0f}", decimal(found["times_as_fast"].get(name), 1),
            decimal(result["regret"], 4), decimal(result["last_regret"], 4),
        )  # fmt: skip
    return table


def whole_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each whole training: seconds, and fractions of dense FLOPs and seconds."""
    columns = ("budget", "seconds", "FLOPs", "of transformers'\nseconds", "of our dense\npath's seconds")
    table = _plain_table("a whole training", ("", *columns))
    for row in rows:
        table.add_row(
            f"{row['model']}, {row['dtype']}", f"{row['budget']:g}", decimal(row["train_seconds"], 0),
            decimal(row["train_flops_fraction"], 3), decimal(row["of_transformers"], 3),
            decimal(row["of_own_dense"], 3),
        )  # fmt: skip
    return table


def _plain_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def header_line(header: Mapping[str, Any]) -> str:
    """Hardware, threads, versions, commit and seed in a line."""
    return (
        f"{header['hardware']}, {header['threads']} thread(s), torch {header['torch']}, transformers"
        f" {header['transformers']}, commit {header['commit']}, seed {header['seed']}"
    )


def speed_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One line a row, in at most 110 columns.

    `FLOPs` and `time` are fractions of dense; time's denominator is the faster of the two dense columns. `realised` is
    the first over the second. Milliseconds are those of a batch; p50 and p95 of a single call.
    """
    caption = "dense over transformers: " + (_dense_ratios(rows) or MISSING)
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("rows", "plan") else "right", no_wrap=True)
    before = None
    for row in rows:
        shape = f"{row['batch']} x {row['tokens']}"
        if before not in (None, shape):
            table.add_section()
        table.add_row(shape if shape != before else "", *_cells(row))
        before = shape
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    plan = "dense" if row["plan"] == "dense" else f"{row['plan']} {row['fraction']:g}"
    return [
        plan,
        _ms(row["transformers_seconds"]),
        _ms(row["own_dense_seconds"]),
        _ms(row["seconds"]),
        decimal(row["theoretical"], 3),
        decimal(row["measured"], 3),
        decimal(row["realised"]),
        percent(row["policy_share"]),
        _short(row["peak_mb"]),
        f"{_short(row['p50_ms'])}/{_short(row['p95_ms'])}",
        decimal(row["examples_per_second"], 0),
    ]


def _ms(seconds: Any) -> str:
    number = finite(seconds)
    return MISSING if number is None else _short(1000 * number)


def _short(value: float) -> str:
    """Three figures at least, so that 1.62 and 1,620 both say enough.

    >>> _short(1.6184), _short(16.184), _short(1618.4)
    ('1.62', '16.2', '1618')
    """
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _dense_ratios(rows: Sequence[Mapping[str, Any]]) -> str:
    """Our dense path's time over that of `transformers`, for each shape."""
    found = {f"{r['batch']} x {r['tokens']}": r["own_over_transformers"] for r in rows}
    return ", ".join(f"{shape} {decimal(ratio)}" for shape, ratio in found.items() if finite(ratio) is not None)
