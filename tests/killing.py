"""A small real training in a process of its own that can be killed at any moment, and what it ended with."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from dht import assets, checkpoints, train
from dht.config import TrainSettings
from dht.data import load_data
from dht.errors import CheckpointError
from dht.guarded import _read_generators
from dht.manifest import COMPLETE


def small_settings(folder: Path, **changes: Any) -> TrainSettings:
    """A tiny BERT with the real tokenizer, a few hundred real sentences, and how to train on them, in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model_path("minilm"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    data = load_data("vader", splits=("train", "validation"))
    (folder / "data").mkdir(parents=True)
    for split, rows, count in (("train", data.train, 320), ("validation", data.validation, 64)):
        chosen = random.Random(0).sample(list(zip(rows.texts, rows.labels, strict=True)), count)
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in chosen]
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = TrainSettings(
        data=str(folder / "data"), model=str(folder / "encoder"), out=folder / "out", budget=0.4, epochs=2,
        batch_size=16, lr=1e-3, max_length=32, device="cpu", save_every=4, train_budget=10.0,
    )  # fmt: skip
    return replace(settings, **changes)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def run(settings: TrainSettings, result: Path, resume: bool) -> None:
    """Trains and writes digests of all that two equal runs must share; the target of the process."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    order: list[str] = []
    collate = train.collate

    def noting(tokenizer: Any, rows: Any) -> Any:
        batch = collate(tokenizer, rows)
        order.append(digest(batch["input_ids"].numpy().tobytes(), batch["labels"].numpy().tobytes()))
        return batch

    train.collate = noting  # the training batches; calibration and feedback have their own
    fitted = train.fit(settings, resume=resume, overwrite=not resume)
    state = fitted.model.state_dict()
    parts = {
        "weights": [t.numpy().tobytes() for name, t in state.items() if not name.startswith("policy.")],
        "posteriors": [state[name].numpy().tobytes() for name in state if name.startswith("policy.")],
        "price": [state["policy.price"].numpy().tobytes()],
        "generators": [repr(_plain(state)).encode() for state in _read_generators().values()],
        "log": [json.dumps(fitted.history, sort_keys=True).encode()],
    }
    ended: dict[str, Any] = {name: digest(*values) for name, values in parts.items()}
    ended["data order"] = order
    result.write_text(json.dumps(ended), encoding="utf-8")


def _plain(state: Any) -> Any:
    if isinstance(state, torch.Tensor | np.ndarray):
        return state.tolist()
    return [_plain(item) for item in state] if isinstance(state, tuple) else state


@dataclass
class Outcome:
    """What one kill did.

    Attributes:
        seconds: when, after the start. moment: "writing" while a checkpoint was half-written, else "training".
        resumed_from: step of the checkpoint, 0 = there was none yet and the run started anew.
        differs: what is not bit-identical to the uninterrupted run; empty = survived.
    """

    seconds: float
    moment: str
    resumed_from: int
    differs: list[str]


class Killer:
    """Runs a training to its end once, then kills copies of it and compares what the resumed ones end with.

    Args:
        settings: of the training. folder: for the runs.
    """

    def __init__(self, settings: TrainSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["killing"])  # torch is imported once, not in every process
        with _exported_path(), self._started("whole", resume=False) as process:
            process.join()
        self.whole = self._ended("whole")

    def kill(self, name: str, due: Callable[[Path, float], bool]) -> Outcome:
        """Kills a run as soon as `due(checkpoints, seconds since its first checkpoint folder)` and resumes it."""
        out = self.folder / name / "out"
        begun = time.perf_counter()
        with self._started(name, resume=False) as process:
            first = 0.0
            while process.is_alive():
                if not first and any(out.glob("checkpoints/checkpoint-*")):
                    first = time.perf_counter()
                if due(out / "checkpoints", time.perf_counter() - first if first else -1.0):
                    break
                time.sleep(0.0005)
            process.kill()  # SIGKILL; nothing happens to one that has ended
            process.join()
        seconds = time.perf_counter() - begun
        half = [f for f in out.glob("checkpoints/checkpoint-*") if not (f / COMPLETE).is_file()]
        try:
            start = int(checkpoints.newest_whole(out / "checkpoints")[0].name.split("-")[1])
        except CheckpointError:
            start = 0
        with self._started(name, resume=start > 0) as process:
            process.join()
        ended = self._ended(name)
        order = self.whole["data order"]
        differs = [key for key in self.whole if key != "data order" and self.whole[key] != ended.get(key)]
        # A resumed run takes up the order where the checkpoint left it.
        if ended.get("data order") != order[start * self.settings.accumulate :]:
            differs.append("data order")
        return Outcome(round(seconds, 3), "writing" if half else "training", start, differs)

    @contextmanager
    def _started(self, name: str, resume: bool) -> Iterator[Any]:
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        settings = replace(self.settings, out=place / "out")
        process = self.context.Process(target=run, args=(settings, place / "ended.json", resume))
        process.start()
        try:
            yield process
        finally:
            if process.is_alive():
                process.kill()
                process.join()

    def _ended(self, name: str) -> dict[str, Any]:
        path = self.folder / name / "ended.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextmanager
def _exported_path() -> Iterator[None]:
    """Lets the server of processes, which starts with the first of them, find the modules that this process finds."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def at(seconds: float) -> Callable[[Path, float], bool]:
    """Due so many seconds after the first checkpoint began."""
    return lambda folder, since: since >= seconds


def while_writing(nth: int, delay: float) -> Callable[[Path, float], bool]:
    """Due `delay` seconds into the writing of the `nth` checkpoint that is caught half-written."""
    caught: dict[Path, float] = {}

    def due(folder: Path, since: float) -> bool:
        for path in folder.glob("checkpoint-*"):
            if path not in caught and not (path / COMPLETE).is_file():
                caught[path] = time.perf_counter()
        latest = list(caught.values())
        return len(latest) >= nth and time.perf_counter() - latest[nth - 1] >= delay

    return due
