from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht import assets
from dht.data import Split, TextData, load_data, read_texts, stratified_order
from dht.errors import DataError, DHTError

GOOD = [("great film", 1), ("awful film", 0), ("fine film", 1), ("poor film", 0)]


def jsonl(rows: Iterable[tuple[object, object]]) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write files of a data folder; `train`, `validation` and `test` default to good ones, None leaves one out."""

    def write(**files: str | bytes | None) -> Path:
        splits = {f"{split}_jsonl" for split in ("train", "validation", "test")}
        given_splits = {name.split("_")[0] for name in files}
        for name in sorted(splits):
            if name.split("_")[0] not in given_splits:
                files[name] = jsonl(GOOD)
        for name, content in files.items():
            if content is not None:
                data = content if isinstance(content, bytes) else content.encode()
                (tmp_path / name.replace("_", ".")).write_bytes(data)
        return tmp_path

    return write


def parquet(columns: dict[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def texts_of(data: TextData) -> list[list[tuple[str, int]]]:
    splits = (data.train, data.validation, data.test)
    return [list(zip(split.texts, split.labels, strict=True)) for split in splits if split is not None]


# What is read


def test_every_format_reads_alike(folder: Callable[..., Path]) -> None:
    rows = [('He said "no", twice', "bad"), ("tab\\t and comma, here", "good"), ("caf\u00e9 \u2028 x", "bad")]
    table = io.StringIO()
    csv.writer(table).writerows([("label", "text"), *((label, text) for text, label in rows)])
    tsv = "label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in rows)
    expected = [(text, int(label == "good")) for text, label in rows]
    for name, content in {
        "train_jsonl": jsonl(rows),
        "train_jsonl_gz": gzip.compress(jsonl(rows).encode()),
        "train_csv": table.getvalue(),
        "train_tsv": tsv,
        "train_parquet": parquet({"text": [r[0] for r in rows], "label": [r[1] for r in rows]}),
    }.items():
        path = folder(**{name: content}, validation=None, test=None)
        data = load_data(path, splits=["train"])
        assert data.label_names == ["bad", "good"], name
        assert texts_of(data) == [expected], name
        (path / name.replace("_", ".")).unlink()


def test_splits_columns_and_name(folder: Callable[..., Path]) -> None:
    header = "sentence,mark,extra\n"
    path = folder(train_csv=header + "a,x,1\nb,y,2\n", validation_csv=header + "c,y,1\n", test_csv=header + "d,x,1\n")
    data = load_data(str(path), text_column="sentence", label_column="mark")
    assert data == TextData(str(path), Split(["a", "b"], [0, 1]), Split(["c"], [1]), Split(["d"], [0]), ["x", "y"], [])
    assert len(data.train or ()) == 2


def test_only_needed_and_optional_splits_are_returned(folder: Callable[..., Path]) -> None:
    path = folder(test=None)
    data = load_data(path, splits=["train"], optional=["test"])
    assert (data.validation, data.test) == (None, None)
    data = load_data(path, splits=["validation"])
    assert data.train is None
    assert data.validation is not None
    assert data.label_names == ["0", "1"]
    with pytest.raises(DataError, match=r"no test split in .*: add a file .* files there: 'train.jsonl', 'valid"):
        load_data(path, splits=["test"])


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        ([1, 0, 1], ["0", "1"], [1, 0, 1]),
        ([10, 9, -1], ["-1", "9", "10"], [2, 1, 0]),
        (["10", "9", " 9 "], ["9", "10"], [1, 0, 0]),
        (["b", "a", "B"], ["B", "a", "b"], [2, 1, 0]),
        (["10", "x", "9"], ["10", "9", "x"], [0, 2, 1]),
        (["nan", "caf\ud800", "x"], ["caf?", "nan", "x"], [1, 0, 2]),
    ],
)
def test_train_decides_the_classes(
    folder: Callable[..., Path], labels: list[object], names: list[str], indices: list[int]
) -> None:
    path = folder(train_jsonl=jsonl(("text", label) for label in labels))
    data = load_data(path, splits=["train"])
    assert data.label_names == names
    assert texts_of(data) == [[("text", index) for index in indices]]


def test_labels_of_csv_and_jsonl_meet(folder: Callable[..., Path]) -> None:
    data = load_data(folder(train_csv="text,label\na,0\nb,+1\nc,01\n", test_jsonl=jsonl([("x", 1)])))
    assert data.label_names == ["0", "1"]
    assert data.train is not None
    assert data.train.labels == [0, 1, 1]
    assert data.test == Split(["x"], [1])


def test_labels_go_onto_a_models_classes(folder: Callable[..., Path]) -> None:
    path = folder(train_jsonl=None, test_jsonl=jsonl([("x", "neg"), ("y", "pos")]))
    data = load_data(path, splits=["test"], label_names=["pos", "neutral", "neg"])
    assert data.test == Split(["x", "y"], [2, 0])
    assert data.label_names == ["pos", "neutral", "neg"]
    assert data.notes == []


def test_integer_labels_are_positions_in_a_models_named_classes(folder: Callable[..., Path]) -> None:
    path = folder()
    data = load_data(path, splits=["test"], label_names=["negative", "positive"])
    assert data.test is not None
    assert data.test.labels == [1, 0, 1, 0]
    assert data.notes == ["integer labels are read as positions in the model's classes: negative, positive"]
    with pytest.raises(DataError, match=r"test.jsonl line 1: label '1' is not a known class; allowed: '2', '0'; fix"):
        load_data(path, splits=["test"], label_names=["2", "0"])


def test_no_train_split_lets_the_first_split_decide(folder: Callable[..., Path]) -> None:
    data = load_data(folder(train=None, validation=None), splits=["test"])
    assert data.label_names == ["0", "1"]
    assert data.notes == ["no train split: the classes are those of test: 0, 1"]


def test_byte_order_mark_crlf_blank_lines_and_awkward_characters(folder: Callable[..., Path]) -> None:
    lines = '\ufeff{"text": "a\\u0000b", "label": 0}\r\n\r\n{"text": "c\\ud83d", "label": 1}\r\n \n'
    table = '\ufefftext,label\r\n\r\n"two\r\nlines",0\r\na\0b,1\r\n'
    data = load_data(folder(train_jsonl=lines, test_csv=table))
    assert data.train == Split(["a\0b", "c\ufffd"], [0, 1])
    assert data.test == Split(["two\r\nlines", "a\0b"], [0, 1])


def test_very_long_text_in_csv_is_read_and_the_limit_restored(folder: Callable[..., Path]) -> None:
    limit = csv.field_size_limit()
    data = load_data(folder(train_csv=f"text,label\n{'x ' * 200_000},0\nb,1\n"), splits=["train"])
    assert data.train is not None
    assert len(data.train.texts[0]) == 400_000
    assert csv.field_size_limit() == limit


def test_tsv_quotes_are_the_texts_own_unless_a_tool_put_them_around(folder: Callable[..., Path]) -> None:
    table = 'text\tlabel\n"it \'s good\t1\n"he said ""no"""\t0\n"a" and "b"\t1\n\n"\t0\n'
    data = load_data(folder(train_tsv=table), splits=["train"])
    assert data.train is not None
    assert data.train.texts == ["\"it 's good", 'he said "no"', '"a" and "b"', '"']


def test_texts_shared_with_train_are_noted(folder: Callable[..., Path]) -> None:
    data = load_data(folder(validation_jsonl=jsonl([("new", 0)]), test_jsonl=jsonl([GOOD[0], ("new", 0)])))
    assert data.notes == ["1 of the 2 test texts are also in train"]


def test_relative_and_home_folders(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder()
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    assert load_data(f"./{path.name}").train == load_data(f"~/{path.name}").train == load_data(path).train


# The validation split that is made


def many(count: int = 100) -> list[tuple[str, int]]:
    return [(f"text {i}", int(i % 4 == 0)) for i in range(count)]


def test_missing_validation_is_made_from_train(folder: Callable[..., Path]) -> None:
    path = folder(train_jsonl=jsonl(many()), validation=None)
    data = load_data(path)
    assert data.train is not None
    assert data.validation is not None
    assert Counter(data.validation.labels) == {0: 8, 1: 2}
    assert Counter(data.train.labels) == {0: 67, 1: 23}
    assert sorted(data.train.texts + data.validation.texts) == sorted(text for text, _ in many())
    assert data.notes == [
        "no validation split: made one of 10 of the 100 train rows (10% of each class, seed 0); 90 are left to train on"
    ]


def test_made_validation_depends_on_the_seed_alone(folder: Callable[..., Path]) -> None:
    path = folder(train_jsonl=jsonl(many()), validation=None)
    first = load_data(path)
    assert load_data(path) == first
    other = load_data(path, seed=1).validation
    assert other is not None
    assert first.validation is not None
    assert set(other.texts) != set(first.validation.texts)
    alone = load_data(path, splits=["validation"], label_names=["1", "0"])
    assert alone.validation is not None
    assert alone.train is None
    assert alone.validation.texts == first.validation.texts
    assert [1 - label for label in alone.validation.labels] == first.validation.labels


def test_a_limit_is_the_same_draw_for_every_seed(folder: Callable[..., Path]) -> None:
    path = folder(train_jsonl=jsonl(many()))
    data, again = load_data(path, limit=(20, 1000, 1000)), load_data(path, limit=(20, 1000, 1000), seed=1)
    assert data.train is not None
    assert again.train == data.train
    assert len(data.train) == len(set(data.train.texts)) == 20
    whole = [text for text, _ in many()]
    assert [text for text in whole if text in data.train.texts] == data.train.texts, "in the file's order"
    assert "train: 20 of 100 rows, drawn by a hash of their texts" in data.notes
    more = load_data(path, limit=(30, 1, 1))
    assert more.train is not None
    assert more.validation is not None
    assert set(data.train.texts) < set(more.train.texts)
    assert len(more.validation) == 1


def test_made_validation_shares_no_text_with_train(folder: Callable[..., Path]) -> None:
    path = folder(train_jsonl=jsonl([(f"text {i % 7}", 0) for i in range(70)] + [("same", 1)] * 9), validation=None)
    data = load_data(path, splits=["train", "validation"])
    assert data.train is not None
    assert data.validation is not None
    assert Counter(data.validation.labels) == {0: 10}  # "same" cannot be cut, so it stays whole in train
    assert not set(data.train.texts) & set(data.validation.texts)


def test_too_few_rows_for_a_validation_split(folder: Callable[..., Path]) -> None:
    path = folder(train_jsonl=jsonl([("a", 0), ("b", 1)]), validation=None)
    with pytest.raises(DataError, match=r"too few different train texts \(2 rows, 2 classes\) to take a validation"):
        load_data(path)
    assert load_data(path, splits=["train"]).validation is None


@given(rows=st.lists(st.tuples(st.text(max_size=3), st.integers(0, 3)), max_size=40), seed=st.integers())
def test_stratified_order_is_a_partition_that_keeps_equal_texts_together(
    rows: list[tuple[str, int]], seed: int
) -> None:
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    order = stratified_order(texts, labels, seed)
    assert sorted(row for rows_of_class in order for row in rows_of_class) == list(range(len(rows)))
    for index, rows_of_class in enumerate(order):
        assert all(labels[row] == index for row in rows_of_class)
        runs = [texts[row] for row in rows_of_class]
        changes = sum(a != b for a, b in pairwise(runs))
        assert changes == max(0, len(set(runs)) - 1)


# Bad input: what the message says


OBJECT_HINT = r'write one object a line, such as \{"text": "...", "label": 0\}'

BAD_FILES: dict[str, tuple[dict[str, str | bytes], str]] = {
    "empty file": ({"train_jsonl": ""}, r"train.jsonl: no rows; the train split needs at least one$"),
    "only blank lines": ({"test_jsonl": "\n\n"}, r"test.jsonl: no rows; the test split needs at least one$"),
    "empty csv": ({"train_csv": ""}, r"train.csv: no rows"),
    "header only": ({"train_csv": "text,label\n"}, r"train.csv: no rows"),
    "no rows in parquet": (
        {"train_parquet": parquet({"text": [], "label": []})},
        r"train.parquet: no rows",
    ),
    "one class": (
        {"train_jsonl": jsonl([("a", 1), ("b", 1)])},
        r"train.jsonl: all 2 rows have the label '1'; training needs two classes or more$",
    ),
    "unseen label": (
        {"test_jsonl": jsonl([("a", 0), ("b", 7)])},
        r"test.jsonl line 2: label '7' is not a known class; allowed: '0', '1'; fix the label or train with that cla",
    ),
    "hidden labels": (
        {"test_jsonl": jsonl([("a", -1)])},
        r"test.jsonl line 1: label '-1' is not a known class \(-1 marks hidden labels: use another split\)",
    ),
    "float label": (
        {"train_jsonl": jsonl([("a", 0), ("b", 0.5)])},
        r"train.jsonl line 2: label 0.5; allowed: an integer or a class name; fix or remove the row$",
    ),
    "float label in csv": ({"train_csv": "text,label\na,1.0\n"}, r"train.csv line 2: label '1.0'; allowed: an integer"),
    "exponent in tsv": ({"train_tsv": "text\tlabel\na\t1e3\n"}, r"train.tsv line 2: label '1e3'; allowed"),
    "huge integer in csv": (
        {"train_csv": f"text,label\na,{'9' * 5000}\n"},
        r"train.csv line 2: label '9+\.\.\.; allowed",
    ),
    "NaN label": ({"train_jsonl": '{"text": "a", "label": NaN}'}, r"line 1: label nan; allowed"),
    "null label": ({"train_jsonl": jsonl([("a", None)])}, r"line 1: no label; allowed: an integer or a class name"),
    "empty label": ({"train_csv": "text,label\na,\n"}, r"train.csv line 2: no label; allowed"),
    "blank label": ({"train_csv": "text,label\na,  \n"}, r"train.csv line 2: label '  '; allowed"),
    "true as label": ({"train_jsonl": jsonl([("a", True)])}, r"line 1: label True; allowed"),
    "nested label": ({"train_jsonl": jsonl([("a", [1])])}, r"line 1: label \[1\]; allowed"),
    "integers, then names": (
        {"train_jsonl": jsonl([("a", 1), ("b", "x")])},
        r"line 2: label 'x' is a string, but earlier labels are not; use integers or names throughout$",
    ),
    "names, then integers": (
        {"train_jsonl": jsonl([("a", "x"), ("b", "x"), ("c", 1)])},
        r"line 3: label 1 is an integer, but earlier labels are not",
    ),
    "float label in parquet": (
        {"train_parquet": parquet({"text": ["a", "b"], "label": [1.0, None]})},
        r"train.parquet row 1: label 1.0; allowed",
    ),
    "null text": (
        {"train_jsonl": jsonl([("a", 1), (None, 1)])},
        r"line 2: no text \(got None\); write a text there or remove the row$",
    ),
    "empty text": ({"train_csv": "label,text\n1,\n"}, r"train.csv line 2: no text \(got ''\)"),
    "white text": ({"train_jsonl": jsonl([(" \t\u2003\0", 1)])}, r"line 1: no text \(got ' \\t\\u2003\\x00'\)"),
    "null text in parquet": (
        {"train_parquet": parquet({"text": ["a", None], "label": [0, 1]})},
        r"train.parquet row 2: no text \(got None\)",
    ),
    "number as text": (
        {"train_jsonl": jsonl([("a", 1), (12, 1)])},
        r"line 2: the text is 12, a int; allowed: a string; fix or remove the row$",
    ),
    "list as text": ({"train_jsonl": jsonl([(["a"], 1)])}, r"line 1: the text is \['a'\], a list; allowed: a string"),
    "broken JSON": (
        {"train_jsonl": jsonl(GOOD) + '\n{"text": "a", "label": \n'},
        r"train.jsonl line 6: not valid JSON \(Expecting value.*\): '\{\"text\": \"a\".*; " + OBJECT_HINT,
    ),
    "JSON list": (
        {"train_jsonl": '["a", 1]\n'},
        r"""line 1: '\["a", 1\]\\n' is not a JSON object; write such as \{"text": "...", "label": 0\}$""",
    ),
    "deep JSON": ({"train_jsonl": "[" * 100_000}, r"line 1: not valid JSON \(.*\): '\[\[\["),
    "huge number in JSON": ({"train_jsonl": '{"text": "a", "label": ' + "9" * 5000 + "}"}, r"line 1: not valid JSON"),
    "missing text key": (
        {"train_jsonl": '{"text": "a", "label": 0}\n{"sentence": "b", "label": 1}'},
        r"line 2: no column 'text'; columns there: 'sentence', 'label'; name the right one with --text-column$",
    ),
    "missing label column": (
        {"train_csv": "text,mark\na,1\n"},
        r"train.csv line 1: no column 'label'; columns there: 'text', 'mark'; name the right one with --label-column$",
    ),
    "missing column in parquet": (
        {"train_parquet": parquet({"body": ["a"], "label": [1]})},
        r"train.parquet: no column 'text'; columns there: 'body', 'label'; name the right one with --text-column$",
    ),
    "doubled column": (
        {"train_csv": "text,label,text\na,1,b\n"},
        r"train.csv line 1: 2 columns are called 'text'; rename one$",
    ),
    "unquoted comma": (
        {"train_csv": "text,label\na,b,1\n"},
        r"train.csv line 2: 3 fields, but the header has 2; put texts that hold the separator or a line break in",
    ),
    "short row in tsv": ({"train_tsv": "text\tlabel\na\n"}, r"train.tsv line 2: 1 fields, but the header has 2"),
    "unclosed quote": (
        {"train_csv": 'text,label\na,1\n"b,1\nc,1\n'},
        r'train.csv line 3: broken CSV \(unexpected end of data\); close every double quote .* as ""$',
    ),
    "row after a text of two lines": ({"train_csv": 'text,label\n"a\nb",1\n,0\n'}, r"train.csv line 4: no text"),
    "broken UTF-8": (
        {"train_jsonl": jsonl(GOOD[:1]).encode() + b'{"text": "caf\xe9", "label": 0}\n'},
        r"train.jsonl line 2: not UTF-8 \(byte 14 of the line\); save the file as UTF-8$",
    ),
    "broken UTF-8 in csv": ({"train_csv": b"text,label\na,0\n\xff,1\n"}, r"train.csv line 3: not UTF-8 \(byte 1 of"),
    "not gzip": (
        {"train_jsonl_gz": b"plain"},
        r"train.jsonl.gz line 1: broken gzip \(Not a gzipped file.*\); make or copy the file again, or unpack it",
    ),
    "truncated gzip": (
        {"train_jsonl_gz": gzip.compress(jsonl(many(500)).encode())[:-9]},
        r"train.jsonl.gz line \d+: broken gzip \(Compressed file ended before",
    ),
    "damaged gzip": (
        {"train_jsonl_gz": gzip.compress(jsonl(many(5)).encode())[:20] + b"\xff" * 40},
        r"train.jsonl.gz line \d+: broken gzip",
    ),
    "broken parquet": ({"train_parquet": b"PAR1 nonsense PAR1"}, r"train.parquet: broken parquet \(.*\); make or copy"),
    "a split twice": (
        {"train_jsonl": jsonl(GOOD), "train_csv": "text,label\n"},
        r"holds the train split 2 times: 'train.jsonl', 'train.csv'; keep one of them$",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_names_file_line_and_fix(folder: Callable[..., Path], case: str) -> None:
    files, message = BAD_FILES[case]
    path = folder(**files)
    with pytest.raises(DataError, match=message) as caught:
        load_data(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + 3 * len(str(path))


def test_missing_and_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no data at '/.*nowhere': no folder there, and embedded data sets are 'vader';"
    ):
        load_data(tmp_path / "nowhere")
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(
        DataError,
        match=r"no data in folder .*: expected train, validation or test as \.jsonl, .*; files there: 'train.json'$",
    ):
        load_data(tmp_path)
    with pytest.raises(DataError, match=r"train.json is a file; give the folder that holds train, validation and test"):
        load_data(tmp_path / "train.json")
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(
        DataError, match=r"cannot read .*train.jsonl: Is a directory; check the path and its permission"
    ):
        load_data(tmp_path, splits=["train"])
    (tmp_path / "train.jsonl").rmdir()
    (tmp_path / "train.parquet").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*train.parquet: Is a directory"):
        load_data(tmp_path, splits=["train"])


def test_folder_that_may_not_be_listed(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder()

    def denied(_self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(DataError, match=r"cannot read folder .*: Permission denied; check its permissions$"):
        load_data(path)


def test_parquet_without_pyarrow_names_the_extra(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(train_parquet=parquet({"text": ["a", "b"], "label": [0, 1]}))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        DataError, match=r'needs pyarrow, .* pip install "dht-transformer\[data\]", or save the file as'
    ):
        load_data(path)


# Hugging Face dataset ids


class FakeTable:
    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None = None) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: types.SimpleNamespace() for name in columns}
        if names is not None:
            self.features["label"].names = names

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[column]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[str, str | None]]]:
    """A stand-in for the package `datasets`: what `load_dataset` gives (or raises), and the calls it got."""

    def install(result: Any) -> list[tuple[str, str | None]]:
        calls: list[tuple[str, str | None]] = []

        def load_dataset(name: str, config: str | None) -> Any:
            calls.append((name, config))
            if isinstance(result, Exception):
                raise result
            return result

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    return install


def test_hub_data_set_with_declared_names(hub: Callable[[Any], list[tuple[str, str | None]]]) -> None:
    splits = {split: FakeTable({"text": ["a", "b"], "label": [0, 1]}, ["pos", "neg"]) for split in ("train", "test")}
    splits["validation"] = FakeTable({"text": ["c"], "label": [1]}, ["pos", "neg"])
    calls = hub(splits)
    data = load_data("owner/name:config")
    assert calls == [("owner/name", "config")]
    assert data.label_names == ["pos", "neg"]
    assert data.validation == Split(["c"], [1])
    onto_model = load_data("owner/name", splits=["test"], label_names=["neg", "pos"])
    assert onto_model.test == Split(["a", "b"], [1, 0])


def test_hub_data_set_with_plain_labels_and_hidden_ones(hub: Callable[[Any], list[tuple[str, str | None]]]) -> None:
    plain = {"train": FakeTable({"text": ["a", "b"], "label": ["x", "y"]})}
    hub(plain)
    assert load_data("name", splits=["train"]).label_names == ["x", "y"]
    plain["test"] = FakeTable({"text": ["a"], "label": [-1]}, ["x", "y"])
    with pytest.raises(DataError, match=r"name \(test\) row 1: label '-1' is not a known class \(-1 marks hidden"):
        load_data("name", splits=["train", "test"])


def test_hub_errors(hub: Callable[[Any], list[tuple[str, str | None]]], monkeypatch: pytest.MonkeyPatch) -> None:
    hub({"train": FakeTable({"sentence": ["a"], "label": [0]})})
    with pytest.raises(
        DataError,
        match=r"name \(train\): no column 'text'; columns there: 'sentence', 'label'; name the right one with --text",
    ):
        load_data("name", text_column="text")
    hub({"train": FakeTable({"text": ["a", "b"], "label": [0, 1]}), "extra": FakeTable({})})
    with pytest.raises(DataError, match=r"no test split in name: splits there: 'train', 'extra'; pick another split"):
        load_data("name", splits=["test"])
    hub(RuntimeError("no network\nat all"))
    with pytest.raises(
        DataError,
        match=r"cannot load 'name' as a Hugging Face dataset: no network; check the name and the network \(no folder",
    ):
        load_data("name")
    hub(RuntimeError())
    with pytest.raises(DataError, match=r"as a Hugging Face dataset: RuntimeError;"):
        load_data("name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"no data at 'name': no folder .*needs the package datasets; .*\"dht-transformer\[data\]\"$"
    ):
        load_data("name")


# Embedded data


def test_vader_loads_by_name(vader_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "data_path", lambda _name: vader_path)
    data = load_data("vader", text_column="ignored", label_column="ignored")
    assert data.name == "vader"
    assert data.label_names == ["negative", "positive"]
    assert [len(split or ()) for split in (data.train, data.validation, data.test)] == [9463, 1261, 1893]
    assert data.notes == []


# Texts to predict


def test_read_texts_mixes_plain_text_and_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = '\ufeffplain \u2028 text\r\n{"text": "in \\ud83d object", "more": 1}\n  {"text": "x"}\n"quoted"\n[list'
    expected = ["plain \u2028 text", "in \ufffd object", "x", '"quoted"', "[list"]
    (tmp_path / "in.txt").write_bytes(lines.encode())
    with gzip.open(tmp_path / "in.txt.gz", "wb") as file:
        file.write(lines.encode())
    assert list(read_texts(tmp_path / "in.txt")) == expected
    assert list(read_texts(str(tmp_path / "in.txt.gz"))) == expected
    assert list(read_texts(lines.split("\n"))) == expected
    assert list(read_texts(line.encode() for line in lines.split("\n"))) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="ascii"))
    assert list(read_texts("-")) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("only\n"))
    assert list(read_texts("-")) == ["only"]
    assert list(read_texts(['{"body": "b"}'], text_column="body")) == ["b"]
    assert list(read_texts([])) == []


def test_read_texts_is_lazy() -> None:
    def lines() -> Iterable[str]:
        yield "one\n"
        raise AssertionError("read too far")

    assert next(iter(read_texts(lines()))) == "one"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a", ""], r"input line 2: no text \(got ''\); write a text there or remove the row$"),
        (["{broken"], r"input line 1 starts with '\{': not valid JSON \(.*\): '\{broken'; write one object a line"),
        (['{"body": "x"}'], r"input line 1: the object has no 'text'; keys there: 'body'$"),
        (['{"text": 3}'], r"input line 1: the text is 3, a int; allowed: a string"),
        (['{"text": null}'], r"input line 1: no text \(got None\)"),
        ([b"caf\xe9"], r"input line 1: not UTF-8 \(byte 4 of the line\); save the file as UTF-8$"),
    ],
)
def test_read_texts_names_bad_lines(lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_texts(lines))


def test_read_texts_from_wrong_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"missing does not exist; give a file with a text or a JSON object a line, or -"
    ):
        list(read_texts(tmp_path / "missing"))
    with pytest.raises(DataError, match=r" is a folder; give a file"):
        list(read_texts(str(tmp_path)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(DataError, match=r"^standard input line 1: no text"):
        list(read_texts("-"))
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"one\n" * 10)[:-4])
    with pytest.raises(DataError, match=r"broken.gz line \d+: broken gzip"):
        list(read_texts(tmp_path / "broken.gz"))


# Whatever is in a file: data, or one line of error


ANY_TEXT = st.text(alphabet=st.characters(codec=None), max_size=8)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(ANY_TEXT, inner, max_size=2),
    max_leaves=4,
)
JSON_ROWS = st.fixed_dictionaries({"text": ANY_TEXT | JSON_VALUES, "label": st.integers(0, 2) | JSON_VALUES}).map(
    lambda row: json.dumps(row).encode()
)
TABLE_PIECES = st.sampled_from([b"text", b"label", b",", b"\t", b'"', b"\n", b"\r", b"0", b"1", b"a", b"\0", b"\xff"])


def load_or_refuse(root: Path, name: str, content: bytes) -> None:
    for old in root.iterdir():
        old.unlink()
    (root / name).write_bytes(content)
    try:
        data = load_data(root, splits=["train"])
    except DHTError as error:
        assert len(str(error).splitlines()) == 1
        assert name in str(error)
    else:
        assert data.train is not None
        assert all(text.strip("\0 ") and text.encode() for text in data.train.texts)
        assert set(data.train.labels) == set(range(len(data.label_names)))


@given(lines=st.lists(JSON_ROWS | st.binary(max_size=12), max_size=6))
def test_fuzzed_json_lines(tmp_path: Path, lines: list[bytes]) -> None:
    load_or_refuse(tmp_path, "train.jsonl", b"\n".join(lines))


@given(
    name=st.sampled_from(["train.csv", "train.tsv"]),
    header=st.sampled_from([b"text,label\n", b"text\tlabel\n", b"label\ttext\r\n", b""]),
    pieces=st.lists(TABLE_PIECES, max_size=30),
)
def test_fuzzed_tables(tmp_path: Path, name: str, header: bytes, pieces: list[bytes]) -> None:
    load_or_refuse(tmp_path, name, header + b"".join(pieces))


@given(content=st.binary(max_size=60), flip=st.integers(0, 200), cut=st.integers(0, 200))
def test_fuzzed_gzip_and_parquet(tmp_path: Path, content: bytes, flip: int, cut: int) -> None:
    load_or_refuse(tmp_path, "train.jsonl.gz", content)
    for name, whole in (
        ("train.jsonl.gz", gzip.compress(jsonl(GOOD).encode(), mtime=0)),
        ("train.parquet", parquet({"text": ["a", "b"], "label": [0, 1]})),
    ):
        damaged = bytearray(whole[: len(whole) - cut % len(whole)])
        damaged[flip % len(damaged)] ^= 0xFF
        load_or_refuse(tmp_path, name, bytes(damaged))


@given(rows=st.lists(st.tuples(st.text(min_size=1, max_size=20), st.integers(0, 3)), min_size=2, max_size=10))
def test_written_rows_come_back(tmp_path: Path, rows: list[tuple[str, int]]) -> None:
    rows = [(f"x{text.encode('utf-8', 'replace').decode()}", label) for text, label in rows]
    rows += [("first", 0), ("second", 1)]
    for old in tmp_path.iterdir():
        old.unlink()
    with (tmp_path / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    (tmp_path / "test.jsonl").write_text(jsonl(rows), encoding="utf-8")
    data = load_data(tmp_path, splits=["train", "test"])
    assert data.train is not None
    assert data.train == data.test
    assert data.train.texts == [text for text, _ in rows]
    assert [int(data.label_names[label]) for label in data.train.labels] == [label for _, label in rows]


@given(lines=st.lists(ANY_TEXT | JSON_ROWS | st.binary(max_size=10), max_size=5))
def test_fuzzed_lines_to_predict(lines: list[Any]) -> None:
    try:
        for text in read_texts(lines):
            assert text.encode()
    except DHTError as error:
        assert len(str(error).splitlines()) == 1
