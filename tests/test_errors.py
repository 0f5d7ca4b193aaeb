from __future__ import annotations

import errno
import json
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from dht import _files
from dht._files import atomic_dir, atomic_file, write_json, write_text
from dht.errors import AssetError, CheckpointError, ConfigError, DataError, DHTError, listed, shown


@pytest.mark.parametrize("kind", [DHTError, DataError, AssetError, CheckpointError, ConfigError])
def test_message_is_one_line_and_survives_pickling(kind: type[DHTError]) -> None:
    error = kind("first\r\n\n  second\u2028third\n")
    assert str(error) == "first second third"
    assert isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (kind, str(error))


def test_config_error_names_every_problem() -> None:
    error = ConfigError(p for p in ["budget is 0; allowed: (0, 1]", "epochs is -1;\nallowed: 1 or more"])
    assert str(error) == "2 problems: (1) budget is 0; allowed: (0, 1] (2) epochs is -1; allowed: 1 or more"
    assert pickle.loads(pickle.dumps(error)).problems == error.problems
    assert str(ConfigError(["only one"])) == "only one"


def test_shown_and_listed_stay_short_and_printable() -> None:
    assert shown("caf\u00e9\n\ud800") == r"'caf\xe9\n\ud800'"
    assert len(shown("x" * 1000)) == 60
    assert listed(iter([])) == "none"
    assert listed(range(12), limit=3) == "0, 1, 2, ... (12 in all)"


def test_write_text_replaces_whole_file_and_makes_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "old")
    write_text(str(path), "new \u00e9\n")
    assert path.read_bytes() == "new \u00e9\n".encode()
    assert os.listdir(path.parent) == ["file.txt"]


def test_written_file_has_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "new", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").chmod(0o640)
    write_text(tmp_path / "plain", "y")
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640


def test_write_json_takes_tensors_arrays_paths_and_non_finite_numbers(tmp_path: Path) -> None:
    obj = {
        "nan": float("nan"),
        "tensor": torch.tensor([1.5, float("inf")]),
        "scalar": torch.tensor(2),
        "array": np.arange(2),
        "float32": np.float32(0.5),
        "path": Path("x"),
        "tuple": (1, True, None),
        "set": {2, 1},
        3: "text \u00e9",
    }
    write_json(tmp_path / "a.json", obj)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "nan": None,
        "tensor": [1.5, None],
        "scalar": 2,
        "array": [0, 1],
        "float32": 0.5,
        "path": "x",
        "tuple": [1, True, None],
        "set": [1, 2],
        "3": "text \u00e9",
    }


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "no space is left on the disk; free some or choose another folder"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "permission denied; choose a folder that you may write to"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ENAMETOOLONG, "the name is too long"),
        (errno.EIO, "Input/output error; choose another path"),
    ],
)
def test_failed_write_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_files.os, "replace", full)
    with pytest.raises(DHTError, match=text) as caught:
        write_text(path, "new")
    assert str(caught.value).startswith(f"cannot write {path}: ")
    assert str(caught.value).endswith("; what was there before is unchanged")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_file_system_without_fsync_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_args: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(_files.os, "fsync", unsupported)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_path_through_a_file_or_onto_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DHTError, match=r"a file of that name is in the way|a part of the path is a file"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(DHTError, match="a part of the path is a file"):
        write_text(tmp_path / "file" / "far" / "below", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DHTError, match="a folder of that name is in the way"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(DHTError, match=r"a file of that name is in the way"), atomic_dir(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_interrupted_block_changes_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), atomic_dir(tmp_path / "folder") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_dir_replaces_folder_as_a_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_dir(tmp_path / "run") as folder:
            (folder / content).write_text(content)
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["two"]


def test_atomic_dir_puts_old_folder_back_when_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_dir(tmp_path / "run") as folder:
        (folder / "old").write_text("old")
    rename = os.rename

    def fail_once(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(_files.os, "rename", fail_once)
    with pytest.raises(DHTError, match="no space is left"), atomic_dir(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["old"]


def test_full_disk_reported_by_a_library_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(DHTError, match=r"cannot write .*run: no space is left"), atomic_dir(tmp_path / "run"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="something else"), atomic_dir(tmp_path / "run"):
        raise RuntimeError("something else")
    assert os.listdir(tmp_path) == []
