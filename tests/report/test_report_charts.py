import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from dht.report.charts import Axis, heads_chart, layers_chart, tradeoff_chart, training_chart

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '</script><img src=x onerror="alert(1)">&\x00\ud800'


def marks(svg, tag, css):
    root = ET.fromstring(svg)
    return [element for element in root.iter(SVG + tag) if css in element.get("class", "").split()]


def tip(element):
    return element.find(SVG + "title").text


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter(SVG + "text")]


def test_bar_heights_are_proportional_to_counts():
    counts = [3, 10, 40, 0, 25]
    heights = [float(bar.get("height")) for bar in marks(layers_chart(counts), "rect", "bar")]
    assert len(heights) == 5
    tallest = max(heights)
    assert heights == pytest.approx([tallest * count / 40 for count in counts], abs=0.02)


def test_the_bar_of_no_layers_appears_only_when_it_counts_somebody():
    assert len(marks(layers_chart([0, 5, 6]), "rect", "bar")) == 2
    assert len(marks(layers_chart([1, 5, 6]), "rect", "bar")) == 3


def test_bars_carry_their_counts_and_tooltips():
    svg = layers_chart([0, 1200, 400])
    assert {"1,200", "400"} <= set(texts(svg))
    assert [tip(bar) for bar in marks(svg, "rect", "bar")] == [
        "1 layers: 1,200 samples (75.0%)",
        "2 layers: 400 samples (25.0%)",
    ]


@pytest.mark.parametrize("counts", [[], [0], [0, 0], [0, 7], [0] * 24 + [100_000]])
def test_layers_chart_at_awkward_sizes(counts):
    svg = layers_chart(counts)
    assert all(math.isfinite(float(bar.get("height"))) for bar in marks(svg, "rect", "bar"))


def test_heat_map_has_a_cell_for_every_head_unit():
    usage = [[(layer * 16 + head) / 400 for head in range(16)] for layer in range(24)]
    cells = [cell for cell in marks(heads_chart(usage), "rect", "cell") if cell.find(SVG + "title") is not None]
    assert len(cells) == 24 * 16
    assert [float(cell.get("fill-opacity")) for cell in cells] == pytest.approx(
        [share for layer in usage for share in layer], abs=0.006
    )
    assert tip(cells[-1]) == "Layer 24, head unit 16: ran for 95.8% of samples"


@pytest.mark.parametrize("usage", [[], [[]], [[1.0]], [[None, 0.5], [2.0]], [[0.1] * 64]])
def test_heads_chart_at_awkward_sizes(usage):
    opacities = [float(cell.get("fill-opacity")) for cell in marks(heads_chart(usage), "rect", "cell")]
    assert all(0 <= opacity <= 1 for opacity in opacities)


def test_points_stand_where_their_numbers_say(points):
    dense, *_ = points
    spots = {}
    for mark in marks(tradeoff_chart(points), "path", "mark"):
        if mark.find(SVG + "title") is not None:
            x, y = mark.get("transform")[10:-1].split()
            spots[tip(mark).split(":")[0]] = (float(x), float(y))
    assert set(spots) == {point["name"] for point in points}
    by_compute = sorted(points, key=lambda point: point["flops_fraction"])
    assert [spots[point["name"]][0] for point in by_compute] == sorted(x for x, _ in spots.values())
    assert spots[dense["name"]][1] == min(y for _, y in spots.values())


def test_points_of_one_kind_are_joined_in_order_of_compute(points):
    svg = tradeoff_chart(list(reversed(points)))
    lines = marks(svg, "path", "trace")
    assert len(lines) == 3  # learned, static, confidence
    xs = [float(part.split()[0]) for part in lines[0].get("d").replace("h0", "")[1:].split("L")]
    assert len(xs) == 4
    assert xs == sorted(xs)


def test_error_bars_only_where_an_interval_is_given(points):
    assert len(marks(tradeoff_chart(points), "path", "error")) == 5
    assert any("90.1% ± 0.6 points" in tip(mark) for mark in marks(tradeoff_chart(points), "path", "mark")[:6])


def test_unknown_kinds_and_missing_numbers():
    rows = [{"name": kind, "kind": kind, "flops_fraction": 0.5, "accuracy": 0.5} for kind in "abcdef"]
    rows += [{"name": "none", "kind": "dense", "flops_fraction": None, "accuracy": 0.9}, {"accuracy": 0.9}]
    svg = tradeoff_chart(rows)
    assert len([mark for mark in marks(svg, "path", "mark") if mark.find(SVG + "title") is not None]) == 6
    assert "none" not in svg.replace('fill="none"', "")
    ET.fromstring(tradeoff_chart([]))


def test_labels_do_not_cover_each_other():
    rows = [{"name": f"point number {i}", "kind": "learned", "flops_fraction": 0.5, "accuracy": 0.8} for i in range(9)]
    labels = marks(tradeoff_chart(rows), "text", "halo")
    assert 1 <= len(labels) < 9
    places = [(label.get("x"), label.get("y")) for label in labels]
    assert len(set(places)) == len(places)


def test_training_lines_are_averaged_to_a_bounded_number_of_points():
    history = [{"step": i, "fraction": 0.5, "target": 0.26, "price": 0.1, "loss": None} for i in range(5000)]
    lines = marks(training_chart(history), "path", "trace")
    titled = [line for line in lines if line.find(SVG + "title") is not None]
    assert [tip(line).split(",")[0] for line in titled] == ["fraction", "target", "price"]
    assert all(line.get("d").count("L") < 240 for line in titled)
    assert tip(titled[0]) == "fraction, last value 50.0%"


def test_a_gap_in_the_history_breaks_the_line():
    history = [{"step": i, "fraction": None if i == 2 else 0.5} for i in range(5)]
    line = next(
        mark for mark in marks(training_chart(history), "path", "trace") if mark.find(SVG + "title") is not None
    )
    assert (line.get("d").count("M"), line.get("d").count("L")) == (2, 2)


@pytest.mark.parametrize(
    "history", [[], [{"step": 0}], [{"step": 7, "fraction": 0.5}], [{"fraction": 1}], [{"step": 3, "loss": -1.0}]]
)
def test_training_chart_at_awkward_sizes(history):
    ET.fromstring(training_chart(history))


def test_hostile_text_stays_text():
    svg = tradeoff_chart([{"name": HOSTILE, "kind": HOSTILE, "flops_fraction": 0.5, "accuracy": 0.5}])
    assert "<img" not in svg
    assert not list(ET.fromstring(svg).iter(SVG + "img"))
    assert any(text.startswith("</script><img") for text in texts(svg))


@pytest.mark.parametrize(
    "svg", [layers_chart([0, 1]), heads_chart([[0.5]]), tradeoff_chart([]), training_chart([{"step": 1, "loss": 1}])]
)
def test_pictures_name_and_describe_themselves(svg):
    root = ET.fromstring(svg)
    named = [element.get("id") for element in root if element.tag in (SVG + "title", SVG + "desc")]
    assert root.get("role") == "img"
    assert root.get("aria-labelledby").split() == named
    assert all(element.text for element in root[:2])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.812, 0.915), (0, 94), (0, 1e-9), (-3, 12_345)])
def test_ticks_are_even_and_inside(low, high):
    ticks = Axis(low, high, 0, 100).ticks(5)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))
