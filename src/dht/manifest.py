"""Checksums of a folder's files: written last, read first, so that a damaged file is refused before it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ._files import write_json
from .errors import CheckpointError

MANIFEST = "manifest.json"
"""Of a finished run: beside `config.json`."""

COMPLETE = "complete.json"
"""Of a checkpoint of a training: lists all its files; a folder without it was left half-written."""

MODEL_FILES = ("config.json", "model*.safetensors", "model*.index.json")
"""What a saved model is made of; patterns."""

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)
"""What a saved tokenizer may be made of; patterns."""


def write_manifest(folder: str | Path, patterns: Iterable[str] = MODEL_FILES, name: str = MANIFEST) -> None:
    """Writes size and SHA-256 of the files in `folder` that match one of `patterns` to `folder / name`.

    The list carries a checksum of its own: a manifest that was damaged does not accuse the files.

    Raises:
        DHTError: a file cannot be read or the manifest cannot be written.
    """
    folder = Path(folder)
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.name != name}
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(paths)}
    write_json(folder / name, {"files": files, "sha256": _of_list(files)})


def verify(folder: str | Path, name: str = MANIFEST) -> bool:
    """True if every file is as it was written, False if there is no manifest (as in a folder from a hub).

    Raises:
        CheckpointError: a file or the manifest itself is damaged or missing; it is named.
    """
    folder = Path(folder)
    path = folder / name
    if not path.is_file():
        return False
    advice = "the file is damaged: restore it from a copy"
    if name == MANIFEST:
        advice += f" (if you changed it yourself, delete {MANIFEST})"
    for file, expected in _read(path).items():
        try:
            size = (folder / file).stat().st_size
            intact = size == expected["bytes"] and _sha256(folder / file) == expected["sha256"]
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot load {file}: {error.strerror}; {advice}") from error
        if not intact:
            got = "its SHA-256 is not" if size == expected["bytes"] else f"{size} bytes are not {expected['bytes']},"
            raise CheckpointError(f"{folder}: cannot load {file}: {got} what {name} says; {advice}")
    return True


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = held["files"]
        intact = held["sha256"] == _of_list(files)
    except (ValueError, OSError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: the list of checksums is damaged; restore it from a copy")
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_list(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
