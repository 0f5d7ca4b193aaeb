"""Where the milliseconds of a training step go, part by part: ours at a budget, our dense path, `transformers`.

    python benchmarks/step_parts.py --data DIR --steps 100 [--json FILE]

Each runs `--steps` steps of its Trainer, the budget's whole schedule in them. A part's time is what was spent in it and
in no part inside of it. CPU time of the process is printed beside wall time: other programs disturb it less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

import dht.training
from dht._files import write_json
from dht.config import TrainSettings
from dht.data import load_data
from dht.load import build, collate, model_folder, tokenise
from dht.train import arguments, dense_trainer, dynamic_trainer
from dht.training import DHTTrainer

WARM = 8


class Clock:
    """Seconds by part; a part that runs inside another one is not counted twice."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._running: list[list[float]] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Has `owner.name` counted as `part`."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = _now()
            self._running.append([0.0, 0.0])
            try:
                return inner(*args, **kwargs)
            finally:
                within = self._running.pop()
                took = [now - then for now, then in zip(_now(), begun, strict=True)]
                for kind in (0, 1):
                    self.spent[part][kind] += took[kind] - within[kind]
                    if self._running:
                        self._running[-1][kind] += took[kind]

        setattr(owner, name, timed)


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


class Watch(TrainerCallback):
    """Wraps what exists only once training begins, and counts from step `WARM` on."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.begun, self.ended, self.steps = clock, (0.0, 0.0), (0.0, 0.0), 0

    def on_train_begin(self, *args: Any, optimizer: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.clock.wrap(optimizer, "step", "optimizer")
        self.clock.wrap(model, "zero_grad", "zero_grad")

    def on_step_end(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if state.global_step == WARM:
            self.clock.spent.clear()
            self.begun = _now()
        self.ended, self.steps = _now(), state.global_step - WARM


def profile(trainer: Trainer, steps: int) -> dict[str, list[float]]:
    """Milliseconds a step, CPU and wall, by part; "all" is the whole step."""
    clock = Clock()
    watch = Watch(clock)
    trainer.add_callback(watch)
    trainer.args.max_steps, trainer.args.save_strategy = steps, transformers.trainer_utils.SaveStrategy.NO
    clock.wrap(trainer, "get_batch_samples", "data")
    clock.wrap(trainer, "compute_loss", "forward")
    clock.wrap(trainer, "training_step", "rest of training_step")
    clock.wrap(trainer.accelerator, "backward", "backward")
    clock.wrap(trainer.accelerator, "clip_grad_norm_", "clipping")
    clock.wrap(trainer, "_get_grad_norm", "guard")
    kept = dht.training.exit_loss
    if isinstance(trainer, DHTTrainer):
        policy = trainer.dynamic.policy
        clock.wrap(policy, "decide", "policy: decide")
        clock.wrap(trainer, "_learn", "policy: rest of learning")
        for name in ("snapshot", "observe_units", "observe"):
            clock.wrap(policy, name, f"policy: {name}")
        clock.wrap(trainer, "probe", "probe")
        clock.wrap(dht.training, "exit_loss", "loss")
    trainer.train()
    dht.training.exit_loss = kept
    whole = [(now - then) * 1e3 / watch.steps for now, then in zip(watch.ended, watch.begun, strict=True)]
    parts = {part: [1e3 * s / watch.steps for s in seconds] for part, seconds in clock.spent.items()}
    parts["Trainer's loop"] = [whole[kind] - sum(part[kind] for part in parts.values()) for kind in (0, 1)]
    return parts | {"all": whole}


def main() -> None:
    """Profiles and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--budget", type=float, default=0.26)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--who", default="ours,dense,transformers")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    parts: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(data=asked.data, model=asked.model, out=Path(folder), budget=asked.budget)
        data = load_data(settings.data, splits=("train", "validation"))
        for who in asked.who.split(","):
            torch.manual_seed(0)
            model, tokenizer = build(replace(settings, dense=who == "dense"), data.label_names)
            rows = {name: tokenise(tokenizer, getattr(data, name), 128) for name in ("train", "validation")}
            trainer: Trainer
            if who == "ours":
                trainer = dynamic_trainer(settings, model, tokenizer, rows, Path(folder), False)
            elif who == "dense":
                trainer = dense_trainer(settings, model, tokenizer, rows, Path(folder), False)
            else:
                plain = AutoModelForSequenceClassification.from_pretrained(model_folder(asked.model), num_labels=2)
                trainer = Trainer(
                    plain, arguments(settings, Path(folder)), train_dataset=rows["train"],
                    data_collator=partial(collate, tokenizer),
                )  # fmt: skip
            trainer.args.disable_tqdm = True
            parts[who] = profile(trainer, asked.steps)
            if isinstance(trainer, DHTTrainer):
                print(f"{who}: {trainer.ledger.fraction:.3f} of the training FLOPs, calibration included")
    print(f"{torch.get_num_threads()} threads, {asked.steps - WARM} steps, milliseconds a step: CPU / wall")
    names = list(dict.fromkeys(name for column in parts.values() for name in column if name != "all"))
    print(f"{'':28}" + "".join(f"{who:>18}" for who in parts))
    for name in [*names, "all"]:
        cells = [column.get(name) for column in parts.values()]
        print(f"{name:28}" + "".join(f"{c[0]:9.1f}{c[1]:9.1f}" if c else " " * 18 for c in cells))
    if asked.json:
        write_json(asked.json, {"threads": torch.get_num_threads(), "steps": asked.steps - WARM, "parts": parts})


if __name__ == "__main__":
    main()
