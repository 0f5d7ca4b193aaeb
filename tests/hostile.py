"""Generated hostile inputs, and what must hold of each: an answer or one of the documented errors, nothing else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dht.config import TrainSettings
from dht.data import load_data, read_texts
from dht.errors import CheckpointError, ConfigError, DataError
from dht.hf.configuration import DHTConfig
from dht.load import load_run
from dht.predict import predict, to_line

SCRIPTS = "aZ9 \u00e9\u0416\u05d0\u0627\u0e01\u4e2d\u3042\U0001f600\u202e\u200d\ufeff"
CONTROL = "".join(map(chr, [*range(32), 127, 0x85, 0x2028, 0x2029]))

ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(categories=("Cs", "Cc", "Lo", "Mn", "So")), max_size=12),
    st.text(st.sampled_from(SCRIPTS + CONTROL + "\ud800\udfff\0{}\"'\\,"), max_size=30),
    st.builds(lambda piece, times: piece * times, st.text(min_size=1, max_size=4), st.sampled_from([1, 100, 5000])),
)
"""Empty ones, single characters, mixed scripts, control characters, lone surrogates, NUL, long runs."""

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LABELS = st.sampled_from([0, 1, "a", "b", "0", "1", -1, True, None, 1.5, "", "\ud800"]) | ANY_JSON
OTHER_TASKS = ("multi", "regression", "embedding", "token", "auto")
LISTS = st.lists(ANY_TEXT | LABELS, max_size=3)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _json_line(row: dict[str, Any], escaped: bool) -> bytes:
    return _encoded(json.dumps(row, ensure_ascii=escaped))


JSON_LINE = st.one_of(
    st.builds(lambda t, y, e: _json_line({"text": t, "label": y}, e), ANY_TEXT, LABELS, st.booleans()),
    st.builds(_json_line, st.dictionaries(st.sampled_from(["text", "label", "x"]), ANY_JSON), st.booleans()),
    st.builds(
        lambda words, tags, e: _json_line({"tokens": words, "tags": tags}, e), LISTS | ANY_JSON, LISTS, st.booleans()
    ),
    st.binary(max_size=20),
    ANY_TEXT.map(_encoded),
)


def _table(rows: list[list[str]], comma: bool) -> bytes:
    target = io.StringIO()
    csv.writer(target, delimiter="," if comma else "\t").writerows([["text", "label"], *rows])
    return _encoded(target.getvalue())


CELLS = st.lists(st.tuples(ANY_TEXT, st.sampled_from(["0", "1", "x", ""]) | ANY_TEXT).map(list), max_size=5)
FILE = st.one_of(
    st.tuples(st.just("train.jsonl"), st.lists(JSON_LINE, max_size=5).map(b"\n".join)),
    st.tuples(st.just("train.csv"), st.builds(_table, CELLS, st.just(True))),
    st.tuples(st.just("train.tsv"), st.builds(_table, CELLS, st.just(False))),
    st.tuples(st.sampled_from(["train.jsonl", "train.csv", "train.tsv", "train.jsonl.gz"]), st.binary(max_size=80)),
)
"""Name and content of a file of labelled texts."""

NUMBERS = st.integers(-3, 12) | st.floats() | st.sampled_from([0, 1, 2**31, 2**63, 10**30, "1", None, True, [1], {}])

SETTINGS = st.dictionaries(
    st.sampled_from([name for name in TrainSettings.__dataclass_fields__ if name not in ("data", "model", "out")]),
    NUMBERS | ANY_JSON,
    max_size=4,
)
"""Fields of `TrainSettings` with values of any kind."""

OWN_FIELDS = [name for name in DHTConfig.__annotations__ if name not in ("model_type", "keys_to_ignore_at_inference")]
CONFIG = st.dictionaries(st.sampled_from(OWN_FIELDS), NUMBERS | ANY_JSON, min_size=1, max_size=4)
"""Fields of `DHTConfig` with values of any kind."""


def check_file(folder: Path, file: tuple[str, bytes]) -> bool:
    """True if the file was read as single labels, False if it was refused; no task reads it with any other error."""
    name, content = file
    for old in folder.iterdir():
        old.unlink()
    (folder / name).write_bytes(content)
    read = {}
    for task in ("single", *OTHER_TASKS):
        try:
            read[task] = load_data(folder, splits=["train"], task=task).train
        except DataError:
            continue
        assert read[task] is not None
        split = read[task]
        for text in [*split.texts, *(word for row in split.words or () for word in row)]:
            text.encode()  # a tokenizer could take it
    return "single" in read


def check_settings(changes: dict[str, Any]) -> bool:
    """True if the settings were taken."""
    try:
        TrainSettings(**{"data": "d", "model": "m", "out": Path("o")} | changes).check()
    except ConfigError:
        return False
    return True


def check_config(changes: dict[str, Any]) -> bool:
    """True if the configuration was taken."""
    try:
        DHTConfig(**changes).check()
    except ConfigError:
        return False
    return True


def check_lines(lines: list[bytes]) -> bool:
    """True if every line holds a text."""
    try:
        for text in read_texts(lines):
            text.encode()
    except DataError:
        return False
    return True


class Stream:
    """Lines to a served model, through what `dht predict` runs.

    Args:
        folder: of a finished run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.tokenizer = load_run(folder)

    def check(self, lines: list[bytes]) -> bool:
        """True if every line was answered, False if one was refused."""
        try:
            texts = list(read_texts(lines))
        except DataError:
            return False
        rows = [json.loads(to_line(row)) for row in self.answers(texts)]
        assert len(rows) == len(texts)
        assert all(0 <= row["score"] <= 1 and row["layers"] >= 0 for row in rows)
        return True

    def check_texts(self, texts: list[str]) -> bool:
        """Any string has an answer, also an empty one."""
        assert len(list(self.answers(texts))) == len(texts)
        return True

    def answers(self, texts: list[str]) -> list[dict[str, Any]]:
        return list(predict(self.model, self.tokenizer, texts, batch_size=16, max_length=32))

    def check_saved_config(self, changes: dict[str, Any]) -> bool:
        """True if the run loads with another `config.json` and no manifest, False if it is refused."""
        path = self.folder / "config.json"
        held = path.read_bytes()
        try:
            path.write_text(json.dumps(json.loads(held) | changes), encoding="utf-8", errors="surrogatepass")
            load_run(self.folder)
        except CheckpointError:
            return False
        finally:
            path.write_bytes(held)
        return True


def targets(folder: Path, run: Path) -> dict[str, tuple[Any, Callable[[Any], bool]]]:
    """What is fuzzed: a strategy and the check of its examples; True = taken, False = refused as documented.

    Args:
        folder: empty, to write data files in. run: a finished run without a manifest.
    """
    stream = Stream(run)
    return {
        "data files": (FILE, lambda file: check_file(folder, file)),
        "settings": (SETTINGS, check_settings),
        "configurations": (CONFIG, check_config),
        "saved configurations": (CONFIG, stream.check_saved_config),
        "lines to predict": (st.lists(JSON_LINE, min_size=1, max_size=3), stream.check),
        "texts to predict": (st.lists(ANY_TEXT, min_size=1, max_size=3), stream.check_texts),
    }
