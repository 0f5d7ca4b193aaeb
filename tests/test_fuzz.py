"""Hostile inputs end in an answer or a documented error; a text's answer depends on nothing but the text."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
from dht import train
from dht.load import load_run
from dht.manifest import MANIFEST
from dht.predict import predict
from killing import small_settings

TARGETS = ("data files", "settings", "configurations", "saved configurations", "lines to predict", "texts to predict")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    tiny = small_settings(tmp_path_factory.mktemp("fuzzed"), epochs=1)
    fitted = train.fit(tiny)
    train.save_run(tiny.out, fitted.model, fitted.tokenizer, fitted.report)
    (tiny.out / MANIFEST).unlink()  # what checksums would catch is to be met
    return tiny.out


@pytest.fixture(scope="module")
def served(run_folder):
    return load_run(run_folder)


@pytest.fixture(scope="module")
def targets(tmp_path_factory, run_folder):
    return hostile.targets(tmp_path_factory.mktemp("data"), run_folder)


@pytest.mark.parametrize("name", TARGETS)
def test_no_crash(targets, name):
    strategy, check = targets[name]
    seen = set()

    @settings(max_examples=60 if "predict" in name or "saved" in name else 150, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def fuzz(example):
        seen.add(check(example))

    fuzz()
    assert seen == ({True} if name == "texts to predict" else {True, False}), "both ends are met"
    assert set(targets) == set(TARGETS)


def test_a_megabyte_and_other_awkward_texts(run_folder):
    stream = hostile.Stream(run_folder)
    texts = [
        "",
        "x",
        "word " * 200_000,
        "\u4e2d" * 350_000,
        "x" * 1_000_000,
        hostile.CONTROL,
        "\ud800\udc00 \udfff",
        "\0",
    ]
    assert stream.check_texts(texts)
    lines = [("a" * 1_000_000).encode(), ("\u0416 \u05d0 \u0e01 " * 1000).encode()]
    assert stream.check(lines)


SENTENCES = [
    "a fine film",
    "awful",
    "not bad at all, really",
    "the plot " * 12,
    "\u4e2d\u6587 \u0416",
    "?",
    "so so " * 5,
]


@settings(max_examples=25)
@given(st.permutations(SENTENCES), st.integers(1, 8), st.integers(0, 3))
def test_an_answer_does_not_depend_on_batch_size_or_order(served, order, batch_size, extra):
    texts = list(order) + random.Random(extra).choices(SENTENCES, k=extra)
    rows = predict(*served, texts, batch_size=batch_size, max_length=32)
    for text, row in zip(texts, rows, strict=True):
        (alone,) = predict(*served, [text], max_length=32)
        assert (row["label"], row["layers"], row["heads"]) == (alone["label"], alone["layers"], alone["heads"])
        assert row["score"] == pytest.approx(alone["score"], abs=2e-6)
