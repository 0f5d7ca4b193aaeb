"""One HTML file that shows a finished run: four headline figures, pictures, and the samples with what each one ran.

The file is self-contained: styles, script, pictures and data are inline, and its content security policy forbids every
load. Samples are untrusted text: they travel as JSON in a data block in which `<`, `>` and `&` are escaped, and the
script writes them with `textContent` only.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import accumulate
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dht.report.charts import CHART_CSS, heads_chart, layers_chart, tradeoff_chart, training_chart
from dht.report.table import MISSING, decimal, duration, finite, percent, ratio

MAX_TEXT = 2_000  # characters of a sample that the page keeps; a longer one ends in a visible note
NOT_MEASURED = "not measured"
META = ("title", "model", "data", "versions", "hardware", "command", "created")


def render_page(
    report: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> str:
    """A complete HTML document about one run.

    Args:
        report: what `evaluate` writes. Any field may be missing or None: the page says so in its place.
        samples: dicts with `text`, `label`, `prediction`, `score`, `layers`, `heads` (unit indices from 0, a list per
            layer run), `flops_fraction` and `exits` (`prediction` and `score` of each visited exit).
        points: dicts with `name`, `kind`, `flops_fraction`, `accuracy`, and optionally `time_fraction`,
            `train_flops_fraction` and `ci`. When empty, the picture shows this run, and dense if its accuracy is known.
        history: dicts with `step`, `fraction`, `target`, `price`, `loss` over training.
        meta: `title`, `model`, `data`, `versions`, `hardware`, `command`, `created`; all optional.

    Returns:
        The document as text, safe to encode as UTF-8.
    """
    environment = page_environment()
    template = environment.from_string(page_part("page.html.j2"))
    given = meta or {}
    details = {key: _plain(given[key]) if given.get(key) else "" for key in META}
    pictures, absent = _pictures(report, list(points) or _own_points(report), history or [])
    page = template.render(
        meta=details,
        summary=_summary(report, samples),
        headlines=_headlines(report, points),
        pictures=pictures,
        absent=absent,
        points=[_point_row(point) for point in points],
        figures=_figures(report),
        sample_count=len(samples),
        data=_embedded(_payload(report, samples)),
        base_css=Markup(page_part("base.css")),
        chart_css=Markup(CHART_CSS),
    )
    return str(page).encode("utf-8", "replace").decode("utf-8")


def page_environment() -> Environment:
    """What every page is rendered with: escaping on, unknown names an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["csp_hash"] = _csp_hash
    return environment


def page_part(name: str) -> str:
    """A template or style sheet of this package."""
    return resources.files("dht.report").joinpath(name).read_text("utf-8")


def _headlines(report: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The four figures at the top: a label, the value, and a note that gives what it is compared with."""
    get = report.get
    accuracy, dense = finite(get("accuracy")), _dense_accuracy(report, points)
    note = "dense accuracy not measured"
    if dense is not None:
        note = f"dense {percent(dense)}"
        if accuracy is not None:
            gap = round(100 * (accuracy - dense), 1)
            note += f", {abs(gap):.1f} points {'higher' if gap > 0 else 'lower'}" if gap else ", the same"
    budget = finite(get("budget"))
    time = ratio(get("time_fraction"), get("seconds"), get("dense_seconds"))
    train_time = ratio(get("train_time_fraction"), get("train_seconds"), get("dense_train_seconds"))
    return [
        {"label": "Accuracy", "value": _measured(percent(accuracy)), "note": note},
        {
            "label": "Inference compute",
            "value": _measured(percent(get("flops_fraction"))),
            "note": "of the dense model’s FLOPs" + (f", budget {percent(budget)}" if budget is not None else ""),
        },
        {
            "label": "Inference time",
            "value": _measured(percent(time)),
            "note": _seconds_note(get("seconds"), get("dense_seconds")),
        },
        {
            "label": "Training compute",
            "value": _measured(percent(get("train_flops_fraction"))),
            "note": f"of dense FLOPs; time {_measured(percent(train_time))}"
            + _seconds_tail(get("train_seconds"), get("dense_train_seconds")),
        },
    ]


def _measured(text: str) -> str:
    return NOT_MEASURED if text == MISSING else text


def _seconds(value: Any) -> str:
    return duration(value).replace(" ", "\u00a0")


def _seconds_note(taken: Any, dense: Any) -> str:
    if finite(taken) is None and finite(dense) is None:
        return "of the dense model’s seconds"
    return f"of the dense model’s: {_seconds(taken)} against {_seconds(dense)}"


def _seconds_tail(taken: Any, dense: Any) -> str:
    if finite(taken) is None and finite(dense) is None:
        return ""
    return f", {_seconds(taken)} against {_seconds(dense)}"


def _dense_accuracy(report: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> float | None:
    given = finite(report.get("dense_accuracy"))
    measured = (finite(point.get("accuracy")) for point in points if point.get("kind") == "dense")
    return given if given is not None else next((value for value in measured if value is not None), None)


def _own_points(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    kind = str(report.get("policy") or "learned")
    own = {"name": "this run", "kind": kind, **{key: report.get(key) for key in ("flops_fraction", "accuracy")}}
    dense = {"name": "dense", "kind": "dense", "flops_fraction": 1.0, "accuracy": report.get("dense_accuracy")}
    return [point for point in (own, dense) if finite(point["accuracy"]) is not None]


def _pictures(
    report: Mapping[str, Any], points: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The pictures that this run has data for, and the names of those that it has none for."""
    histogram, usage = report.get("layers_histogram") or [], report.get("head_usage") or []
    candidates: list[tuple[str, str, Callable[[Any], str], Any]] = [
        (
            "Accuracy against compute",
            "Up and to the left is better: more right answers for less work. Points of one kind are joined.",
            tradeoff_chart,
            [
                p
                for p in points
                if finite(p.get("accuracy")) is not None and finite(p.get("flops_fraction")) is not None
            ],
        ),
        (
            "Compute during training",
            "The price rises while training spends more than the schedule allows, and falls while it spends less.",
            training_chart,
            history,
        ),
        ("Where samples left", _layers_caption(histogram), layers_chart, histogram),
        (
            "Head units run in each layer",
            "Numbers are percent of all samples; lower rows fade because samples that have left run nothing there.",
            heads_chart,
            usage if any(usage) else [],
        ),
    ]
    shown = [
        {"title": title, "caption": caption, "svg": Markup(draw(data))}
        for title, caption, draw, data in candidates
        if data
    ]
    return shown, [title.lower() for title, _, _, data in candidates if not data]


def _layers_caption(histogram: Sequence[Any]) -> str:
    counts = [finite(count) or 0.0 for count in histogram]
    total, full = sum(counts), len(counts) - 1
    if not total:
        return "No samples were counted."
    median = next(layers for layers, reached in enumerate(accumulate(counts)) if 2 * reached >= total)
    if median >= full:
        return f"At least half of the samples ran all {full} layers." if full > 1 else "There is one layer."
    if not median:
        return "At least half of the samples left before layer 1: their words were enough."
    return f"At least half of the samples had left after layer {median} of {full}."


def _summary(report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on what an average sample ran."""
    layers, heads = _shape(report, samples)
    count = finite(report.get("num_examples"))
    subject = "The average sample" if count is None else f"Over {count:,.0f} samples, the average one"
    if finite(report.get("mean_layers")) is None:
        return f"The number of layers that the average sample ran was {NOT_MEASURED}."
    sentence = (
        f"{subject} ran {decimal(report['mean_layers'])} of {layers or MISSING} layer{'s' if layers != 1 else ''}"
    )
    if finite(report.get("mean_heads")) is not None and heads:
        sentence += f" and {decimal(report['mean_heads'], 1)} of {heads} head units per layer"
    return sentence + "."


def _shape(report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """N and H: the most that the report or any sample shows."""
    usage, histogram = report.get("head_usage") or [], report.get("layers_histogram") or []
    layers = max([len(usage), len(histogram) - 1, *(_layers_run(sample) for sample in samples)], default=0)
    heads = [len(layer) for layer in usage]
    heads += [index + 1 for sample in samples for units in sample.get("heads") or [] for index in units]
    return layers, max(heads, default=0)


def _layers_run(sample: Mapping[str, Any]) -> int:
    given = finite(sample.get("layers"))
    return len(sample.get("heads") or []) if given is None else int(given)


def _payload(report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page's script reads. Short keys and one hexadecimal bit mask per layer keep a large run small."""
    layers, heads = _shape(report, samples)
    return {"layers": layers, "heads": heads, "samples": [_sample(sample) for sample in samples]}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    layers, exits = _layers_run(sample), sample.get("exits") or []
    text = str(sample.get("text") if sample.get("text") is not None else "")
    masks = [f"{sum(1 << index for index in set(units)):x}" for units in sample.get("heads") or []]
    # Exits match layers one to one when a sample visits an exit after each layer; otherwise only the last is known.
    offset = layers - len(exits)
    places = [i + 1 + offset if offset in (0, -1) or i == len(exits) - 1 else None for i in range(len(exits))]
    return {
        "t": text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + f" … ({len(text) - MAX_TEXT:,} more characters)",
        "y": _label(sample.get("label")),
        "p": _label(sample.get("prediction")),
        "s": _rounded(sample.get("score")),
        "n": layers,
        "h": masks,
        "f": _rounded(sample.get("flops_fraction")),
        "e": [
            [place, _label(one.get("prediction")), _rounded(one.get("score"))]
            for place, one in zip(places, exits, strict=True)
        ],
    }


def _label(value: Any) -> str | None:
    return None if value is None else str(value)


def _rounded(value: Any) -> float | None:
    number = finite(value)
    return None if number is None else round(number, 4)


def _point_row(point: Mapping[str, Any]) -> list[str]:
    half = finite(point.get("ci"))
    accuracy = percent(point.get("accuracy")) + (f" ± {100 * half:.1f}" if half is not None else "")
    fractions = [percent(point.get(key)) for key in ("flops_fraction", "time_fraction", "train_flops_fraction")]
    return [_plain(point.get("name")), _plain(point.get("kind")), accuracy, *fractions]


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every single-valued field of the report, known to us or not, in its own order."""
    rows = []
    for key, value in report.items():
        if value is None or isinstance(value, str | int | float):
            shown = percent(value) if str(key).endswith("_fraction") else _plain(value)
            rows.append((str(key), shown))
    return rows


def _plain(value: Any) -> str:
    """Any JSON value in one line of words."""
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _embedded(data: Mapping[str, Any]) -> Markup:
    """JSON that may stand inside a `<script>` element: no character in it can end or open markup."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode("utf-8")).digest()).decode("ascii")
