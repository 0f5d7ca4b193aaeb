"""Writes that never leave half a file: everything goes to a temporary neighbour first and is renamed into place."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from dht.errors import DHTError

_ADVICE = {
    errno.ENOSPC: "no space is left on the disk; free some or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some or choose another folder",
    errno.EFBIG: "the file would pass the size limit of the system or the user; raise it or choose another folder",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "permission denied; choose a folder that you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "a file of that name is in the way; choose another path",
    errno.EISDIR: "a folder of that name is in the way; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 so that the path holds either the old content or all of the new one.

    Args:
        path: the file; missing parent folders are made.
        text: what it is to hold.

    Raises:
        DHTError: the file cannot be written (disk full, read-only, ...); the old one is as it was.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, as `write_text` writes.

    Paths become strings, tensors and arrays lists, and NaN and infinities null, because JSON has none.

    Args:
        path: the file; missing parent folders are made.
        obj: dicts, lists, numbers, strings, None; also paths, tensors, arrays.

    Raises:
        DHTError: the file cannot be written; the old one is as it was.
    """
    write_text(path, json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends without an error.

    Raises:
        DHTError: writing, flushing or renaming failed; the old file is as it was.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
        try:
            os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it takes `path`'s place when the block ends without an error.

    A folder that is already at `path` is moved aside first and removed last, so that at every moment one of the two is
    whole on the disk.

    Raises:
        DHTError: writing or renaming failed; the old folder is as it was.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise FileExistsError(errno.EEXIST, "not a folder")
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp"))
        try:
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            _swap(temporary, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".old"))
    os.rename(path, aside / "old")
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside / "old", path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an operating system's error into one line that names the path.

    Raises:
        DHTError: in place of the error.
    """
    try:
        yield
    except OSError as error:
        _fail(path, _ADVICE.get(error.errno or 0) or f"{error.strerror or error}; choose another path")
    except Exception as error:
        # safetensors and torch.save report a full disk as errors of their own.
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in str(error) or f"os error {number})" in str(error):
                _fail(path, _ADVICE[number])
        if "PytorchStreamWriter failed" in str(error):
            _fail(path, "writing stopped half-way, as on a full disk; free some space or choose another folder")
        raise


def _fail(path: Path, reason: str) -> NoReturn:
    raise DHTError(f"cannot write {path}: {reason}; what was there before is unchanged") from None


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk; file systems that cannot are left to themselves."""
    unsupported = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR, errno.EPERM}
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in unsupported:
            raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _plain(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [_plain(value) for value in (sorted(obj) if isinstance(obj, set | frozenset) else obj)]
    if isinstance(obj, Path):
        return str(obj)
    for method in ("tolist", "item"):
        with suppress(AttributeError):
            return _plain(getattr(obj, method)())
    return obj
