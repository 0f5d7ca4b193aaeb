"""One cell of a comparison = one row of its result: a method at a budget with a seed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from .._files import write_json
from ..data import TextData, load_data
from ..hf.modeling import DHTForSequenceClassification
from ..load import by_length, load_run, tokenise
from ..measure import Batch, Outcome, report_of, run_policy
from ..policy.base import Policy
from .ablations import install
from .matching import match_price
from .policies import Cascade
from .settings import CompareSettings
from .shapes import Sizes, sizes_of
from .trainings import Training, dense_of, read_record, weights_of


@dataclass
class Served:
    """What a method serves in a cell.

    Attributes:
        model, policy: what answers; policy None = the model's own, or the cascade itself.
        trainings: what had to be trained for it, choice included.
        used: those of them that it runs on; their cost is its training cost.
        choice: what validation chose.
        outcome: on the test split, for the oracle, which is no policy.
    """

    model: DHTForSequenceClassification | Cascade
    policy: Policy | None
    used: list[Training]
    choice: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None
    tried: list[Training] = field(default_factory=list)


class Bench:
    """What the cells of one process share: the data, tokenised once, and the models on the disk."""

    def __init__(self, settings: CompareSettings, sizes: Sizes | None = None) -> None:
        self.settings = settings
        self.sizes = sizes or sizes_of(settings.model, settings.ffn)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self._data: tuple[int, TextData] | None = None
        self._batches: dict[tuple[int, str, int], list[Batch]] = {}

    def model(self, training: Training) -> DHTForSequenceClassification:
        """A freshly loaded model: a cell may change its policy."""
        model, self.tokenizer = load_run(weights_of(self.settings, training), self.settings.device)
        if training.variant:
            install(model, training.variant)
        return model

    def data(self, seed: int) -> TextData:
        """The data as the training with this seed saw it."""
        if self._data is None or self._data[0] != seed:
            s = self.settings
            self._data = seed, load_data(
                s.data, text_column=s.text_column, label_column=s.label_column, seed=seed,
                splits=("train", "validation"), optional=("test",), limit=s.limit,
            )  # fmt: skip
            self._batches.clear()
        return self._data[1]

    def batches(self, seed: int, split: str, size: int = 0) -> list[Batch]:
        """Batches of a split; a model must have been loaded before, for its tokenizer. `size` 0 = the settings' own."""
        data, size = self.data(seed), size or self.settings.batch_size
        if (seed, split, size) not in self._batches:
            rows = tokenise(self.tokenizer, getattr(data, split), self.settings.max_length)
            self._batches[seed, split, size] = by_length(self.tokenizer, rows, size)[0]
        return self._batches[seed, split, size]

    def validation(self, seed: int) -> list[Batch]:
        """Batches that prices, thresholds and shapes are chosen on."""
        return self.batches(seed, "validation")

    def held_out(self, seed: int) -> str:
        """The split that rows report: test, or validation where there is none."""
        return "test" if self.data(seed).test is not None else "validation"

    def outcome(self, model: Any, batches: list[Batch], policy: Policy | None = None) -> Outcome:
        """What a policy does, in the comparison's dtype."""
        return run_policy(model, batches, policy, dtype=self.dtype)

    def ours(self, training: Training, budget: float) -> tuple[DHTForSequenceClassification, float]:
        """Our model with its price matched to `budget` on validation, and the fraction that it met there.

        The price found is kept beside the cells: many of them serve the same model.
        """
        model = self.model(training)
        file = self.settings.out / "prices" / f"{training.key}@{budget:g}.json"
        if file.is_file():
            known = read_json(file)
            model.policy.price.fill_(known["price"])
            return model, known["fraction"]
        met = match_price(model, None, self.validation(training.seed), budget, self.dtype)
        write_json(file, {"price": float(model.policy.price), "fraction": met})
        return model, met

    @cached_property
    def versions(self) -> dict[str, Any]:
        """What the numbers were made with."""
        return {
            "dht": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "machine": platform.machine(), "commit": commit(),
        }  # fmt: skip


def read_json(file: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def commit() -> str | None:
    """The commit of the source that runs, with a + if files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        said = [
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "."))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + ("+" if said[1] else "")


def conditions() -> dict[str, Any]:
    """Under what load the seconds are taken. Contended: more was at work in the last minute than there are cores."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cores = os.cpu_count() or 1
    crowded = load is not None and load > cores
    return {"threads": torch.get_num_threads(), "load": load, "cores": cores, "contended": crowded}


@dataclass(frozen=True)
class Cell:
    """One row to be: `method` is a name from `METHODS`, or "ablation:" and one from `ABLATIONS`."""

    method: str
    budget: float
    seed: int

    @property
    def key(self) -> str:
        """A file name that no other cell has."""
        return f"{self.method.replace(':', '-')}@{self.budget:g}-s{self.seed}"


def row_of(cell: Cell, bench: Bench, serve: Callable[[Bench, float, int], Served]) -> dict[str, Any]:
    """The finished row but for inference seconds: what validation chose, then one reading of the test split.

    Args:
        serve: of the cell's method.
    """
    settings, seed = bench.settings, cell.seed
    served = serve(bench, cell.budget, seed)
    split = bench.held_out(seed)
    batches = bench.batches(seed, split)
    outcome = served.outcome or bench.outcome(served.model, batches, served.policy)
    report = report_of(outcome, None, budget=cell.budget, seed=seed, split=split)
    costs = [read_record(settings, training) for training in served.used]
    dense = read_record(settings, dense_of(settings, seed))
    spent = sum(cost["train_flops_fraction"] for cost in costs)
    seconds = sum(cost["train_seconds"] for cost in costs)
    tried = {training.key: read_record(settings, training) for training in [*served.used, *served.tried]}
    return {
        "method": cell.method, **report,
        "train_flops_fraction": spent, "train_seconds": seconds, "dense_train_seconds": dense["train_seconds"],
        "train_time_fraction": seconds / dense["train_seconds"],
        "tuning_train_flops_fraction": sum(record["train_flops_fraction"] for record in tried.values()),
        "choice": served.choice, "trainings": [training.key for training in served.used],
        "settings": settings.fixed(), "versions": bench.versions,
    }  # fmt: skip
