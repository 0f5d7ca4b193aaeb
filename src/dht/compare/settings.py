"""What a comparison is told: one dataclass, checked as a whole before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..config import TrainSettings
from ..errors import ConfigError, listed, shown

FREE = ("out", "methods", "budgets", "seeds", "ablations", "jobs", "keep_models")
"""Fields that may change between runs in one folder: they say which cells there are, not what is in a cell."""


Number = TypeVar("Number", int, float)


def listed_names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a comma-separated option; "all" stands for `known` and "none" for nothing.

    >>> listed_names("b, a", ("a",)), listed_names("all", ("a", "b")), listed_names("none", ("a",))
    (('b', 'a'), ('a', 'b'), ())
    """
    if text.strip() in ("all", "none"):
        return known if text.strip() == "all" else ()
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def listed_numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """The numbers in a comma-separated option.

    Raises:
        ConfigError: something in it is no number.
    """
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option}: got {shown(text)}, give {what} with commas between them") from None


@dataclass(frozen=True)
class CompareSettings:
    """Settings of `dht compare`.

    Args:
        data, model: as for `dht train`.
        out: folder of the comparison; finished cells found there are kept.
        methods: names from `METHODS`. ablations: names from `ABLATIONS`.
        budgets: fractions of dense FLOPs, each in (0, 1]. seeds: one training each.
        jobs: processes that run side by side. Inference seconds are measured afterwards, one cell at a time.
        keep_models: keep the weights of models that no cell needs any more.
        timed_batches: batches of the test split that are timed, spread evenly over it. repeats: runs of each.
        candidates: static shapes a budget that are trained, of which validation picks one.
        search, ffn, epochs, batch_size, lr, max_length, device, dtype, text_column, label_column, limit: as for
            `dht train`, the same for every method.
    """

    data: str
    model: str
    out: Path
    methods: tuple[str, ...]
    budgets: tuple[float, ...] = (0.5, 0.26, 0.15, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    ablations: tuple[str, ...] = ()
    jobs: int = 1
    keep_models: bool = False
    timed_batches: int = 12
    repeats: int = 5
    candidates: int = 3
    search: str = "tree"
    ffn: str = "coupled"
    epochs: float = 3.0
    batch_size: int = 32
    lr: float = 1e-4
    max_length: int = 128
    device: str = "auto"
    dtype: str = "float32"
    text_column: str | None = None
    label_column: str | None = None
    limit: tuple[int, ...] | None = None

    def check(self) -> None:
        """Raises `ConfigError` with every problem."""
        from .ablations import ABLATIONS
        from .methods import METHODS

        problems = []
        for option, asked, known in (
            ("--methods", self.methods, tuple(METHODS)),
            ("--ablations", self.ablations, tuple(ABLATIONS)),
        ):
            unknown = [name for name in asked if name not in known]
            if unknown:
                problems.append(f"{option}: got {listed(unknown)}, allowed: {', '.join(known)}")
        if self.search != "tree":
            tied = {name for name, ablation in ABLATIONS.items() if ablation.policy} | {"epsilon-greedy"}
            barred = [name for name in (*self.methods, *self.ablations) if name in tied]
            if barred:
                problems.append(
                    f"--search: got {self.search!r}, but {listed(barred)} change tree search; leave them out"
                )
        if not self.methods:
            problems.append("--methods: got none, give at least one")
        for option, values in (("--budgets", self.budgets), ("--seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                problems.append(f"{option}: got {listed(values)}, give one or more, each once")
        if any(not 0.0 < budget <= 1.0 for budget in self.budgets):
            problems.append(f"--budgets: got {listed(self.budgets)}, allowed: numbers in (0, 1]")
        counts = {name: getattr(self, name) for name in ("jobs", "timed_batches", "repeats", "candidates")}
        problems += [
            f"--{name.replace('_', '-')}: got {count}, allowed: 1 or more"
            for name, count in counts.items()
            if count < 1
        ]
        for seed in self.seeds:
            try:
                self.training(1.0, seed, self.out).check()
            except ConfigError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if problems:
            raise ConfigError(problems)

    def training(self, budget: float, seed: int, out: Path, **changes: Any) -> TrainSettings:
        """The settings of one training."""
        shared = {f.name for f in fields(TrainSettings)} & {f.name for f in fields(self)}
        kept = {name: getattr(self, name) for name in shared}
        return TrainSettings(**kept | {"budget": budget, "seed": seed, "out": out, "task": "single"} | changes)

    def fixed(self) -> dict[str, Any]:
        """What every cell in a folder must have been run with, as plain JSON values."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}
        # A folder's name says which data set it is; where it lies is the machine's business.
        return kept | {name: Path(kept[name]).name for name in ("data", "model") if Path(kept[name]).is_dir()}
