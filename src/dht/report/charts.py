"""Small inline SVG pictures of a run, as strings: no plotting library, no script, nothing loaded.

Every picture has a title, a description that says its data in words, units on its axes and a tooltip on each mark.
Colours come from the CSS variables in `CHART_CSS`, so that a page shows them in its light and its dark scheme. Elements
are built with `xml.etree`, which escapes every text; class names are ours alone and never come from data.
"""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dht.report.table import decimal, finite, percent

WIDTH = 460  # user units; pages scale pictures to the width they have
CHARACTER = 6.6  # mean advance of a 12-unit sans-serif character, on the safe side
MAX_STEPS = 240  # points drawn per training line; longer histories are averaged in buckets
UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# kind -> (CSS class, marker). Kinds without an entry take the four last pairs in turn.
KINDS = {
    "dense": ("k-dense", "square"),
    "learned": ("k-learned", "circle"),
    "integrated": ("k-integrated", "diamond"),
    "static": ("k-static", "up"),
    "confidence": ("k-confidence", "down"),
    "random": ("k-random", "circle"),
}
OTHER_KINDS = [("k-a", "diamond"), ("k-b", "square"), ("k-c", "up"), ("k-random", "down")]
MARKERS = {
    "square": "M-4-4H4V4H-4Z",
    "circle": "M-4.5 0A4.5 4.5 0 1 1 4.5 0A4.5 4.5 0 1 1-4.5 0Z",
    "diamond": "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "up": "M0-5.5L5 4H-5Z",
    "down": "M0 5.5L5-4H-5Z",
}

CHART_CSS = """
.chart text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink-2);
  font-variant-numeric: tabular-nums; }
.chart .value { fill: var(--ink); font-size: 12px; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .bar, .chart .cell { fill: var(--accent); }
.chart .empty { fill: none; stroke: var(--line); }
.chart .cell-low { fill: var(--ink); } .chart .cell-high { fill: var(--on-accent); }
.chart .cell-mid { fill: var(--mid-accent); }
.chart .cell-low, .chart .cell-mid, .chart .cell-high { font-size: 11px; }
.chart .trace { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .dashed { stroke-dasharray: 5 4; stroke-linecap: butt; } .chart .thin { stroke-width: 1.5; }
.chart .mark { stroke: var(--surface); stroke-width: 1.2; }
.chart .halo { stroke: var(--surface); stroke-width: 3; stroke-linejoin: round; paint-order: stroke; }
.k-dense { --series: var(--ink); } .k-learned { --series: var(--accent); } .k-integrated { --series: var(--violet); }
.k-static { --series: var(--amber); } .k-confidence { --series: var(--teal); } .k-random { --series: var(--grey); }
.k-a { --series: var(--pink); } .k-b { --series: var(--olive); } .k-c { --series: var(--brown); }
.chart .mark { fill: var(--series); } .chart .trace, .chart .error { stroke: var(--series); }
.chart .error { stroke-width: 1.5; }
"""


@dataclass(frozen=True)
class Axis:
    """A linear map from values `low..high` to positions `start..end` (user units)."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The position of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values (steps of 1, 2 or 5 times a power of ten) within the axis."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


Box = tuple[float, float, float, float]  # left, top, width, height


def layers_chart(histogram: Sequence[int]) -> str:
    """Bars: how many samples ran 0..N layers; the bar for 0 is drawn only when some sample ran none.

    Args:
        histogram: counts of samples, `[N+1]`.
    """
    counts = {layers: finite(count) or 0.0 for layers, count in enumerate(histogram)}
    if counts.get(0) == 0 and len(counts) > 1:
        del counts[0]
    total = sum(counts.values())
    words = "; ".join(f"{layers}: {count:.0f}" for layers, count in counts.items())
    svg = _svg("layers", 264, "Samples by number of layers run", f"Samples that ran each number of layers: {words}.")
    y = Axis(0, max([1.0, *counts.values()]), 220, 46)
    _add(svg, "text", "samples", x=54, y=14)
    _y_axis(svg, y, 54, WIDTH - 6, "", [tick for tick in y.ticks(6) if tick == round(tick)], "{:,.0f}")
    slot = (WIDTH - 60) / max(1, len(counts))
    for index, (layers, count) in enumerate(counts.items()):
        middle = 54 + (index + 0.5) * slot
        width = min(56.0, slot * 0.72)
        tip = f"{layers} layers: {count:,.0f} samples ({percent(count / total if total else None)})"
        top = y.at(count)
        _add(svg, "rect", tip=tip, x=middle - width / 2, y=top, width=width, height=220 - top, class_="bar")
        label = f"{count:,.0f}"
        if len(label) * CHARACTER <= slot or count == max(counts.values()):
            _add(svg, "text", label, x=middle, y=top - 5, text_anchor="middle", class_="value")
        if slot >= 3 * CHARACTER or index % 2 == len(counts) % 2:
            _add(svg, "text", str(layers), x=middle, y=237, text_anchor="middle")
    _add(svg, "text", "layers run", x=(54 + WIDTH - 6) / 2, y=258, text_anchor="middle")
    return _done(svg)


def heads_chart(usage: Sequence[Sequence[float]]) -> str:
    """Heat map: the share of all samples that ran each head unit in each layer.

    Args:
        usage: fractions in [0, 1], `[N][H]`; both are counted from 1 in the picture.
    """
    heads = max([1, *(len(layer) for layer in usage)])
    size = (WIDTH - 60) / heads
    height = min(30.0, max(16.0, size))
    bottom = 26 + height * len(usage)
    means = [sum(finite(value) or 0 for value in layer) / max(1, len(layer)) for layer in usage]
    words = "; ".join(f"layer {index + 1}: {percent(mean, 0)}" for index, mean in enumerate(means))
    description = f"Mean share of samples over the head units of each layer: {words}."
    svg = _svg("heads", bottom + 66, "Head units run in each layer", description)
    _add(svg, "text", "layer", x=44, y=16, text_anchor="end")
    for row, layer in enumerate(usage):
        top = 26 + row * height
        _add(svg, "text", str(row + 1), x=44, y=top + height / 2 + 4, text_anchor="end")
        for column, value in enumerate(layer):
            _heat_cell(svg, 54 + column * size, top, size - 1.5, height - 1.5, value, (row + 1, column + 1))
    step = math.ceil(2.6 * CHARACTER / size)
    for column in range(0, heads, step):
        _add(svg, "text", str(column + 1), x=54 + (column + 0.5) * size, y=bottom + 15, text_anchor="middle")
    _add(svg, "text", "head unit", x=54 + heads * size / 2, y=bottom + 33, text_anchor="middle")
    _heat_legend(svg, bottom + 46)
    return _done(svg)


def _heat_cell(
    svg: ET.Element, x: float, y: float, width: float, height: float, value: Any, place: tuple[int, int]
) -> None:
    share = min(1.0, max(0.0, finite(value) or 0.0))
    tip = f"Layer {place[0]}, head unit {place[1]}: ran for {percent(finite(value))} of samples"
    _add(svg, "rect", x=x, y=y, width=width, height=height, rx=2, class_="empty")
    _add(svg, "rect", tip=tip, x=x, y=y, width=width, height=height, rx=2, class_="cell", fill_opacity=share)
    if width >= 22 and finite(value) is not None:
        shade = "low" if share < 0.64 else "mid" if share < 0.76 else "high"
        label = f"{100 * share:.0f}"
        attributes: dict[str, Any] = {"text_anchor": "middle", "pointer_events": "none", "class_": f"cell-{shade}"}
        _add(svg, "text", label, x=x + width / 2, y=y + height / 2 + 4, **attributes)


def _heat_legend(svg: ET.Element, y: float) -> None:
    _add(svg, "text", "0%", x=54, y=y + 11)
    for index in range(10):
        x = 82 + index * 14
        _add(svg, "rect", x=x, y=y + 1, width=14, height=12, class_="cell", fill_opacity=(index + 0.5) / 10)
    _add(svg, "text", "100% of samples", x=230, y=y + 11)


def tradeoff_chart(points: Sequence[Mapping[str, Any]]) -> str:
    """Scatter: accuracy against inference compute; the points of one kind are joined in order of compute.

    Args:
        points: dicts with `name`, `kind`, `flops_fraction`, `accuracy` and optionally `ci`, the half width of the
            interval drawn as an error bar. Points without both numbers are left out.
    """
    drawn = [point for point in points if _position(point) is not None]
    words = "; ".join(f"{p.get('name')}: {percent(p['accuracy'])} at {percent(p['flops_fraction'])}" for p in drawn)
    svg = _svg("tradeoff", 350, "Accuracy against compute", f"Accuracy at a share of the dense FLOPs. {words}.")
    lows = [p["accuracy"] - (finite(p.get("ci")) or 0) for p in drawn] or [0.0]
    highs = [p["accuracy"] + (finite(p.get("ci")) or 0) for p in drawn] or [1.0]
    margin = max(0.01, 0.12 * (max(highs) - min(lows)))
    y = Axis(max(0.0, min(lows) - margin), min(1.0 + margin / 2, max(highs) + margin), 280, 26)
    x = Axis(0, 1.06 * max([1.0, *(p["flops_fraction"] for p in drawn)]), 60, WIDTH - 6)
    ticks = [tick for tick in y.ticks(5) if tick <= 1]
    digits = 0 if all(abs(100 * tick - round(100 * tick)) < 1e-6 for tick in ticks) else 1
    _y_axis(svg, y, 60, WIDTH - 6, "accuracy", ticks, f"{{:.{digits}%}}")
    _x_axis(svg, x, 280, "compute, % of the dense FLOPs at inference", x.ticks(6), "{:.0%}")
    kinds = _styles(drawn)
    occupied = [_extent(p, x, y) for p in drawn]
    for kind, (css, marker) in kinds.items():
        group = _add(svg, "g", class_=css)
        series = sorted((p for p in drawn if p.get("kind") == kind), key=lambda p: float(p["flops_fraction"]))
        spots = [(x.at(p["flops_fraction"]), y.at(p["accuracy"])) for p in series]
        if len(spots) > 1:
            _add(group, "path", d=_path(spots), class_="trace thin")
        for point, (left, top) in zip(series, spots, strict=True):
            _draw_point(group, point, left, top, marker, y)
    for point in sorted(drawn, key=lambda p: _rank(p.get("kind"))):
        _place_label(svg, str(point.get("name", "")), x.at(point["flops_fraction"]), y.at(point["accuracy"]), occupied)
    svg.set("viewBox", f"0 0 {WIDTH} {_legend(svg, 336, kinds) + 10:.0f}")
    return _done(svg)


def _position(point: Mapping[str, Any]) -> tuple[float, float] | None:
    compute, accuracy = finite(point.get("flops_fraction")), finite(point.get("accuracy"))
    return None if compute is None or accuracy is None else (compute, accuracy)


def _styles(points: Sequence[Mapping[str, Any]]) -> dict[Any, tuple[str, str]]:
    present = sorted(dict.fromkeys(point.get("kind") for point in points), key=_rank)
    others = [kind for kind in present if kind not in KINDS]
    extra = {kind: OTHER_KINDS[index % len(OTHER_KINDS)] for index, kind in enumerate(others)}
    return {kind: KINDS[kind] if kind in KINDS else extra[kind] for kind in present}


def _rank(kind: Any) -> int:
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)


def _draw_point(group: ET.Element, point: Mapping[str, Any], x: float, y: float, marker: str, axis: Axis) -> None:
    half = finite(point.get("ci"))
    tip = f"{point.get('name')}: accuracy {percent(point['accuracy'])}"
    if half:
        tip += f" ± {100 * half:.1f} points"
        top, bottom = axis.at(point["accuracy"] + half), axis.at(point["accuracy"] - half)
        d = f"M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 3:.1f} {top:.1f}h6M{x - 3:.1f} {bottom:.1f}h6"
        _add(group, "path", d=d, class_="error", fill="none")
    tip += f" at {percent(point['flops_fraction'])} of the dense FLOPs"
    if finite(point.get("time_fraction")) is not None:
        tip += f", {percent(point['time_fraction'])} of its time"
    _add(group, "path", tip=tip, d=MARKERS[marker], transform=f"translate({x:.1f} {y:.1f})", class_="mark")


def _extent(point: Mapping[str, Any], x: Axis, y: Axis) -> Box:
    """The box that a point's mark and error bar cover."""
    half = finite(point.get("ci")) or 0.0
    top, bottom = y.at(point["accuracy"] + half), y.at(point["accuracy"] - half)
    return x.at(point["flops_fraction"]) - 6, min(top, bottom) - 6, 12.0, abs(bottom - top) + 12


def _place_label(svg: ET.Element, name: str, x: float, y: float, occupied: list[Box]) -> None:
    """Write a name where it covers nothing, or not at all: the tooltip and the table have it too."""
    label = name if len(name) <= 20 else name[:19] + "…"
    width = len(label) * CHARACTER
    for left, baseline in ((x + 9, y + 15), (x - width / 2, y - 11), (x - 9 - width, y - 7), (x - width / 2, y + 20)):
        spot = (left, baseline - 11, width, 14.0)
        inside = left >= 62 and left + width <= WIDTH - 2 and 14 <= spot[1] <= 265
        if inside and not any(_overlap(spot, other) for other in occupied):
            _add(svg, "text", label, x=left, y=baseline, class_="value halo")
            occupied.append(spot)
            return


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _legend(svg: ET.Element, y: float, kinds: Mapping[Any, tuple[str, str]]) -> float:
    """Draw markers with their kinds from height `y` on, in as many lines as needed; returns the last line's height."""
    x = 60.0
    for kind, (css, marker) in kinds.items():
        label = str(kind)[:20]
        if x + 14 + len(label) * CHARACTER > WIDTH:
            x, y = 60.0, y + 18
        group = _add(svg, "g", class_=css)
        _add(group, "path", d=MARKERS[marker], transform=f"translate({x + 5:.1f} {y:.1f})", class_="mark")
        _add(svg, "text", label, x=x + 14, y=y + 4)
        x += 14 + len(label) * CHARACTER + 16
    return y


def training_chart(history: Sequence[Mapping[str, Any]]) -> str:
    """Lines over training steps: executed compute against its schedule, then the price and the loss where recorded.

    Args:
        history: dicts with `step` and any of `fraction` and `target` (of the dense FLOPs), `price` and `loss`. Long
            histories are averaged in buckets of steps.
    """
    dated = [row for row in history if finite(row.get("step")) is not None]
    rows = _buckets(dated)
    panels = [
        (title, fields)
        for title, fields in (
            ("compute, % of the dense FLOPs", ("fraction", "target")),
            ("price of compute", ("price",)),
            ("loss", ("loss",)),
        )
        if any(row.get(field) is not None for row in rows for field in fields)
    ]
    steps = [float(row["step"]) for row in dated] or [0.0]
    first = 0.0 if 0 <= min(steps) <= 0.1 * max(steps) else min(steps)
    x = Axis(first, max(max(steps), first + 1), 60, WIDTH - 10)
    bottom = 16.0 + sum(_panel_height(fields) for _, fields in panels)
    description = f"{len(history)} records, steps {min(steps):.0f} to {max(steps):.0f}."
    svg = _svg("training", bottom + 40, "Compute executed during training, against its schedule", description)
    top = 10.0
    for title, fields in panels:
        _panel(svg, top, title, fields, rows, x)
        top += _panel_height(fields)
    _x_axis(svg, x, bottom - 6, "training step", [tick for tick in x.ticks(6) if tick == round(tick)], "{:,.0f}")
    return _done(svg)


def _panel_height(fields: Sequence[str]) -> float:
    return 180.0 if "fraction" in fields else 92.0


def _panel(
    svg: ET.Element, top: float, title: str, fields: Sequence[str], rows: Sequence[Mapping[str, Any]], x: Axis
) -> None:
    values = [row[field] for row in rows for field in fields if row[field] is not None]
    high = max([*values, 1.0 if "fraction" in fields else 1e-9])
    y = Axis(min(0.0, *values) if values else 0.0, high * 1.02, top + _panel_height(fields) - 14, top + 18)
    ticks = y.ticks(4 if "fraction" in fields else 2)
    _y_axis(svg, y, 60, WIDTH - 10, title, ticks, "{:.0%}" if "fraction" in fields else "{:g}")
    styles = {"fraction": ("k-learned", "trace"), "target": ("k-dense", "trace dashed thin")}
    for field in fields:
        css, line = styles.get(field, ("k-integrated" if field == "price" else "k-random", "trace thin"))
        spots = [None if row[field] is None else (x.at(row["step"]), y.at(row[field])) for row in rows]
        group = _add(svg, "g", class_=css)
        last = next((row[field] for row in reversed(rows) if row[field] is not None), None)
        shown = percent(last) if "fraction" in fields else decimal(last, 3)
        _add(group, "path", tip=f"{field}, last value {shown}", d=_path(spots), class_=line)
    if "fraction" in fields:
        _line_legend(svg, top)


def _line_legend(svg: ET.Element, y: float) -> None:
    for x, css, line, label in ((278, "k-learned", "trace", "executed"), (370, "k-dense", "trace dashed", "schedule")):
        group = _add(svg, "g", class_=css)
        _add(group, "path", d=f"M{x} {y:.1f}h22", class_=line)
        _add(svg, "text", label, x=x + 27, y=y + 4)


def _buckets(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """At most MAX_STEPS records, each the mean of consecutive ones, field by field over what was recorded."""
    size = max(1, math.ceil(len(rows) / MAX_STEPS))
    merged = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        means: dict[str, float | None] = {}
        for field in ("step", "fraction", "target", "price", "loss"):
            values = [value for row in part if (value := finite(row.get(field))) is not None]
            means[field] = sum(values) / len(values) if values else None
        merged.append(means)
    return merged


def _path(spots: Sequence[tuple[float, float] | None]) -> str:
    """SVG path data through the spots; a None breaks the line, and a spot alone is a dot (a line of no length)."""
    parts, pen = [], "M"
    for spot in spots:
        if spot is not None:
            parts.append(f"M{spot[0]:.1f} {spot[1]:.1f}h0" if pen == "M" else f"L{spot[0]:.1f} {spot[1]:.1f}")
        pen = "M" if spot is None else "L"
    return "".join(parts)


def _y_axis(svg: ET.Element, y: Axis, left: float, right: float, title: str, ticks: Sequence[float], form: str) -> None:
    if title:
        _add(svg, "text", title, x=left, y=min(y.start, y.end) - 12)
    for tick in ticks:
        _add(svg, "line", x1=left, x2=right, y1=y.at(tick), y2=y.at(tick), class_="grid")
        _add(svg, "text", form.format(tick), x=left - 8, y=y.at(tick) + 4, text_anchor="end")


def _x_axis(svg: ET.Element, x: Axis, top: float, title: str, ticks: Sequence[float], form: str) -> None:
    _add(svg, "line", x1=x.start, x2=x.end, y1=top, y2=top, class_="grid")
    for tick in ticks:
        _add(svg, "line", x1=x.at(tick), x2=x.at(tick), y1=top, y2=top + 4, class_="grid")
        _add(svg, "text", form.format(tick), x=x.at(tick), y=top + 18, text_anchor="middle")
    _add(svg, "text", title, x=(x.start + x.end) / 2, y=top + 36, text_anchor="middle")


def _svg(name: str, height: float, title: str, description: str) -> ET.Element:
    attributes = {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "class": "chart"}
    svg = ET.Element(
        "svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height:.0f}", **attributes}
    )
    _add(svg, "title", title, id=f"{name}-title")
    _add(svg, "desc", description, id=f"{name}-desc")
    return svg


def _add(parent: ET.Element, tag: str, text: str = "", tip: str = "", **attributes: Any) -> ET.Element:
    """Append an element; `tip` becomes its tooltip, and `class_`, `text_anchor` become `class`, `text-anchor`."""
    named = {key.rstrip("_").replace("_", "-"): _attribute(value) for key, value in attributes.items()}
    element = ET.SubElement(parent, tag, named)
    element.text = UNPRINTABLE.sub("�", text) or None
    if tip:
        ET.SubElement(element, "title").text = UNPRINTABLE.sub("�", tip)
    return element


def _attribute(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _done(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="unicode")
