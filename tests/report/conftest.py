"""A made-up but realistic run: 6 layers, 12 head units, 300 short film reviews. Numbers are invented, not measured."""

import random
from collections.abc import Callable
from typing import Any

import pytest

N, H = 6, 12
OPENINGS = [
    "the film is",
    "to call it",
    "this is",
    "it turns out to be",
    "nobody told me that this would be",
    "what we get is",
]
GOOD = ["warm", "funny and moving", "sharply written", "a quiet triumph", "gorgeous to look at", "full of life"]
BAD = ["tedious", "a mess from start to finish", "oddly lifeless", "overlong and smug", "dull", "painfully unfunny"]
TAILS = [
    ".",
    ", and it knows exactly when to stop.",
    " although the second half asks for more patience than most viewers will want to give it.",
    ", even if the jokes come and go.",
    ", which is more than can be said for the book, a story that never decided whom it was about or why to read on.",
]


def make_samples(count: int, layers: int = N, heads: int = H, seed: int = 0) -> list[dict[str, Any]]:
    """Samples whose exits grow surer layer by layer, and that leave when sure enough."""
    source = random.Random(seed)
    samples = []
    for _ in range(count):
        label = source.choice(["negative", "positive"])
        words = source.choice(BAD if label == "negative" else GOOD)
        ran = min(layers, 1 + int(source.expovariate(2.2 / layers)))
        sizes = [source.choice([max(1, heads // 4), max(1, heads // 2), heads]) for _ in range(ran)]
        right = source.random() < 0.9
        other = "positive" if label == "negative" else "negative"
        exits = [
            {
                "prediction": (label if right else other) if step + 1 == ran or source.random() < 0.8 else other,
                "score": 0.5 + 0.49 * (step + 1) / ran * source.uniform(0.8, 1),
            }
            for step in range(ran)
        ]
        samples.append(
            {
                "text": f"{source.choice(OPENINGS)} {words}{source.choice(TAILS)}",
                "label": label,
                **exits[-1],
                "layers": ran,
                "heads": [sorted(source.sample(range(heads), size)) for size in sizes],
                "flops_fraction": sum(sizes) / (layers * heads),
                "exits": exits,
            }
        )
    return samples


def make_report(samples: list[dict[str, Any]], layers: int = N, heads: int = H) -> dict[str, Any]:
    """The report that fits the samples, with every field of the contract."""
    count = max(1, len(samples))
    histogram, usage = [0] * (layers + 1), [[0.0] * heads for _ in range(layers)]
    for sample in samples:
        histogram[sample["layers"]] += 1
        for layer, units in enumerate(sample["heads"]):
            for unit in units:
                usage[layer][unit] += 1 / count
    ran = sum(sample["layers"] for sample in samples)
    return {
        "accuracy": 0.9014,
        "macro_f1": 0.9011,
        "num_examples": len(samples),
        "budget": 0.26,
        "policy": "learned",
        "search": "tree",
        "seed": 0,
        "flops_fraction": 0.263,
        "time_fraction": 0.341,
        "seconds": 1.234,
        "dense_seconds": 3.619,
        "policy_time_fraction": 0.042,
        "mean_layers": ran / count,
        "mean_heads": sum(len(units) for sample in samples for units in sample["heads"]) / max(1, ran),
        "layers_histogram": histogram,
        "head_usage": usage,
        "train_flops_fraction": 0.412,
        "train_time_fraction": 0.467,
        "train_seconds": 131.2,
        "dense_train_seconds": 281.0,
        "dense_accuracy": 0.9151,
        "majority": 0.5092,
    }


@pytest.fixture
def make_run() -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """A report and samples of a run of any size: `make_run(count, layers, heads)`."""

    def make(count: int, layers: int = N, heads: int = H) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        rows = make_samples(count, layers, heads)
        return make_report(rows, layers, heads), rows

    return make


@pytest.fixture
def samples() -> list[dict[str, Any]]:
    return make_samples(300)


@pytest.fixture
def report(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return make_report(samples)


@pytest.fixture
def points() -> list[dict[str, Any]]:
    rows: list[tuple[str, str, float, float, float | None, float | None]] = [
        ("dense", "dense", 1.0, 0.9151, 1.0, 0.004),
        ("dht 16%", "learned", 0.158, 0.8745, 0.24, 0.009),
        ("dht 26%", "learned", 0.263, 0.9014, 0.341, 0.006),
        ("dht 40%", "learned", 0.402, 0.9103, 0.47, 0.005),
        ("dht 60%", "learned", 0.597, 0.9132, 0.66, 0.004),
        ("static 2x12", "static", 0.334, 0.8612, 0.35, None),
        ("static 3x12", "static", 0.5, 0.8888, 0.52, None),
        ("static 6x6", "static", 0.55, 0.8721, 0.61, None),
        ("confidence 0.8", "confidence", 0.31, 0.8892, 0.36, None),
        ("confidence 0.9", "confidence", 0.45, 0.9021, 0.5, None),
        ("confidence 0.97", "confidence", 0.63, 0.9094, 0.68, None),
        ("random", "random", 0.27, 0.8121, None, None),
    ]
    keys = ("name", "kind", "flops_fraction", "accuracy", "time_fraction", "ci")
    return [dict(zip(keys, row, strict=True)) for row in rows]


@pytest.fixture
def history() -> list[dict[str, Any]]:
    source, price, rows = random.Random(1), 0.0, []
    for step in range(0, 1500, 5):
        target = max(0.26, 1 - step / 1000)
        fraction = min(1.0, max(0.05, target + source.gauss(0, 0.04)))
        price = max(0.0, price + 0.05 * (fraction - target) + 0.0004)
        loss = 0.18 + 0.55 * 0.997**step + source.gauss(0, 0.02)
        rows.append({"step": step, "fraction": fraction, "target": target, "price": price, "loss": loss})
    return rows


@pytest.fixture
def meta() -> dict[str, Any]:
    return {
        "title": "MiniLM on film reviews at a quarter of the compute",
        "model": "minilm (6 layers, 12 heads)",
        "data": "film reviews, test split",
        "versions": {"dht": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0"},
        "hardware": "2 CPU cores, bfloat16",
        "command": "dht train --data reviews --model minilm --out run --budget 0.26",
        "created": "2025-01-01 12:00 UTC",
    }
