"""Wall time of `dht train` against the plain `transformers` Trainer on the same rows, recipe and machine.

    python benchmarks/train_seconds.py --data DIR --json benchmarks/results/train_seconds.json

The dynamic run is timed whole: calibration, feedback and the price curve included. Dense runs, of `transformers` and of
our own dense path, are timed over `--steps` steps of the same Trainer and scaled to the run's steps. All in one
process, one after another.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from dht._files import write_json
from dht.config import TrainSettings
from dht.load import collate, model_folder
from dht.train import arguments, dense_trainer, fit

WARM = 10


class Watch(TrainerCallback):
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


def timed(trainer: Trainer, steps: int) -> float:
    """Mean seconds of a step of `trainer`, loop and data included."""
    watch = Watch()
    trainer.add_callback(watch)
    trainer.args.max_steps, trainer.args.save_strategy = steps, transformers.trainer_utils.SaveStrategy.NO
    trainer.train()
    return watch.seconds


def main() -> None:
    """Trains, times, writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--budgets", default="0.26", help="numbers after commas")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=80, help="dense steps that are timed")
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = TrainSettings(data=asked.data, model=asked.model, out=Path(folder) / "run", epochs=asked.epochs)
        rows, result = [], {}
        for budget in map(float, asked.budgets.split(",")):
            fitted = fit(replace(base, budget=budget), overwrite=True)
            rows.append({"budget": budget, "steps": fitted.steps, "dense_steps": fitted.dense_steps, **fitted.report})
        recipe = arguments(base, Path(folder) / "dense")
        plain = AutoModelForSequenceClassification.from_pretrained(
            model_folder(asked.model), num_labels=len(fitted.data.label_names)
        )
        trainer = Trainer(
            plain, recipe, train_dataset=fitted.rows["train"],
            data_collator=lambda batch: collate(fitted.tokenizer, batch),
        )  # fmt: skip
        result["transformers_step_seconds"] = timed(trainer, asked.steps)
        own = dense_trainer(base, fitted.model, fitted.tokenizer, fitted.rows, Path(folder) / "own", False)
        result["own_dense_step_seconds"] = timed(own, asked.steps)
    for row in rows:
        for name in ("transformers", "own_dense"):
            row[f"fraction_of_{name}"] = row["train_seconds"] / (row["dense_steps"] * result[f"{name}_step_seconds"])
        took = f"{row['train_seconds']:.0f} s for {row['train_flops_fraction']:.3f} of the training FLOPs"
        against = (
            f"{row['fraction_of_transformers']:.3f} of transformers, {row['fraction_of_own_dense']:.3f} of our dense"
        )
        print(f"budget {row['budget']:g}: {took}; {against}")
    write_json(asked.json, {
        "data": Path(asked.data).name, "model": asked.model, "epochs": asked.epochs, "batch_size": 32,
        "dtype": "float32",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": platform.machine(), "dense_steps_timed": asked.steps - WARM, **result, "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()
