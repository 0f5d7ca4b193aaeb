"""Rows of data files, each with its line number for error messages: JSON lines, tables, Parquet and Arrow."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dht._columns import ColumnChoice
from dht._extras import optional
from dht.errors import DataError, shown

FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".ipc")
COLUMNAR = (".parquet", ".arrow", ".feather", ".ipc")
"""Formats whose rows have no line in the file."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """One row as the file has it: where it stands, its text, label and second text, none checked yet."""

    line: int
    text: Any
    label: Any
    pair: Any = None


def read_rows(path: Path, choice: ColumnChoice) -> Iterator[Row]:
    """The rows of one file, in order, read by what the file's name ends in.

    Args:
        path: a file whose name ends in one of `FORMATS`.
        choice: says which keys or columns hold text and label.

    Raises:
        DataError: the file cannot be read, decoded or parsed, or lacks a column; file and line are named.
    """
    if path.name.endswith(COLUMNAR):
        yield from _columnar_rows(path, choice)
    elif path.name.endswith((".csv", ".tsv")):
        yield from _table_rows(path, choice)
    else:
        yield from _jsonl_rows(path, choice)


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


def _jsonl_rows(path: Path, choice: ColumnChoice) -> Iterator[Row]:
    for line, raw in enumerate(read_lines(path), start=1):
        if not raw.strip():
            continue
        where = f"{path} line {line}"
        row = parse_object(decode_line(raw, where), where)
        text, pair, label = choice.of(list(row), where)
        yield Row(line, row[text], row[label], row[pair] if pair else None)


def _table_rows(path: Path, choice: ColumnChoice) -> Iterator[Row]:
    """Rows of a .csv (RFC 4180 quoting, checked) or .tsv file (one row a line, no quoting) with a header line."""
    lines = (decode_line(raw, f"{path} line {line}") for line, raw in enumerate(read_lines(path), start=1))
    records = _tsv_records(lines) if path.name.endswith(".tsv") else _csv_records(lines, path)
    header: list[str] | None = None
    for line, fields in records:
        where = f"{path} line {line}"
        if header is None:
            header = [name.strip() for name in fields]
            text, pair, label = choice.of(header, where)
            text_at, label_at, pair_at = header.index(text), header.index(label), header.index(pair) if pair else None
        elif len(fields) != len(header):
            raise DataError(
                f"{where}: {len(fields)} fields, but the header has {len(header)}; put texts that hold the separator "
                "or a line break in double quotes (.csv), or use .jsonl"
            )
        else:
            yield Row(line, fields[text_at], fields[label_at], None if pair_at is None else fields[pair_at])


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


def _columnar_rows(path: Path, choice: ColumnChoice) -> Iterator[Row]:
    kind = "parquet" if path.name.endswith(".parquet") else "arrow"
    reader = optional(
        "pyarrow.parquet" if kind == "parquet" else "pyarrow.ipc", "data", f"{path}: reading {path.suffix}",
        "or save the file as .jsonl or .csv", DataError,
    )  # fmt: skip
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None
    try:
        if kind == "parquet":
            file = reader.ParquetFile(io.BytesIO(data))
            found = choice.of(file.schema_arrow.names, str(path))
            table = file.read(columns=[name for name in found if name])
        else:  # the file format (also called Feather) begins with a magic word, the stream format with a length
            opened = (reader.open_file if data.startswith(b"ARROW1") else reader.open_stream)(io.BytesIO(data))
            found = choice.of(opened.schema.names, str(path))
            table = opened.read_all()
        texts, labels = table.column(found.text).to_pylist(), table.column(found.label).to_pylist()
        pairs = table.column(found.pair).to_pylist() if found.pair else [None] * len(texts)
    except DataError:
        raise
    except Exception as error:  # pyarrow raises ArrowException, OSError, UnicodeDecodeError, ... on broken files
        raise DataError(f"{path}: broken {kind} ({error}); make or copy the file again") from None
    for row, (text, label, pair) in enumerate(zip(texts, labels, pairs, strict=True), start=1):
        yield Row(row, text, label, pair)
