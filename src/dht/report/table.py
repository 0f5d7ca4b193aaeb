"""Terminal tables of a finished run, and the number formats that the HTML page shares with them.

Everything here reads plain dicts. A figure that a run did not measure is missing or None and shows as a dash: a table
never fills a gap with a guess.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "–"
HISTOGRAM_WIDTH = 40  # characters of the longest bar
BESIDE = {
    "accuracy": ("macro_f1",),
    "micro_f1": ("macro_f1", "subset_accuracy"),
    "macro_f1": ("accuracy",),
    "entity_f1": ("entity_precision", "entity_recall", "accuracy"),
    "r2": ("mae", "rmse", "pearson", "spearman"),
    "cosine": ("ranking", "neighbour_agreement"),
}
"""What a report names as its `metric` -> figures that are told beside it."""
NO_SHARES = ("r2", "mae", "rmse", "pearson", "spearman", "cosine", "ranking")
"""Figures that are not told as percentages."""


def finite(value: Any) -> float | None:
    """A finite float, or None for anything that is not a number (None, NaN, infinities, booleans, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: Any, digits: int = 1) -> str:
    """A fraction as a percentage.

    >>> percent(0.264), percent(1), percent(None)
    ('26.4%', '100.0%', '–')
    """
    number = finite(value)
    return MISSING if number is None else f"{100 * number:.{digits}f}%"


def decimal(value: Any, digits: int = 2) -> str:
    """A number with `digits` decimals, or a dash."""
    number = finite(value)
    return MISSING if number is None else f"{number:.{digits}f}"


def duration(value: Any, unit: str = " s") -> str:
    """Seconds in at most six characters and the unit; hours from 10,000 s on.

    >>> duration(1.234), duration(12.34), duration(345.6), duration(18_000)
    ('1.23 s', '12.3 s', '346 s', '5.0 h')
    """
    number = finite(value)
    if number is None:
        return MISSING
    if abs(number) >= 10_000:
        return f"{number / 3600:.1f} h"
    digits = 3 if abs(number) < 1 else 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
    return f"{number:.{digits}f}{unit}"


def ratio(fraction: Any, part: Any, whole: Any) -> float | None:
    """The fraction when it was measured, else `part / whole` when both were, else None."""
    given, top, bottom = finite(fraction), finite(part), finite(whole)
    if given is not None:
        return given
    return top / bottom if top is not None and bottom else None


def summary_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """One row per model or policy, in at most 80 columns.

    Args:
        rows: reports in the shape that `evaluate` writes. The first column is `name`, else `policy`. A row needs no
            field in particular: what is missing shows as a dash, what is unknown is left out.
        title: a line above the table.

    Returns:
        A table with accuracy (or what the reports name as their `metric`), inference FLOPs and seconds, training FLOPs
        and seconds, mean layers and mean heads. FLOPs are fractions of the dense model's; the percentage after seconds
        is the same for time.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("model", overflow="fold", min_width=6, max_width=16)
    time = ("seconds\n(of dense)", "training s\n(of dense)")
    metric = next((str(row["metric"]) for row in rows if row.get("metric")), "accuracy")
    for header in (metric.replace("_", " "), "FLOPs", time[0], "training\nFLOPs", time[1], "layers", "heads"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(str(row.get("name") or row.get("policy") or MISSING)),
            _figure(row, metric),
            percent(row.get("flops_fraction")),
            _seconds_of_dense(row, ""),
            percent(row.get("train_flops_fraction")),
            _seconds_of_dense(row, "train_"),
            decimal(row.get("mean_layers")),
            decimal(row.get("mean_heads"), 1),
        )
    return table


def _seconds_of_dense(row: Mapping[str, Any], prefix: str) -> str:
    taken, dense = row.get(f"{prefix}seconds"), row.get(f"dense_{prefix}seconds")
    share = ratio(row.get(f"{prefix}time_fraction"), taken, dense)
    return duration(taken, unit="") if share is None else f"{duration(taken, unit='')} ({percent(share, 0)})"


def dense_row(report: Mapping[str, Any]) -> dict[str, Any]:
    """The dense model's row, made of what a report says about its own denominator."""
    return {
        "name": "dense",
        **{name: report.get(f"dense_{name}") for name in ("accuracy", str(report.get("metric")))},
        "flops_fraction": 1.0,
        "time_fraction": 1.0 if finite(report.get("dense_seconds")) is not None else None,
        "seconds": report.get("dense_seconds"),
        "train_flops_fraction": 1.0 if finite(report.get("train_flops_fraction")) is not None else None,
        "train_time_fraction": 1.0 if finite(report.get("dense_train_seconds")) is not None else None,
        "train_seconds": report.get("dense_train_seconds"),
        **dense_shape(report),
    }


def dense_shape(report: Mapping[str, Any]) -> dict[str, int]:
    """`mean_layers` and `mean_heads` of the dense model: the full N and H, read off the report's pictures."""
    usage, histogram = report.get("head_usage") or [], report.get("layers_histogram") or []
    shape: dict[str, int] = {}
    if usage or histogram:
        shape["mean_layers"] = len(usage) or len(histogram) - 1
    if usage:
        shape["mean_heads"] = max(len(layer) for layer in usage)
    return shape


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print one evaluation: the table against dense, where samples left, and the run's settings in a line.

    Args:
        report: what `evaluate` writes; any field may be missing.
        console: where to print; standard output when left out.
    """
    console = console or Console()
    rows = [report] if report.get("policy") == "dense" else [dense_row(report), report]
    console.print(summary_table(rows))
    console.print()
    histogram = [int(finite(count) or 0) for count in report.get("layers_histogram") or []]
    if sum(histogram):
        console.print(layers_bars(histogram))
        console.print()
    console.print(Text(_settings_line(report)))


def layers_bars(histogram: Iterable[int]) -> Text:
    """Text bars of how many samples ran 0..N layers; the 0 row appears only when some sample ran none."""
    counts = list(histogram)
    total, longest = sum(counts), max(counts)
    lines = ["samples by layers run"]
    for layers, count in enumerate(counts):
        if layers or count:
            bar = "█" * round(HISTOGRAM_WIDTH * count / longest) or ("▏" if count else "")
            lines.append(f"{layers:>3}  {bar:<{HISTOGRAM_WIDTH}}  {count:>7} {percent(count / total):>7}")
    return Text("\n".join(lines))


def _figure(report: Mapping[str, Any], name: str) -> str:
    return decimal(report.get(name), 3) if name in NO_SHARES else percent(report.get(name))


def _settings_line(report: Mapping[str, Any]) -> str:
    parts = [f"samples {report.get('num_examples', MISSING)}"]
    beside = BESIDE.get(str(report.get("metric")), BESIDE["accuracy"])
    parts += [f"{name.replace('_', ' ').replace('f1', 'F1')} {_figure(report, name)}" for name in beside]
    parts.append(f"budget {percent(report.get('budget'))}")
    if report.get("lexical_accuracy") is not None:
        parts.append(f"words alone {percent(report['lexical_accuracy'])}")
    parts += [f"{key} {report[key]}" for key in ("policy", "search", "seed") if report.get(key) is not None]
    parts.append(f"policy time {percent(report.get('policy_time_fraction'))}")
    return ", ".join(parts)
