"""Table and picture of `dht bench --growth`: milliseconds against one size at a time."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from math import ceil, floor, log, log10
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .charts import CHART_CSS, MARKERS, WIDTH, Axis, _add, _done, _path, _svg, _x_axis, _y_axis
from .speed import header_line
from .table import decimal

HEIGHT = 230.0  # of a panel, user units
TITLES = {
    "layers": "layers",
    "heads": "head units",
    "width": "width",
    "batch": "rows a batch",
    "tokens": "tokens a row",
    "arms": "arms",
    "features": "features",
    "seen": "rows seen",
}
SERIES = {
    "dense": ("k-dense", "square", "dense forward"),
    "plan": ("k-learned", "circle", "forward at .26 of the FLOPs"),
    "learn": ("k-static", "up", "bandit: learn from 32 rows"),
    "decide": ("k-confidence", "diamond", "bandit: decide for 32 rows"),
}
PALETTE = """
:root { --surface: #ffffff; --ink: #1d2025; --ink-2: #565d68; --line: #e1e2e0; --accent: #1c56b0; --amber: #a85508;
  --teal: #0c7266; }
@media (prefers-color-scheme: dark) { :root { --surface: #1a1d21; --ink: #e9e9e6; --ink-2: #a9b0ba; --line: #31363d;
  --accent: #7cadf5; --amber: #efa55d; --teal: #52cdbd; } }
svg { background: var(--surface); }
"""

Point = Mapping[str, Any]


def print_growth(result: Mapping[str, Any], console: Console) -> None:
    """Prints the header line and a table with a line for every size.

    Args:
        result: of `measure_growth`.
        console: where to.
    """
    console.print(header_line(result["header"]), soft_wrap=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("part", "against", "value", "dense ms", "plan ms", "decide ms", "learn ms", "state kB"):
        table.add_column(name, justify="left" if name in ("part", "against") else "right", no_wrap=True)
    before = None
    for point in result["points"]:
        if before not in (None, point["size"]):
            table.add_section()
        before = point["size"]
        figures = [decimal(point.get(name), 2) for name in ("dense", "plan", "decide", "learn")]
        state = decimal(point["state_bytes"] / 1000, 1) if "state_bytes" in point else decimal(None)
        table.add_row(point["part"], TITLES[point["size"]], f"{point['value']:,}", *figures, state)
    console.print(table)


def growth_chart(result: Mapping[str, Any]) -> str:
    """A self-contained SVG: one panel for every size, both axes logarithmic."""
    points = result["points"]
    sizes = list(dict.fromkeys(point["size"] for point in points))
    height = 40 + HEIGHT * -(-len(sizes) // 2)
    words = "; ".join(f"{TITLES[size]}: {_in_words(points, size)}" for size in sizes)
    svg = _svg("growth", height, "Time against sizes", f"Milliseconds of a call against one size at a time. {words}.")
    svg.set("viewBox", f"0 0 {2 * WIDTH} {height:.0f}")
    svg.insert(0, _style())
    _series_legend(svg)
    for index, size in enumerate(sizes):
        panel = _add(svg, "g", transform=f"translate({index % 2 * WIDTH} {40 + index // 2 * HEIGHT:.0f})")
        _panel(panel, TITLES[size], [point for point in points if point["size"] == size])
    return _done(svg)


def _style() -> ET.Element:
    style = ET.Element("style")
    style.text = PALETTE + CHART_CSS
    return style


def _series_legend(svg: ET.Element) -> None:
    x = 60.0
    for css, marker, label in SERIES.values():
        group = _add(svg, "g", class_=css)
        _add(group, "path", d=MARKERS[marker], transform=f"translate({x:.1f} 16)", class_="mark")
        _add(svg, "text", label, x=x + 10, y=20)
        x += 30 + 6.6 * len(label)


def _panel(panel: ET.Element, title: str, points: Sequence[Point]) -> None:
    names = [name for name in SERIES if name in points[0]]
    places = [_place(point["value"]) for point in points]
    x = Axis(min(places), max(places), 70, WIDTH - 30)
    # Both axes are logarithmic: cost in proportion to a power of the size is a straight line.
    figures = [log10(max(point[name], 1e-6)) for point in points for name in names]
    y = Axis(floor(min(figures)), max(ceil(max(figures)), floor(min(figures)) + 1), HEIGHT - 56, 34)
    _y_axis(panel, y, 70, WIDTH - 30, "ms", [], "")
    for power in range(int(y.low), int(y.high) + 1):
        _add(panel, "line", x1=70, x2=WIDTH - 30, y1=y.at(power), y2=y.at(power), class_="grid")
        _add(panel, "text", f"{10.0**power:,g}", x=62, y=y.at(power) + 4, text_anchor="end")
    _x_axis(panel, x, HEIGHT - 56, title, [], "")
    for point, place in zip(points, places, strict=True):
        label = f"{point['value']:,}"
        _add(panel, "text", label, x=x.at(place), y=HEIGHT - 38, text_anchor="middle")
    for name in names:
        css, marker, label = SERIES[name]
        group = _add(panel, "g", class_=css)
        spots = [
            (x.at(place), y.at(log10(max(point[name], 1e-6)))) for point, place in zip(points, places, strict=True)
        ]
        _add(group, "path", d=_path(spots), class_="trace thin")
        for point, (left, top) in zip(points, spots, strict=True):
            tip = f"{label}: {decimal(point[name], 3)} ms at {point['value']:,} {title}"
            place_at = f"translate({left:.1f} {top:.1f})"
            _add(group, "path", tip=tip, d=MARKERS[marker], transform=place_at, class_="mark")


def _place(value: float) -> float:
    """Position on the log scale; "nothing seen" stands a decade and a half left of the first thousand."""
    return log(value) if value else log(30)


def _in_words(points: Sequence[Point], size: str) -> str:
    rows = [point for point in points if point["size"] == size]
    return ", ".join(
        f"{name} {decimal(rows[0][name], 3)} to {decimal(rows[-1][name], 3)} ms" for name in SERIES if name in rows[0]
    )
