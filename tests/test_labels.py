"""What the label column may hold: lists of classes, rows of 0 and 1, numbers; what each is taken for, and errors."""

from __future__ import annotations

import json
import warnings

import pytest

from dht.data import Split, cut_validation, load_data
from dht.errors import DataError


def load(folder, lines, **options):
    (folder / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return load_data(folder, splits=("train",), **options)


def rows(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def test_what_labels_are_taken_for(tmp_path):
    made = load(tmp_path, rows(["b", "a"], [], ["a"]), task="auto")
    assert (made.task, made.label_names) == ("multi_label_classification", ["a", "b"])
    assert made.train.labels == [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    made = load(tmp_path, rows([2, 11], [3]), task="auto")
    assert made.label_names == ["2", "3", "11"]
    made = load(tmp_path, rows([1.0, 0.0, 0.0], [0, 1, 0]), task="auto")
    assert made.label_names == ["0", "1", "2"]
    assert made.train.labels == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    made = load(tmp_path, rows([1, 0, 0], [0, 1, 1]), task="auto", label_names=["x", "y", "z"])
    assert made.train.labels == [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    made = load(tmp_path, rows([0, 1], [0, 1]), task="multi", label_names=["x", "y"])
    assert made.train.labels == [[0.0, 1.0], [0.0, 1.0]], "a number for every class, not both classes"
    made = load(tmp_path, rows("a, b", "b"), task="multi")
    assert made.train.labels == [[1.0, 1.0], [0.0, 1.0]]
    made = load(tmp_path, rows(1, 2.5, "3"), task="auto")
    assert (made.task, made.train.labels) == ("regression", [1.0, 2.5, 3.0])
    made = load(tmp_path, rows(1, 5, 3), task="regression")
    assert made.train.labels == [1.0, 5.0, 3.0]
    assert load(tmp_path, rows(1, 5, 3), task="auto").task == "single_label_classification"
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.csv").write_text('text,label\na,"[""x"", ""y""]"\nb,[]\n', encoding="utf-8")
    assert load_data(tmp_path, splits=("train",), task="auto").train.labels == [[1.0, 1.0], [0.0, 0.0]]


def test_a_validation_split_is_cut_for_every_task(tmp_path):
    for task, labels in (("multi", [["a"], ["b"], []] * 20), ("regression", [0.5 * i for i in range(60)])):
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows(*labels))), encoding="utf-8")
        made = load_data(tmp_path, splits=("train", "validation"), task=task)
        assert (len(made.train), len(made.validation)) == (54, 6)


def test_lists_of_declared_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.Sequence(datasets.ClassLabel(names=["joy", "fear"]))}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "labels": [[1], [0, 1], []]}, features=kinds)
    made = load_data({"train": table}, splits=("train",), task="auto")
    assert made.label_names == ["joy", "fear"]
    assert made.train.labels == [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("auto", [["a"], "", ["b"]], r"train.jsonl line 2: no label; allowed for several labels: a list, such as \[\]"),
        ("auto", [["a"], 3], r"train.jsonl line 2: label 3; allowed for several labels: a list"),
        ("multi", [["a", "a"], ["b"]], r"train.jsonl line 1: label \['a', 'a'\] names a class twice; name each once"),
        ("multi", [["a", 0.5]], r"train.jsonl line 1: label 0.5; allowed: an integer or a class name"),
        ("multi", [[], []], r"train.jsonl: no row has a label; training needs one class or more"),
        ("regression", [1.5, "much"], r"train.jsonl line 2: label 'much'; allowed for a regression: a finite number"),
        ("regression", [1.5, None], r"train.jsonl line 2: no label; allowed for a regression: a finite number"),
        ("regression", [1.5, float("inf")], r"train.jsonl line 2: label inf; allowed for a regression: a finite"),
        ("regression", [1.5, 10**400], r"train.jsonl line 2: label 1.*; allowed for a regression: a finite"),
        ("regression", [2.5, 2.5], r"train.jsonl: all 2 rows have the label 2.5; training needs numbers that differ"),
        ("auto", [0.5, "good"], r"train.jsonl line 1: label 0.5; allowed: an integer or a class name"),
    ],
)
def test_labels_that_cannot_be(tmp_path, task, labels, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, rows(*labels), task=task)


def test_lists_of_another_length_and_tasks_that_are_none(tmp_path):
    with pytest.raises(DataError, match="labels are lists of 3 zeros and ones, but there are 2 classes"):
        load(tmp_path, rows([0, 1, 1], [1, 0, 0]), task="multi", label_names=["x", "y"])
    with pytest.raises(DataError, match="task: got 'tags', allowed: auto, single, multi, regression, embedding"):
        load(tmp_path, rows(1, 2), task="tags")
    with pytest.raises(DataError, match=r"too few different train texts \(1 rows\) to take a validation split"):
        cut_validation(Split(["a"], [1.5]), 0, "X")


def test_unknown_classes_in_a_list(tmp_path):
    with pytest.raises(DataError, match="line 2: label 'c' is not a known class; allowed: 'a', 'b'"):
        load(tmp_path, rows(["a"], ["b", "c"]), task="multi", label_names=["a", "b"])
