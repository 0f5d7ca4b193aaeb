"""Columns given and inferred, sentence pairs, Arrow files, Hugging Face data sets, rare classes."""

from __future__ import annotations

import csv
import importlib
import sys
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.feather
import pytest

from dht._columns import ColumnChoice
from dht.data import Split, balanced_weights, load_data, read_texts
from dht.errors import DataError

datasets = pytest.importorskip("datasets")

WORDS = {"sentence": ["a fine film", "a dull film", "great", "poor"], "mark": [1, 0, 1, 0]}
NLI = {
    "premise": ["it rains", "it rains", "she sings", "she sings"],
    "hypothesis": ["it is wet", "it is dry", "she makes music", "she sleeps"],
    "gold_label": ["yes", "no", "yes", "no"],
}


def write_csv(path, columns):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])


# Columns


@pytest.mark.parametrize(
    ("columns", "text", "label", "found"),
    [
        (["id", "text", "label"], None, None, ("text", None, "label")),
        (["idx", "sentence", "label"], None, None, ("sentence", None, "label")),
        (["Label", "Text"], None, None, ("Text", None, "Label")),
        (["text", "Text", "label"], None, None, ("text", None, "label")),
        (["premise", "hypothesis", "label"], None, None, ("premise", "hypothesis", "label")),
        (["question", "sentence", "label"], None, None, ("question", "sentence", "label")),
        (["Text", "text_pair", "class"], None, None, ("Text", "text_pair", "class")),
        (["text", "sentence1", "sentence2", "label"], None, None, ("text", None, "label")),
        (["question1", "question2", "label", "target"], None, None, ("question1", "question2", "label")),
        (["body", "mark"], "body", "mark", ("body", None, "mark")),
        (["a", "b", "mark"], "a, b", "mark", ("a", "b", "mark")),
        (["a,b", "mark"], "a,b", "mark", ("a,b", None, "mark")),
    ],
)
def test_columns_are_given_or_inferred(columns, text, label, found):
    assert ColumnChoice(text, label).of(columns, "x.csv line 1") == found


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ["review", "comment", "label"],
            r"x.csv line 1: the text could be 'review', 'comment'; name the right one with",
        ),
        (["text", "class", "stars"], r"the label could be 'class', 'stars'; name the right one with --label-column$"),
        (
            ["title", "label"],
            r"no column 'text'; columns there: 'title', 'label'; name the right one with --text-column$",
        ),
        (
            ["text", "mark"],
            r"no column 'label'; columns there: 'text', 'mark'; name the right one with --label-column$",
        ),
        (["premise", "hypothesis", "premise", "label"], r"2 columns are called 'premise'; rename one$"),
    ],
)
def test_columns_that_cannot_be_inferred(columns, message):
    with pytest.raises(DataError, match=message):
        ColumnChoice().of(columns, "x.csv line 1")


def test_the_first_file_decides_and_the_choice_is_said(tmp_path):
    write_csv(tmp_path / "train.csv", {"sentence": WORDS["sentence"], "stars": WORDS["mark"]})
    write_csv(tmp_path / "test.csv", {"sentence": ["so so"], "stars": [1]})
    data = load_data(tmp_path, splits=["train", "test"])
    assert data.test == Split(["so so"], [1])
    assert data.notes == [
        "columns: text 'sentence', label 'stars' (inferred; --text-column and --label-column name others)"
    ]
    write_csv(tmp_path / "test.csv", {"review": ["so so"], "stars": [1]})
    with pytest.raises(DataError, match=r"test.csv line 1: no column 'sentence'; columns there: 'review', 'stars'"):
        load_data(tmp_path, splits=["train", "test"])
    assert load_data(tmp_path, splits=["train"], text_column="sentence", label_column="stars").notes == []


# Sentence pairs


def test_pairs_are_read_cut_and_told_apart_by_both_texts(tmp_path):
    many = {name: values * 10 for name, values in NLI.items()}
    many["hypothesis"] = [f"{text} {i}" for i, text in enumerate(many["hypothesis"])]
    write_csv(tmp_path / "train.csv", many)
    write_csv(tmp_path / "test.csv", NLI)
    data = load_data(tmp_path)
    assert data.notes[0].startswith("columns: text 'premise' with 'hypothesis', label 'gold_label' (inferred;")
    assert data.test == Split(NLI["premise"], [1, 0, 1, 0], NLI["hypothesis"])
    assert Counter(data.validation.labels) == {0: 2, 1: 2}
    assert len(data.train) == 36
    both = Split(many["premise"], [0] * 40, many["hypothesis"])
    assert sorted(data.train.keys + data.validation.keys) == sorted(both.keys)
    assert not set(data.train.keys) & set(data.validation.keys)
    assert not any("are also in train" in note for note in data.notes), "a shared premise alone is no shared row"


def test_the_second_text_is_checked_too(tmp_path):
    write_csv(tmp_path / "train.csv", NLI | {"hypothesis": ["x", "", "y", "z"]})
    with pytest.raises(DataError, match=r"train.csv line 3: no text \(got ''\)"):
        load_data(tmp_path, splits=["train"])


def test_pairs_to_predict():
    lines = ['{"premise": "a", "hypothesis": "b"}', "plain", '{"sentence": "c", "id": 3}']
    assert list(read_texts(lines)) == [("a", "b"), "plain", "c"]
    assert list(read_texts(['{"u": "a", "v": "b"}'], text_column="u,v")) == [("a", "b")]
    with pytest.raises(DataError, match=r"input line 1: the object has no 'v'; keys there: 'u'$"):
        list(read_texts(['{"u": "a"}'], text_column="u,v"))


# Arrow


@pytest.mark.parametrize("name", ["train.arrow", "train.ipc", "train.feather"])
def test_arrow_files_and_streams(tmp_path, name):
    table = pyarrow.table(WORDS)
    expected = Split(WORDS["sentence"], WORDS["mark"])
    writers = {"file": pyarrow.ipc.new_file, "stream": pyarrow.ipc.new_stream}
    for make in writers.values():
        with make(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert load_data(tmp_path, splits=["train"], label_column="mark").train == expected
    pyarrow.feather.write_feather(table, str(tmp_path / name))
    assert load_data(tmp_path, splits=["train"], label_column="mark").train == expected


def test_broken_arrow_is_one_line(tmp_path, monkeypatch):
    for content in (b"", b"ARROW1 nonsense", b"nonsense", b"\xff\xff\xff\xff\x10\0\0\0zz"):
        (tmp_path / "train.arrow").write_bytes(content)
        with pytest.raises(DataError, match=r"train.arrow: (broken arrow \(.*\); make or copy the file again|no rows)"):
            load_data(tmp_path, splits=["train"])
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(DataError, match=r"reading .arrow needs pyarrow, .*\[data\]\", or save the file as .jsonl or"):
        load_data(tmp_path, splits=["train"])


# Hugging Face data sets


@pytest.fixture
def labelled():
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "mark": datasets.ClassLabel(names=["no", "yes"])}
    )
    return datasets.Dataset.from_dict(WORDS, features=features)


def test_data_sets_in_memory(labelled):
    both = datasets.DatasetDict(train=labelled, test=labelled.select([0, 1]), extra=labelled)
    data = load_data(both, splits=["train", "test"], label_column="mark")
    assert data.name == "DatasetDict"
    assert data.label_names == ["no", "yes"]
    assert data.test == Split(["a fine film", "a dull film"], [1, 0])
    alone = load_data(labelled.with_format("numpy"), splits=["train"], label_column="mark")
    assert alone.train == data.train
    with pytest.raises(DataError, match=r"no test split in Dataset: splits there: 'train'; pick another"):
        load_data(labelled, splits=["test"], label_column="mark")
    with pytest.raises(DataError, match=r"Dataset \(train\): no column 'label'; columns there: 'sentence', 'mark'"):
        load_data(labelled)
    for wrong, text in (
        (3, r"data: got 3 \(int\); allowed: a name"),
        ({"train": [1]}, r"got \[1\] \(list\) as train;"),
    ):
        with pytest.raises(DataError, match=text):
            load_data(wrong)


def test_saved_data_sets(labelled, tmp_path, monkeypatch):
    datasets.DatasetDict(train=labelled, test=labelled).save_to_disk(tmp_path / "both")
    labelled.save_to_disk(tmp_path / "one")
    both = load_data(tmp_path / "both", splits=["train", "test"], label_column="mark")
    one = load_data(tmp_path / "one", splits=["train"], label_column="mark")
    assert both.train == both.test == one.train == Split(WORDS["sentence"], [1, 0, 1, 0])
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot load .*one as a saved data set: .*; save it again$"):
        load_data(tmp_path / "one")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"reading a saved Hugging Face data set needs datasets, which is not installed"
    ):
        load_data(tmp_path / "one")


def test_streams_are_bounded_and_say_so(labelled):
    def endless():
        for number in range(10**9):
            yield {"text": f"text {number}", "label": number % 2}

    data = load_data(datasets.IterableDataset.from_generator(endless), splits=["train"], stream_rows=50)
    assert data.train.texts == [f"text {number}" for number in range(50)]
    assert data.notes == ["IterableDataset (train): a stream; its first 50 rows are taken"]
    streamed = datasets.IterableDatasetDict(train=labelled.to_iterable_dataset())
    data = load_data(streamed, splits=["train"], label_column="mark")
    assert data.label_names == ["no", "yes"]
    assert data.notes[-1] == "IterableDatasetDict (train): a stream; all its 4 rows are taken"

    def broken():
        yield {"text": "a", "label": 0}
        raise OSError("connection reset")

    with pytest.raises(DataError, match=r"the stream broke off after row 1: connection reset; try again$"):
        load_data(datasets.IterableDataset.from_generator(broken), splits=["train"])


# Rare classes


def test_a_rare_class_is_told_of(tmp_path):
    rows = [(f"text {i}", "common" if i % 21 else "rare") for i in range(210)]
    write_csv(tmp_path / "train.csv", {"text": [r[0] for r in rows], "label": [r[1] for r in rows]})
    assert load_data(tmp_path, splits=["train"]).notes == [
        "classes are unbalanced: 'rare' has 10 train rows, 'common' 200; --class-weights balanced makes every class "
        "count alike, and macro F1 shows the rare ones"
    ]
    rows = [(text, "common" if i % 11 else "rare") for i, (text, _) in enumerate(rows)]
    write_csv(tmp_path / "train.csv", {"text": [r[0] for r in rows], "label": [r[1] for r in rows]})
    assert load_data(tmp_path, splits=["train"]).notes == [], "20 of 190 is more than a tenth"


def test_balanced_weights_are_those_of_scikit_learn():
    compute = importlib.import_module("sklearn.utils.class_weight").compute_class_weight
    labels = [0] * 7 + [1] * 2 + [2]
    assert balanced_weights(labels, 3) == pytest.approx(compute("balanced", classes=np.arange(3), y=labels).tolist())
    assert balanced_weights([0, 0, 2], 3) == [0.75, 0.0, 1.5]
