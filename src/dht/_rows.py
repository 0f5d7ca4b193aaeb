"""Rows of text files: `.jsonl[.gz]`, `.csv`, `.tsv` and `.parquet`, each with its line number for error messages."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dht.errors import DataError, listed, shown

FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """One row as the file has it: where it stands, its text and its label, neither checked yet."""

    line: int
    text: Any
    label: Any


def read_rows(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    """The rows of one file, in order, read by what the file's name ends in.

    Args:
        path: a file whose name ends in one of `FORMATS`.
        text_column: the key or column that holds the text.
        label_column: the key or column that holds the label.

    Raises:
        DataError: the file cannot be read, decoded or parsed, or lacks a column; file and line are named.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path, text_column, label_column)
    elif path.name.endswith((".csv", ".tsv")):
        yield from _table_rows(path, text_column, label_column)
    else:
        yield from _jsonl_rows(path, text_column, label_column)


def clean_text(text: object, where: str) -> str:
    r"""The text as a tokenizer can take it: lone surrogates, which no UTF-8 can hold, become U+FFFD.

    Args:
        text: the value found.
        where: file and line, for the message.

    Raises:
        DataError: it is not a string, or nothing but white space.

    >>> clean_text("caf\ud83d", "a.jsonl line 1") == "caf\ufffd"
    True
    """
    if text is None or (isinstance(text, str) and not text.replace("\0", " ").strip()):
        raise DataError(f"{where}: no text (got {shown(text)}); write a text there or remove the row")
    return without_surrogates(text, where)


def without_surrogates(text: object, where: str) -> str:
    """The text with U+FFFD for lone surrogates; it may be empty.

    Raises:
        DataError: it is not a string.
    """
    if not isinstance(text, str):
        raise DataError(
            f"{where}: the text is {shown(text)}, a {type(text).__name__}; allowed: a string; fix or remove the row"
        )
    return _LONE_SURROGATE.sub("\ufffd", text)


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        DataError: the line is not JSON, or JSON but not an object.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON ({error}): {shown(line)}; write one object a line, such as "
            '{"text": "...", "label": 0}'
        ) from None
    if not isinstance(value, dict):
        raise DataError(f'{where}: {shown(line)} is not a JSON object; write such as {{"text": "...", "label": 0}}')
    return value


def decode_line(raw: bytes, where: str) -> str:
    """The line as text.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked if its name ends in `.gz`, without a byte-order mark; ends only at LF.

    Raises:
        DataError: the file cannot be read, or is broken gzip.
    """
    line = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                yield raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} line {line + 1}: broken gzip ({error}); make or copy the file again, or unpack it and drop .gz"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None


def _jsonl_rows(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    for line, raw in enumerate(read_lines(path), start=1):
        if not raw.strip():
            continue
        where = f"{path} line {line}"
        row = parse_object(decode_line(raw, where), where)
        _require_columns(list(row), text_column, label_column, where)
        yield Row(line, row[text_column], row[label_column])


def _table_rows(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    """Rows of a .csv (RFC 4180 quoting, checked) or .tsv file (one row a line, no quoting) with a header line."""
    lines = (decode_line(raw, f"{path} line {line}") for line, raw in enumerate(read_lines(path), start=1))
    records = _tsv_records(lines) if path.name.endswith(".tsv") else _csv_records(lines, path)
    header: list[str] | None = None
    for line, fields in records:
        where = f"{path} line {line}"
        if header is None:
            header = [name.strip() for name in fields]
            _require_columns(header, text_column, label_column, where)
            text_at, label_at = header.index(text_column), header.index(label_column)
        elif len(fields) != len(header):
            raise DataError(
                f"{where}: {len(fields)} fields, but the header has {len(header)}; put texts that hold the separator "
                "or a line break in double quotes (.csv), or use .jsonl"
            )
        else:
            yield Row(line, fields[text_at], fields[label_at])


def _csv_records(lines: Iterator[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, strict=True)
    first = 1
    try:
        while True:
            first = reader.line_num + 1
            fields = next(reader, None)
            if fields is None:
                return
            if fields:
                yield first, fields
    except csv.Error as error:
        raise DataError(
            f"{path} line {first}: broken CSV ({error}); close every double quote and write a quote inside a quoted "
            'text as ""'
        ) from None
    finally:
        csv.field_size_limit(limit)


def _tsv_records(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    for line, text in enumerate(lines, start=1):
        text = text.rstrip("\r\n")
        if text:
            yield line, [_unquoted(field) for field in text.split("\t")]


def _unquoted(field: str) -> str:
    """The field without the quotes that spreadsheet tools put around it; other quotes are the text's own."""
    if len(field) >= 2 and field[0] == field[-1] == '"':
        inner = field[1:-1]
        if '"' not in inner.replace('""', ""):
            return inner.replace('""', '"')
    return field


def _parquet_rows(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            f"{path}: reading .parquet needs pyarrow, which is not installed; "
            'run pip install "dht-transformer[data]", or save the file as .jsonl or .csv'
        ) from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        _require_columns(file.schema_arrow.names, text_column, label_column, str(path))
        table = file.read(columns=[text_column, label_column])
        texts, labels = table.column(text_column).to_pylist(), table.column(label_column).to_pylist()
    except DataError:
        raise
    except Exception as error:  # pyarrow raises ArrowException, OSError, UnicodeDecodeError, ... on broken files
        raise DataError(f"{path}: broken parquet ({error}); make or copy the file again") from None
    for row, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        yield Row(row, text, label)


def _require_columns(columns: list[str], text_column: str, label_column: str, where: str) -> None:
    for column, option in ((text_column, "--text-column"), (label_column, "--label-column")):
        if columns.count(column) > 1:
            raise DataError(f"{where}: {columns.count(column)} columns are called {shown(column)}; rename one")
        if column not in columns:
            raise DataError(
                f"{where}: no column {shown(column)}; columns there: {listed(columns)}; "
                f"name the right one with {option}"
            )
