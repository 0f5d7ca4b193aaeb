"""Pictures of a comparison: accuracy against one cost for all methods, and regret over training."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from dht.report.charts import CHARACTER, MARKERS, Axis, _add, _done, _path, _svg
from dht.report.table import decimal, finite, percent

WIDE = 760  # user units
LEFT, RIGHT, TOP, BOTTOM = 60.0, WIDE - 10.0, 26.0, 360.0
TICKS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)

# One colour a family, one marker a member; the last pair is for what is not listed.
STYLES = {
    "dense": ("k-dense", "square"),
    "dht": ("k-learned", "circle"),
    "dht-served": ("k-learned", "diamond"),
    "static": ("k-static", "up"),
    "static-cut": ("k-static", "down"),
    "cascade": ("k-static", "diamond"),
    "confidence": ("k-confidence", "circle"),
    "confidence-same": ("k-confidence", "square"),
    "confidence-pruned": ("k-confidence", "diamond"),
    "patience": ("k-b", "circle"),
    "patience-pruned": ("k-b", "diamond"),
    "epsilon-greedy": ("k-integrated", "circle"),
    "fixed": ("k-random", "square"),
    "random": ("k-random", "circle"),
    "hash": ("k-random", "diamond"),
    "length": ("k-random", "up"),
    "shuffled": ("k-random", "down"),
    "oracle": ("k-a", "up"),
    "dense-decay": ("k-c", "square"),
    "dense-decay-seconds": ("k-c", "diamond"),
    "smaller-dense": ("k-c", "up"),
    "layer-dropout": ("k-c", "circle"),
    "layer-dropout-seconds": ("k-c", "down"),
    "progressive": ("k-integrated", "down"),
}
OTHER = ("k-random", "square")


def frontier_chart(summary: Sequence[Mapping[str, Any]], field: str, title: str, axis: str) -> str:
    """Accuracy with its 95% interval against a cost, on a logarithmic axis; the budgets of a method are joined.

    Args:
        summary: entries with `method`, `accuracy`, `accuracy_ci` and the cost; those without both numbers are left out.
        field: the cost, a fraction of dense, such as `flops_fraction`.
        axis: what the cost is, in words.
    """
    points = [dict(entry, cost=finite(entry.get(field))) for entry in summary]
    points = [p for p in points if p["cost"] and finite(p.get("accuracy")) is not None]
    words = "; ".join(f"{p['method']}: {percent(p['accuracy'])} at {percent(p['cost'])}" for p in points)
    name = f"frontier-{field.replace('_', '-')}"
    svg = _svg(name, BOTTOM + 60, title, f"{title}. {words}.")
    x, y = _axes(svg, points, axis)
    methods = [method for method in STYLES if any(p["method"] == method for p in points)]
    methods += [m for m in dict.fromkeys(p["method"] for p in points) if m not in STYLES]
    for method in sorted(methods, key=lambda m: (m == "dht", m == "dense")):  # ours on top
        css, marker = STYLES.get(method, OTHER)
        group = _add(svg, "g", class_=css)
        mine = sorted((p for p in points if p["method"] == method), key=lambda p: float(p.get("budget") or 0))
        spots = [(x.at(math.log(p["cost"])), y.at(p["accuracy"])) for p in mine]
        if len(spots) > 1:
            _add(group, "path", d=_path(spots), class_="trace" if method == "dht" else "trace thin")
        for point, spot in zip(mine, spots, strict=True):
            _mark(group, point, spot, marker, y)
    bottom = _legend(svg, methods)
    svg.set("viewBox", f"0 0 {WIDE} {bottom + 12:.0f}")
    return _done(svg)


def _axes(svg: ET.Element, points: Sequence[Mapping[str, Any]], axis: str) -> tuple[Axis, Axis]:
    costs = [p["cost"] for p in points] or [1.0]
    lows = [p["accuracy"] - (finite(p.get("accuracy_ci")) or 0) for p in points] or [0.0]
    highs = [p["accuracy"] + (finite(p.get("accuracy_ci")) or 0) for p in points] or [1.0]
    # Noise of few seeds may be wider than any score can be; the picture need not be.
    low, high = max(0.0, min(lows)), min(1.0, max(highs))
    margin = max(0.005, 0.06 * (high - low))
    y = Axis(low - margin, high + margin, BOTTOM - 20, TOP)
    x = Axis(math.log(0.85 * min(costs)), math.log(1.15 * max([1.0, *costs])), LEFT, RIGHT)
    ticks = [tick for tick in y.ticks(6) if 0 <= tick <= 1]
    digits = 0 if all(abs(100 * tick - round(100 * tick)) < 1e-6 for tick in ticks) else 1
    _add(svg, "text", "accuracy", x=LEFT, y=TOP - 12)
    for tick in ticks:
        _add(svg, "line", x1=LEFT, x2=RIGHT, y1=y.at(tick), y2=y.at(tick), class_="grid")
        _add(svg, "text", f"{100 * tick:.{digits}f}%", x=LEFT - 8, y=y.at(tick) + 4, text_anchor="end")
    floor = BOTTOM - 16
    _add(svg, "line", x1=LEFT, x2=RIGHT, y1=floor, y2=floor, class_="grid")
    for tick in TICKS:
        if x.low <= math.log(tick) <= x.high:
            place = x.at(math.log(tick))
            _add(svg, "line", x1=place, x2=place, y1=floor, y2=floor + 4, class_="grid")
            _add(svg, "text", f"{100 * tick:g}%", x=place, y=floor + 18, text_anchor="middle")
    _add(svg, "text", axis, x=(LEFT + RIGHT) / 2, y=floor + 36, text_anchor="middle")
    return x, y


def _mark(group: ET.Element, point: Mapping[str, Any], spot: tuple[float, float], marker: str, axis: Axis) -> None:
    half = finite(point.get("accuracy_ci"))
    seeds = len(point.get("seeds") or [])
    tip = f"{point['method']} at budget {decimal(point.get('budget'))}: accuracy {percent(point['accuracy'])}"
    if half:
        tip += f" ± {100 * half:.1f} points"
        top = axis.at(min(axis.high, point["accuracy"] + half))
        low = axis.at(max(axis.low, point["accuracy"] - half))
        _add(group, "path", d=f"M{spot[0]:.1f} {top:.1f}V{low:.1f}", class_="error", fill="none")
    tip += f" at {percent(point['cost'])} of dense, {seeds} seed{'s' if seeds != 1 else ''}"
    _add(group, "path", tip=tip, d=MARKERS[marker], transform=f"translate({spot[0]:.1f} {spot[1]:.1f})", class_="mark")


def _legend(svg: ET.Element, methods: Sequence[str]) -> float:
    """Markers with names below the picture, in as many lines as needed; returns the last line's height."""
    x, y = LEFT, BOTTOM + 44
    for method in methods:
        css, marker = STYLES.get(method, OTHER)
        wide = 14 + len(method) * CHARACTER + 18
        if x + wide - 18 > WIDE:
            x, y = LEFT, y + 19
        group = _add(svg, "g", class_=css)
        _add(group, "path", d=MARKERS[marker], transform=f"translate({x + 5:.1f} {y:.1f})", class_="mark")
        _add(svg, "text", method, x=x + 14, y=y + 4)
        x += wide
    return y


def regret_chart(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Cumulative regret per held-out row over training: solid against the best fixed depth, dashed against the oracle.

    Args:
        curves: by name, dicts with `step`, `fixed` and `oracle`, lists of one length.
    """
    steps = [step for curve in curves.values() for step in curve["step"]] or [1]
    values = [value for curve in curves.values() for key in ("fixed", "oracle") for value in curve[key]] or [1.0]
    x = Axis(0, max(1, *steps), LEFT, RIGHT)
    y = Axis(min(0.0, *values), max(0.1, *values) * 1.05, BOTTOM - 20, TOP)
    svg = _svg("regret", BOTTOM + 60, "Regret over training", f"Cumulative regret of {len(curves)} trainings.")
    _add(svg, "text", "cumulative regret, utility per held-out row", x=LEFT, y=TOP - 12)
    for tick in y.ticks(5):
        _add(svg, "line", x1=LEFT, x2=RIGHT, y1=y.at(tick), y2=y.at(tick), class_="grid")
        _add(svg, "text", f"{tick:g}", x=LEFT - 8, y=y.at(tick) + 4, text_anchor="end")
    for tick in (t for t in x.ticks(6) if t == round(t)):
        _add(svg, "text", f"{tick:,.0f}", x=x.at(tick), y=BOTTOM + 2, text_anchor="middle")
    _add(svg, "text", "training step", x=(LEFT + RIGHT) / 2, y=BOTTOM + 20, text_anchor="middle")
    colours = ("k-learned", "k-static", "k-confidence", "k-a", "k-b", "k-integrated", "k-c", "k-random")
    place = LEFT
    for index, (name, curve) in enumerate(curves.items()):
        group = _add(svg, "g", class_=colours[index % len(colours)])
        for key, dashes, rival in (("fixed", "", "best fixed depth"), ("oracle", " dashed", "oracle")):
            spots = [(x.at(a), y.at(b)) for a, b in zip(curve["step"], curve[key], strict=True)]
            last = decimal(curve[key][-1] if curve[key] else None)
            tip = f"{name}, against the {rival}: {last} at the end"
            _add(group, "path", tip=tip, d=_path(spots), class_=f"trace thin{dashes}")
        _add(
            group, "path", d=MARKERS["square"], transform=f"translate({place + 5:.1f} {BOTTOM + 40:.1f})", class_="mark"
        )
        _add(svg, "text", name, x=place + 14, y=BOTTOM + 44)
        place += 14 + len(name) * CHARACTER + 18
    svg.set("viewBox", f"0 0 {WIDE} {BOTTOM + 54:.0f}")
    return _done(svg)
