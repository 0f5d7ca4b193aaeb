"""Labelled texts from a folder, an embedded data set or a Hugging Face dataset id, checked row by row.

Every error names the file and the line. Class indices are decided by the train split (integers in numeric order, names
in alphabetical order), or by a trained model's class names when they are given.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dht import assets
from dht._rows import FORMATS, Row, clean_text, decode_line, parse_object, read_lines, read_rows
from dht.errors import DataError, listed, shown

__all__ = ["SPLITS", "Split", "TextData", "load_data", "read_texts", "stratified_order"]

SPLITS = ("train", "validation", "test")
VALIDATION_FRACTION = 0.1

_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Split:
    """Texts and, for each, the index of its class in `TextData.label_names`."""

    texts: list[str]
    labels: list[int]

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.labels)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextData:
    """A data set ready for a tokenizer; a split that was not asked for is None.

    `notes` says what the user should know: a validation split that was made, texts that two splits share.
    """

    name: str
    train: Split | None
    validation: Split | None
    test: Split | None
    label_names: list[str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """Where splits come from: raw rows by split, and how a row is named in a message."""

    name: str
    rows: dict[str, Iterable[Row]]
    where: dict[str, str]  # split -> "path/train.csv line" or "hub-id (train) row"
    missing: str  # what to say of a split that is not there
    declared: list[str] | None = None  # the class names in the order that the source itself declares


@dataclass(frozen=True)
class _Checked:
    """A split whose rows were checked but whose labels are still names."""

    texts: list[str]
    names: list[str]
    lines: list[int]
    integers: bool  # every label is an integer


def load_data(
    source: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    seed: int = 0,
    splits: Sequence[str] = SPLITS,
    optional: Sequence[str] = (),
    label_names: list[str] | None = None,
) -> TextData:
    """The splits asked for, checked, with labels as class indices.

    Args:
        source: an embedded name (`vader`), a folder holding `train`, `validation`, `test` as .jsonl[.gz], .csv, .tsv or
            .parquet, or a Hugging Face dataset id (`owner/name`, or `owner/name:config`). An embedded name goes before
            a folder of that name: write `./vader` for the folder.
        text_column: the column that holds the text.
        label_column: the column that holds the label: an integer or a name.
        seed: seeds the validation split, should one have to be made.
        splits: the splits that must be there. When there is no validation split, one is made of 10% of train,
            stratified by class, no text on both sides, and `notes` says so.
        optional: splits that are read when they are there; none is made.
        label_names: the classes of a trained model, in its order. Labels are mapped onto them.

    Returns:
        The data; splits neither needed nor optional are None.

    Raises:
        DataError: anything that is missing or broken; the message names file and line.
    """
    assert set(splits) | set(optional) <= set(SPLITS), "unknown split"
    src = _open_source(str(source), text_column, label_column)
    make_validation = "validation" in splits and "validation" not in src.rows and "train" in src.rows
    for split in splits:
        if split not in src.rows and not (split == "validation" and make_validation):
            raise DataError(f"no {split} split in {src.name}: {src.missing}")
    wanted = [s for s in SPLITS if s in src.rows and (s in splits or s in optional)]
    # Train decides which classes there are, even when only another split was asked for.
    train_decides = "train" in src.rows and (make_validation or not label_names)
    read = [s for s in SPLITS if s in wanted or (s == "train" and train_decides)]

    notes: list[str] = []
    checked = {split: _check_rows(src, split) for split in read}
    names, indices = _classes(src, checked, label_names, notes)
    done = {split: _indexed(src, split, rows, names, indices) for split, rows in checked.items()}
    if make_validation:
        done["train"], done["validation"] = _cut_validation(src, done["train"], names, seed, notes)
        wanted += [split for split in ("validation",) if split not in wanted]
    result = {split: done[split] for split in wanted}
    _note_shared_texts(result, notes)
    return TextData(src.name, result.get("train"), result.get("validation"), result.get("test"), names, notes)


def read_texts(source: str | Path | Iterable[str] | Iterable[bytes], *, text_column: str = "text") -> Iterator[str]:
    r"""The texts to predict, one a line, as they arrive: a plain text, or a JSON object that holds it.

    Args:
        source: a path (`.gz` is unpacked), `-` for standard input, or lines.
        text_column: the key of the text in a JSON object.

    Raises:
        DataError: a line is empty, not UTF-8, starts with `{` and is not a JSON object, or its object holds no text.

    >>> list(read_texts(["good\n", '{"text": "bad"}']))
    ['good', 'bad']
    """
    name, lines = _text_lines(source)
    for number, raw in enumerate(lines, start=1):
        where = f"{name} line {number}"
        line = (decode_line(raw, where) if isinstance(raw, bytes) else str(raw)).rstrip("\r\n")
        if number == 1:
            line = line.removeprefix("\ufeff")
        if not line.lstrip().startswith("{"):
            yield clean_text(line, where)
            continue
        row = parse_object(line, f"{where} starts with '{{'")
        if text_column not in row:
            raise DataError(f"{where}: the object has no {shown(text_column)}; keys there: {listed(row)}")
        yield clean_text(row[text_column], where)


def stratified_order(texts: Sequence[str], labels: Sequence[int], seed: int) -> list[list[int]]:
    """For each class, its row numbers in a seeded shuffled order that depends on the texts alone.

    The order is that of SHA-256 over seed and text: it needs no generator state and is the same on every machine and
    version; equal texts stand side by side.

    Args:
        texts: one text a row.
        labels: the class index of each row.
        seed: another seed, another order.

    Returns:
        One list of row numbers a class, class 0 first.
    """
    keys = [hashlib.sha256(f"{seed}\0{text}".encode()).digest() for text in texts]
    classes: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
    for row in sorted(range(len(texts)), key=lambda row: (keys[row], row)):
        classes[labels[row]].append(row)
    return classes


def _open_source(source: str, text_column: str, label_column: str) -> _Source:
    if source in assets.DATASETS:
        return _folder(assets.data_path(source), "text", "label", name=source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, text_column, label_column, name=str(path))
    if path.exists():
        raise DataError(f"data {path} is a file; give the folder that holds train, validation and test files")
    if _HUB_ID.fullmatch(source):
        return _hub(source, text_column, label_column)
    raise DataError(
        f"no data at {shown(source, 300)}: no folder there, and embedded data sets are {listed(assets.DATASETS)}; "
        "check the path"
    )


def _folder(path: Path, text_column: str, label_column: str, *, name: str) -> _Source:
    try:
        present = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise DataError(f"cannot read folder {path}: {error.strerror}; check its permissions") from None
    rows: dict[str, Iterable[Row]] = {}
    where: dict[str, str] = {}
    for split in SPLITS:
        files = [split + suffix for suffix in FORMATS if split + suffix in present]
        if len(files) > 1:
            raise DataError(f"{path} holds the {split} split {len(files)} times: {listed(files)}; keep one of them")
        if files:
            rows[split] = read_rows(path / files[0], text_column, label_column)
            where[split] = f"{path / files[0]} {'row' if files[0].endswith('.parquet') else 'line'}"
    if not rows:
        raise DataError(
            f"no data in folder {path}: expected train, validation or test as {', '.join(FORMATS)}; "
            f"files there: {listed(present)}"
        )
    missing = f"add a file with that name as {', '.join(FORMATS)}; files there: {listed(present)}"
    return _Source(name, rows, where, missing)


def _hub(source: str, text_column: str, label_column: str) -> _Source:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"no data at {shown(source, 300)}: no folder there, embedded data sets are {listed(assets.DATASETS)}, and "
            "a Hugging Face dataset id needs the package datasets; check the path, or run "
            'pip install "dht-transformer[data]"'
        ) from None
    identifier, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(identifier, config or None)
    except Exception as error:  # hub, network, parsing: any class, from several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load {shown(source)} as a Hugging Face dataset: {reason}; check the name and the network "
            f"(no folder has that name, and embedded data sets are {listed(assets.DATASETS)})"
        ) from None
    rows: dict[str, Iterable[Row]] = {}
    declared = None
    for split in SPLITS:
        if split not in loaded:
            continue
        table = loaded[split]
        for column, option in ((text_column, "--text-column"), (label_column, "--label-column")):
            if column not in table.column_names:
                raise DataError(
                    f"{source} ({split}): no column {shown(column)}; columns there: {listed(table.column_names)}; "
                    f"name the right one with {option}"
                )
        names = getattr(table.features[label_column], "names", None)
        declared = names or declared
        labels = [names[x] if names and x in range(len(names)) else x for x in table[label_column]]
        pairs = zip(table[text_column], labels, strict=True)
        rows[split] = [Row(i, text, label) for i, (text, label) in enumerate(pairs, start=1)]
    where = {split: f"{source} ({split}) row" for split in rows}
    return _Source(source, rows, where, f"splits there: {listed(loaded)}; pick another split or data set", declared)


def _check_rows(src: _Source, split: str) -> _Checked:
    texts: list[str] = []
    names: list[str] = []
    lines: list[int] = []
    typed: dict[bool, int] = {}  # is the label an int (or a str) -> first line
    for line, text, label in src.rows[split]:
        where = f"{src.where[split]} {line}"
        texts.append(clean_text(text, where))
        names.append(_label_name(label, where))
        lines.append(line)
        first = typed.setdefault(isinstance(label, int), line)
        if len(typed) == 2 and first == line:
            raise DataError(
                f"{where}: label {shown(label)} is {'an integer' if isinstance(label, int) else 'a string'}, but "
                "earlier labels are not; use integers or names throughout"
            )
    if not texts:
        raise DataError(f"{src.where[split].rsplit(' ', 1)[0]}: no rows; the {split} split needs at least one")
    return _Checked(texts, names, lines, all(_INTEGER.fullmatch(name) for name in set(names)))


def _label_name(label: object, where: str) -> str:
    """The label as a class name; integers in their shortest form."""
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    if isinstance(label, str):
        name = label.strip()
        if _INTEGER.fullmatch(name):
            return str(int(name))
        if name and not _DECIMAL.fullmatch(name):
            return name.encode("utf-8", "replace").decode()
    got = "no label" if label is None or label == "" else f"label {shown(label)}"
    raise DataError(f"{where}: {got}; allowed: an integer or a class name; fix or remove the row")


def _classes(
    src: _Source, checked: dict[str, _Checked], label_names: list[str] | None, notes: list[str]
) -> tuple[list[str], dict[str, int]]:
    """The class names in order of index, and the index of every label that may occur."""
    if label_names or src.declared:
        names = list(label_names or src.declared or [])
    else:
        decisive = checked.get("train") or next(iter(checked.values()))
        distinct = set(decisive.names)
        names = sorted(distinct, key=int) if decisive.integers else sorted(distinct)
        if "train" not in checked:
            notes.append(f"no train split: the classes are those of {next(iter(checked))}: {', '.join(names)}")
    if "train" in checked and len(set(checked["train"].names)) < 2:
        where = src.where["train"].rsplit(" ", 1)[0]
        raise DataError(
            f"{where}: all {len(checked['train'].names)} rows have the label {shown(checked['train'].names[0])}; "
            "training needs two classes or more"
        )
    indices = {name: index for index, name in enumerate(names)}
    if (
        label_names
        and all(rows.integers for rows in checked.values())
        and not any(_INTEGER.fullmatch(name) for name in names)
    ):
        indices = {str(index): index for index in range(len(names))}
        notes.append(f"integer labels are read as positions in the model's classes: {', '.join(names)}")
    return names, indices


def _indexed(src: _Source, split: str, rows: _Checked, names: list[str], indices: dict[str, int]) -> Split:
    labels = []
    for line, name in zip(rows.lines, rows.names, strict=True):
        if name not in indices:
            hint = " (-1 marks hidden labels: use another split)" if name == "-1" else ""
            raise DataError(
                f"{src.where[split]} {line}: label {shown(name)} is not a known class{hint}; "
                f"allowed: {listed(indices)}; fix the label or train with that class"
            )
        labels.append(indices[name])
    return Split(rows.texts, labels)


def _cut_validation(src: _Source, train: Split, names: list[str], seed: int, notes: list[str]) -> tuple[Split, Split]:
    taken: set[int] = set()
    for rows in stratified_order(train.texts, train.labels, seed):
        size = max(1, round(VALIDATION_FRACTION * len(rows)))
        while size < len(rows) and train.texts[rows[size]] == train.texts[rows[size - 1]]:
            size += 1  # equal texts stay on one side
        if size < len(rows):
            taken.update(rows[:size])
    if not taken:
        raise DataError(
            f"{src.name}: too few different train texts ({len(train)} rows, {len(names)} classes) to take a validation "
            "split from; add a validation file or more train rows"
        )
    sides = [[row for row in range(len(train)) if (row in taken) is side] for side in (False, True)]
    rest, validation = (Split([train.texts[r] for r in rows], [train.labels[r] for r in rows]) for rows in sides)
    notes.append(
        f"no validation split: made one of {len(validation)} of the {len(train)} train rows "
        f"(10% of each class, seed {seed}); {len(rest)} are left to train on"
    )
    return rest, validation


def _note_shared_texts(splits: dict[str, Split], notes: list[str]) -> None:
    if "train" not in splits:
        return
    seen = set(splits["train"].texts)
    for name, split in splits.items():
        shared = sum(text in seen for text in split.texts) if name != "train" else 0
        if shared:
            notes.append(f"{shared} of the {len(split)} {name} texts are also in train")


def _text_lines(source: str | Path | Iterable[str] | Iterable[bytes]) -> tuple[str, Iterable[str] | Iterable[bytes]]:
    if isinstance(source, str) and source == "-":
        return "standard input", getattr(sys.stdin, "buffer", sys.stdin)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            reason = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(
                f"{path} {reason}; give a file with a text or a JSON object a line, or - for standard input"
            )
        return str(path), read_lines(path)
    return "input", source
