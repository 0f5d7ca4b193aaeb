"""A whole `dht train` on a clock, against the plain `transformers` Trainer on the same rows, recipe and machine.

The dynamic run is timed whole: calibration, imitation, held-out rows and readying the policy included. Dense runs, of
`transformers` and of our own dense path, are timed over some steps of the same Trainer and scaled to the run's steps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..config import TrainSettings
from ..errors import DHTError
from ..load import PRESETS, collate
from ..train import arguments, dense_trainer, fit
from .contend import plain_of
from .settings import BenchSettings, short_name
from .subject import SIZES, is_run

WARM, TIMED = 10, 60
"""Dense steps before the clock starts, and on it."""


class _Watch(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Mean seconds of a step after the first `WARM`."""
        return (self.ends[-1] - self.ends[WARM - 1]) / (len(self.ends) - WARM)


def _step_seconds(trainer: Trainer) -> float:
    """Mean seconds of a step of `trainer`, loop and data included."""
    watch = _Watch()
    for talker in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(talker)
    trainer.add_callback(watch)
    trainer.args.max_steps, trainer.args.save_strategy = WARM + TIMED, SaveStrategy.NO
    trainer.train()
    return watch.seconds


def measure_whole(name: str, settings: BenchSettings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each fraction below 1: what training at that budget took, and what dense training would take.

    Args:
        name: an encoder as for `dht train`.
        settings: data, fractions, device, dtype (the first) and seed.
        say: called with a line of news.

    Raises:
        DHTError: not an encoder that `transformers` could train alike; or what `dht train` raises.
    """
    if name in PRESETS or name in SIZES or is_run(Path(name)):
        raise DHTError(f"--what whole: got {name}, allowed: a pretrained encoder of transformers, e.g. minilm")
    dtype = settings.dtype[0] if settings.dtype else "float32"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = TrainSettings(
            data=settings.data or "vader", model=name, out=Path(folder) / "run", seed=settings.seed,
            device=settings.device, dtype=dtype, text_column=settings.text_column, label_column=settings.label_column,
        )  # fmt: skip
        for budget in (fraction for fraction in settings.fractions if fraction < 1.0):
            say(f"{short_name(name)}: a whole training at {budget:g}")
            fitted = fit(replace(base, budget=budget), overwrite=True)
            rows.append(
                {"model": short_name(name), "dtype": dtype, "budget": budget, "steps": fitted.steps}
                | {"dense_steps": fitted.dense_steps, **fitted.report}
            )
        if not rows:
            raise DHTError("--what whole: --fractions has none below 1, e.g. .26")
        say(f"{short_name(name)}: {WARM + TIMED} dense steps of transformers and of ours")
        trainer = Trainer(
            plain_of(fitted.model), arguments(base, Path(folder) / "dense"), train_dataset=fitted.rows["train"],
            data_collator=lambda batch: collate(fitted.tokenizer, batch),
        )  # fmt: skip
        own = dense_trainer(base, fitted.model, fitted.tokenizer, fitted.rows, Path(folder) / "own", False)
        step = {"transformers": _step_seconds(trainer), "own_dense": _step_seconds(own)}
    for row in rows:
        for dense, seconds in step.items():
            row[f"{dense}_seconds"] = seconds * row["dense_steps"]
            row[f"of_{dense}"] = row["train_seconds"] / row[f"{dense}_seconds"]
    return rows
