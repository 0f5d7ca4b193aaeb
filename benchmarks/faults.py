"""Faults injected into small real trainings, saved runs and inputs: how many were survived, how many lost anything.

`python benchmarks/faults.py` kills trainings, damages files, spoils numbers and measures a long run;
`python benchmarks/faults.py --fuzz 100000` feeds generated inputs. Figures go to `benchmarks/results/faults.json`.
"""

# ruff: noqa: E402  (what the tests share with this script lies in their folder)
from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the tests inject the same faults, fewer of them

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers import TrainerCallback

import hostile
from damage import damage_checkpoint, damage_run
from dht import train
from dht._files import write_json
from dht.manifest import MANIFEST
from killing import Killer, at, small_settings, while_writing
from test_numbers import FAULTS, faulty, trained

RESULT = ROOT / "benchmarks" / "results" / "faults.json"
STEPS, NOTED = 2000, 200
"""Of the long run, and how often its memory is read."""

BAD_STEPS = {3, 5, 6, 12}
SHARES = {
    "data files": 0.3, "settings": 0.15, "configurations": 0.15, "saved configurations": 0.05,
    "lines to predict": 0.15, "texts to predict": 0.2,
}  # fmt: skip
"""Of the generated inputs."""


def kills(folder: Path, count: int) -> dict[str, Any]:
    """Kills at random moments, every third while a checkpoint is being written, and resumes."""
    killer, draw = Killer(small_settings(folder), folder / "runs"), random.Random(0)
    outcomes = []
    for i in range(count):
        if i % 3 == 2:
            due = while_writing(draw.randrange(1, 9), draw.uniform(0.0, 0.012))
        else:
            due = at(draw.uniform(0.0, 0.7))
        outcomes.append(killer.kill(f"run-{i}", due))
        print(f"kill {i + 1}/{count}: {outcomes[-1]}", file=sys.stderr)
        shutil.rmtree(folder / "runs" / f"run-{i}")
    lost = [outcome for outcome in outcomes if outcome.differs]
    return {
        "injected": count, "survived": count - len(lost), "lost": len(lost),
        "while_writing": sum(outcome.moment == "writing" for outcome in outcomes),
        "before_the_first_checkpoint": sum(outcome.resumed_from == 0 for outcome in outcomes),
        "resumed_from_steps": sorted(outcome.resumed_from for outcome in outcomes),
        "compared": list(killer.whole),
    }  # fmt: skip


def finished(folder: Path) -> tuple[Path, Path]:
    """A finished run and a copy of its checkpoints."""
    tiny = small_settings(folder)
    fitted = train.fit(tiny)
    checkpoints = shutil.copytree(tiny.out / "checkpoints", folder / "checkpoints")
    train.save_run(tiny.out, fitted.model, fitted.tokenizer, fitted.report)
    return tiny.out, checkpoints


def damages(folder: Path, count: int) -> dict[str, Any]:
    """Byte flips and truncations, three fifths over a run's files and two over a checkpoint's."""
    run, checkpoints = finished(folder)
    over_run = count * 3 // 5
    seen = damage_run(run, over_run, seed=0) + damage_checkpoint(checkpoints, count - over_run, seed=1)
    kinds = Counter[str]()
    for (_, outcome), times in seen.items():
        kinds[outcome.split(":")[0]] += times
    return {
        "injected": count, "survived": kinds["refused"] + kinds["same"], "lost": kinds["lost"],
        "refused_by_name": kinds["refused"], "loaded_the_same": kinds["same"],
        "same_files": sorted({file for file, outcome in seen if outcome == "same"}),
    }  # fmt: skip


def numbers(folder: Path) -> dict[str, Any]:
    """Losses, gradients, contexts and rewards that are not finite, at `BAD_STEPS` of a training each."""
    survived = 0
    for i, fault in enumerate(FAULTS):
        with pytest.MonkeyPatch.context() as patch:
            fitted, trainer = trained(small_settings(folder / str(i), epochs=1), faulty(patch, fault, BAD_STEPS))
        fitted.model.policy.check_sound()
        assert all(bool(parameter.isfinite().all()) for parameter in fitted.model.parameters()), fault
        survived += trainer.refusals.count
    injected = len(FAULTS) * len(BAD_STEPS)
    return {"injected": injected, "survived": survived, "lost": injected - survived, "kinds": FAULTS}


class _Memory(TrainerCallback):
    def __init__(self) -> None:
        self.megabytes: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % NOTED == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.megabytes[state.global_step] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _long(folder: Path, result: Path) -> None:
    torch.set_num_threads(1)
    memory = _Memory()
    tiny = small_settings(folder, epochs=STEPS / 20, save_every=STEPS // 2)

    def make(*given: Any) -> Any:
        trainer = train.dynamic_trainer(*given)
        trainer.add_callback(memory)
        return trainer

    fitted = train.fit(tiny, make=make)
    state = tiny.out / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json"
    logged = json.loads(state.read_text(encoding="utf-8"))
    write_json(
        result,
        {
            "steps": fitted.steps, "rss_mb": memory.megabytes, "history_entries": len(fitted.history),
            "log_entries": len(logged["log_history"]), "trainer_state_bytes": state.stat().st_size,
        },
    )  # fmt: skip


def long_run(folder: Path) -> dict[str, Any]:
    """Resident memory and length of the logs over a run of `STEPS` steps, in processes of their own.

    oneDNN keeps the last 1024 kernels that it made, one for every shape of a batch, and that cache fills for a while.
    The second run keeps four, so that what it holds is the program's own.
    """
    found: dict[str, Any] = {}
    for kept, capacity in (("rss_mb", "1024"), ("rss_mb_with_4_kernels_kept", "4")):
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = capacity
        target = folder / f"{capacity}.json"
        process = multiprocessing.get_context("spawn").Process(target=_long, args=(folder / capacity, target))
        process.start()
        process.join()
        measured = json.loads(target.read_text(encoding="utf-8"))
        found = measured | found | {kept: measured["rss_mb"]}
    return found


def fuzz(folder: Path, count: int) -> dict[str, Any]:
    """Generated inputs by target: taken, refused with a documented error, crashed (with the first few crashes)."""
    run, _ = finished(folder)
    (run / MANIFEST).unlink()  # it would catch what the loaders are to meet
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of every odd configuration
    (folder / "files").mkdir()
    result: dict[str, Any] = {"inputs": 0, "crashed": 0, "targets": {}}
    for name, (strategy, check) in hostile.targets(folder / "files", run).items():
        seen, crashes, begun = Counter[str](), [], time.perf_counter()
        _feed(strategy, check, max(1, round(count * SHARES[name])), seen, crashes)
        result["targets"][name] = {**dict(sorted(seen.items())), "crashes": crashes[:5]}
        result["inputs"] += sum(seen.values())
        result["crashed"] += seen["crashed"]
        print(f"{name}: {dict(seen)} in {time.perf_counter() - begun:.0f} s {crashes[:2]}", file=sys.stderr)
    return result


def _feed(strategy: Any, check: Any, count: int, seen: Counter[str], crashes: list[str]) -> None:
    @seed(0)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def feed(example: Any) -> None:
        try:
            seen["taken" if check(example) else "refused"] += 1
        except Exception as error:
            seen["crashed"] += 1
            crashes.append(f"{error!r:.300} from {example!r:.300}")

    feed()


def main() -> None:
    """Injects, prints a table and one line of JSON, and updates the committed figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--only", default="kills,damaged_files,numbers,long_run", help="which of these, after commas")
    parser.add_argument("--fuzz", type=int, default=0, help="feed so many generated inputs, and nothing else")
    chosen = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if chosen.fuzz:
            result["fuzz"] = fuzz(folder, chosen.fuzz)
        else:
            all_of_them = {
                "kills": lambda place: kills(place, chosen.kills),
                "damaged_files": lambda place: damages(place, chosen.damages),
                "numbers": numbers,
                "long_run": long_run,
            }
            for kind in chosen.only.split(","):
                result[kind] = all_of_them[kind](folder / kind)
    earlier = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    result = earlier | result | {"torch": torch.__version__, "threads": 1}
    write_json(RESULT, result)
    for kind in ("kills", "damaged_files", "numbers"):
        if kind in result:
            print("{:14} injected {injected:6} survived {survived:6} lost {lost}".format(kind, **result[kind]))
    if "fuzz" in result:
        print("{:14} inputs {inputs:8} crashed {crashed}".format("fuzz", **result["fuzz"]))
    if "long_run" in result:
        print(f"{'long run':14} {result['long_run']}")
    print(json.dumps(result, separators=(",", ":")))


if __name__ == "__main__":
    main()
