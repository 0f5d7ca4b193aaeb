"""Where rows come from: a folder, an embedded data set, a Hugging Face data set (saved, in memory, streamed, by id)."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dht import assets
from dht._columns import ColumnChoice
from dht._extras import optional
from dht._rows import COLUMNAR, FORMATS, Row, read_rows
from dht.errors import DataError, listed, shown

SPLITS = ("train", "validation", "test")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where splits come from.

    Attributes:
        rows: split -> its rows, neither read nor checked yet.
        where: split -> how a row is named in a message, "path/train.csv line" or "hub-id (train) row".
        missing: what to say of a split that is not there.
        declared: the class names in the order that the source itself declares.
        choice: which columns are read; settled once rows are.
        notes: what the user should know; grows while rows are read.
    """

    name: str
    rows: dict[str, Iterable[Row]]
    where: dict[str, str]
    missing: str
    choice: ColumnChoice
    declared: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def open_source(source: Any, choice: ColumnChoice, stream_rows: int) -> Source:
    """The rows of a name, a path or a Hugging Face data set object.

    Args:
        source: see `dht.data.load_data`.
        choice: says which columns to read.
        stream_rows: rows that are taken of each streamed split.

    Raises:
        DataError: nothing there, or nothing that can be read.
    """
    if not isinstance(source, str | Path):
        return _objects(source, choice, stream_rows)
    source = str(source)
    if source in assets.DATASETS:
        return _folder(assets.data_path(source), ColumnChoice("text", "label"), name=source)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(path, choice)
        return _folder(path, choice, name=str(path))
    if path.exists():
        raise DataError(f"data {path} is a file; give the folder that holds train, validation and test files")
    if _HUB_ID.fullmatch(source):
        return _hub(source, choice)
    raise DataError(
        f"no data at {shown(source, 300)}: no folder there, and embedded data sets are {listed(assets.DATASETS)}; "
        "check the path"
    )


def _folder(path: Path, choice: ColumnChoice, *, name: str) -> Source:
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
            rows[split] = read_rows(path / files[0], choice)
            where[split] = f"{path / files[0]} {'row' if files[0].endswith(COLUMNAR) else 'line'}"
    if not rows:
        raise DataError(
            f"no data in folder {path}: expected train, validation or test as {', '.join(FORMATS)}; "
            f"files there: {listed(present)}"
        )
    missing = f"add a file with that name as {', '.join(FORMATS)}; files there: {listed(present)}"
    return Source(name, rows, where, missing, choice)


def _saved(path: Path, choice: ColumnChoice) -> Source:
    """A folder that `save_to_disk` of a data set or of a dict of them has written."""
    datasets = optional("datasets", "data", f"{path}: reading a saved Hugging Face data set", error=DataError)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # files, JSON, Arrow: any class
        raise DataError(f"cannot load {path} as a saved data set: {_first_line(error)}; save it again") from None
    return _tables(str(path), loaded if isinstance(loaded, Mapping) else {"train": loaded}, choice)


def _hub(source: str, choice: ColumnChoice) -> Source:
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
        raise DataError(
            f"cannot load {shown(source)} as a Hugging Face dataset: {_first_line(error)}; check the name and the "
            f"network (no folder has that name, and embedded data sets are {listed(assets.DATASETS)})"
        ) from None
    return _tables(source, loaded, choice)


def _objects(source: Any, choice: ColumnChoice, stream_rows: int) -> Source:
    """A data set that is in memory or streamed, or a dict of them by split; one alone is the train split."""
    tables = source if isinstance(source, Mapping) else {"train": source}
    for split, table in tables.items():
        if not hasattr(table, "column_names"):
            place = "" if table is source else f" as {split}"
            raise DataError(
                f"data: got {shown(table)} ({type(table).__name__}){place}; allowed: a name, a folder, a Hugging Face "
                "Dataset or IterableDataset, or a dict of them by split"
            )
    return _tables(type(source).__name__, tables, choice, stream_rows)


def _tables(name: str, tables: Mapping[Any, Any], choice: ColumnChoice, stream_rows: int = 0) -> Source:
    splits = {split: tables[split] for split in SPLITS if split in tables}
    declared = None
    for split, table in splits.items():
        if table.column_names:
            found = choice.of(list(table.column_names), f"{name} ({split})")
            declared = _class_names(table, found.label) or declared
    where = {split: f"{name} ({split}) row" for split in splits}
    missing = f"splits there: {listed(tables)}; pick another split or data set"
    notes: list[str] = []
    streamed = getattr(sys.modules.get("datasets"), "IterableDataset", ())
    rows = {
        split: _streamed(table, f"{name} ({split})", choice, stream_rows, notes)
        if isinstance(table, streamed)
        else _table(table, f"{name} ({split})", choice)
        for split, table in splits.items()
    }
    return Source(name, dict(rows), where, missing, choice, declared, notes)


def _table(table: Any, where: str, choice: ColumnChoice) -> Iterator[Row]:
    found = choice.of(list(table.column_names), where)
    names = _class_names(table, found.label)
    plain = table.with_format(None) if hasattr(table, "with_format") else table
    texts, labels = plain[found.text], plain[found.label]
    pairs = plain[found.pair] if found.pair else [None] * len(texts)
    for row, (text, label, pair) in enumerate(zip(texts, labels, pairs, strict=True), start=1):
        yield Row(row, text, _named(label, names), pair)


def _streamed(table: Any, where: str, choice: ColumnChoice, most: int, notes: list[str]) -> Iterator[Row]:
    taken = 0
    try:
        rows = iter(table)
        for taken, row in enumerate(islice(rows, most), start=1):
            found = choice.of(list(row), f"{where} row {taken}")
            names = _class_names(table, found.label)
            yield Row(taken, row[found.text], _named(row[found.label], names), row[found.pair] if found.pair else None)
        more = next(rows, None) is not None
    except DataError:
        raise
    except Exception as error:  # network, files, the user's own generator: any class
        raise DataError(f"{where}: the stream broke off after row {taken}: {_first_line(error)}; try again") from None
    notes.append(f"{where}: a stream; {f'its first {taken} rows' if more else f'all its {taken} rows'} are taken")


def _class_names(table: Any, column: str) -> list[str] | None:
    """The names that a table declares for its classes, in lists of them too."""
    feature = (table.features or {}).get(column)
    names: list[str] | None = getattr(getattr(feature, "feature", feature), "names", None)
    return names


def _named(label: Any, names: list[str] | None) -> Any:
    """The name of a class index, where the data set declares names; anything else as it is; lists part by part."""
    if names and isinstance(label, list):
        return [_named(part, names) for part in label]
    return names[label] if names and isinstance(label, int) and 0 <= label < len(names) else label


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
