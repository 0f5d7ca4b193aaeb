"""Runs what a comparison has not finished yet, in one process or several, and gathers the rows.

Every training and every cell is a file of its own, written when it is done, so nothing finished is ever run again and a
kill loses no more than what was in progress. Seconds come last, one cell at a time, into files of their own: remove
those and they are measured anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .._files import write_json
from ..errors import DHTError, shown
from .ablations import ABLATIONS
from .cells import Bench, Cell, Served, read_json, row_of
from .methods import METHODS, ours, serve_ours
from .seconds import seconds_of
from .settings import CompareSettings
from .shapes import Sizes, sizes_of
from .trainings import Training, dense_of, record_of, train_model, weights_of
from .verdict import summaries, verdicts

CELL_EFFORT, CLOCK_EFFORT = 0.05, 0.1
"""About what a cell and its seconds cost beside its trainings, in dense trainings: for the time left."""

Report = Callable[[str, float, float], None]
"""Called with what was just done, and the effort done and in all."""


@dataclass(frozen=True)
class Job:
    """A training or a cell that is to be run, after the jobs with the keys `after`."""

    item: Training | Cell
    after: frozenset[str]
    effort: float

    @property
    def key(self) -> str:
        """A name that no other job has."""
        return f"{type(self.item).__name__}:{self.item.key}"


def cells_of(settings: CompareSettings) -> list[Cell]:
    """All cells of a comparison, seed by seed, so that an early stop leaves whole seeds."""
    names = [*settings.methods, *(f"ablation:{name}" for name in settings.ablations)]
    cells = []
    for seed in settings.seeds:
        cells += [Cell(name, 1.0, seed) for name in names if not _per_budget(name)]
        cells += [Cell(name, budget, seed) for budget in settings.budgets for name in names if _per_budget(name)]
    return cells


def _per_budget(name: str) -> bool:
    return name not in METHODS or METHODS[name].per_budget


def trainings_of(cell: Cell, settings: CompareSettings, sizes: Sizes) -> list[Training]:
    """The models whose weights a cell needs."""
    if cell.method.startswith("ablation:"):
        return ours(settings, sizes, cell.budget, cell.seed, variant=cell.method.removeprefix("ablation:"))
    return METHODS[cell.method].trainings(settings, sizes, cell.budget, cell.seed)


def _serve(cell: Cell) -> Callable[[Bench, float, int], Served]:
    if cell.method.startswith("ablation:"):
        return partial(serve_ours, variant=cell.method.removeprefix("ablation:"))
    return METHODS[cell.method].serve


def cell_file(settings: CompareSettings, cell: Cell) -> Path:
    """The JSON file that holds the finished row."""
    return settings.out / "cells" / f"{cell.key}.json"


def seconds_file(settings: CompareSettings, cell: Cell) -> Path:
    """The JSON file that holds the row's seconds."""
    return settings.out / "seconds" / f"{cell.key}.json"


def missing_cells(settings: CompareSettings) -> list[Cell]:
    """Cells without a file."""
    return [cell for cell in cells_of(settings) if not cell_file(settings, cell).is_file()]


def unfinished_cells(settings: CompareSettings) -> list[Cell]:
    """Cells without a file, and those without seconds."""
    files = (cell_file, seconds_file)
    return [cell for cell in cells_of(settings) if not all(file(settings, cell).is_file() for file in files)]


def jobs_of(settings: CompareSettings, sizes: Sizes) -> list[Job]:
    """What has to be run, each job after those that it builds on."""
    found: dict[str, Job] = {}

    def add(item: Training | Cell, after: Iterable[str], effort: float) -> str:
        job = Job(item, frozenset(after), effort)
        found.setdefault(job.key, job)
        return job.key

    def require(training: Training, weights: bool) -> list[str]:
        """The job that trains, if the record (and the weights, if they are needed) is not there yet."""
        done = record_of(settings, training).is_file()
        if done and (not weights or (weights_of(settings, training) / "config.json").is_file()):
            return []
        before = [key for needed in training.needs for key in require(needed, weights=False)]
        return [add(training, before, training.effort(sizes))]

    missing = set(missing_cells(settings))
    for cell in unfinished_cells(settings):
        needs = require(dense_of(settings, cell.seed), weights=False)
        for training in trainings_of(cell, settings, sizes):
            needs += require(training, weights=True)
        if cell in missing:
            add(cell, needs, CELL_EFFORT)
    return list(found.values())


@cache
def _bench(settings: CompareSettings, sizes: Sizes) -> Bench:
    return Bench(settings, sizes)


def run_job(settings: CompareSettings, sizes: Sizes, job: Job) -> str:
    """Runs a job, in whichever process; its files are its result."""
    if isinstance(job.item, Training):
        train_model(settings, job.item, sizes)
        return f"trained {job.item.key}"
    row = row_of(job.item, _bench(settings, sizes), _serve(job.item))
    write_json(cell_file(settings, job.item), row)
    return f"{job.item.key}: accuracy {100 * row['accuracy']:.1f} at {100 * row['flops_fraction']:.1f}% of the FLOPs"


def run_missing(settings: CompareSettings, report: Report = lambda what, done, total: None) -> None:
    """Runs every cell that is missing, and what it needs.

    Args:
        report: called after every job.

    Raises:
        DHTError: bad settings, data or model, or a folder of another comparison.
    """
    settings.check()
    claim_comparison(settings)
    sizes = sizes_of(settings.model, settings.ffn)
    jobs = jobs_of(settings, sizes)
    untimed = unfinished_cells(settings)
    done, total = 0.0, sum(job.effort for job in jobs) + CLOCK_EFFORT * len(untimed)
    report(f"{len(missing_cells(settings))} of {len(cells_of(settings))} cells to run", done, total)
    for job, said in (_in_turn if settings.jobs == 1 else _side_by_side)(settings, sizes, jobs):
        done += job.effort
        if isinstance(job.item, Cell) and not settings.keep_models:
            _drop_weights(settings, sizes)
        report(said, done, total)
    for cell in untimed:
        write_json(seconds_file(settings, cell), seconds_of(cell, _bench(settings, sizes), _serve(cell)))
        done += CLOCK_EFFORT
        if not settings.keep_models:
            _drop_weights(settings, sizes)
        report(f"{cell.key}: timed", done, total)


def _in_turn(settings: CompareSettings, sizes: Sizes, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
    for job in jobs:
        yield job, run_job(settings, sizes, job)


def _side_by_side(settings: CompareSettings, sizes: Sizes, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
    """As many jobs at once as asked for, each as soon as what it builds on is there; threads are divided."""
    threads = max(1, torch.get_num_threads() // settings.jobs)
    waiting, running, done = list(jobs), dict[Future[str], Job](), set[str]()
    with ProcessPoolExecutor(
        settings.jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        try:
            while waiting or running:
                ready = [job for job in waiting if job.after <= done][: settings.jobs - len(running)]
                for job in ready:
                    waiting.remove(job)
                    running[pool.submit(run_job, settings, sizes, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    said = future.result()
                    done.add(job.key)
                    yield job, said
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _drop_weights(settings: CompareSettings, sizes: Sizes) -> None:
    """Removes the weights that no missing cell needs: a comparison trains more models than disks like to keep."""
    needed = {t.key for cell in unfinished_cells(settings) for t in trainings_of(cell, settings, sizes)}
    for folder in (settings.out / "models").glob("*"):
        # Only finished models: a folder without a config.json may be in the making.
        if folder.name not in needed and (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)


def claim_comparison(settings: CompareSettings) -> None:
    """Makes the folder this comparison's, or checks that it is.

    Raises:
        DHTError: it holds a comparison with other settings, or something else.
    """
    file = settings.out / "settings.json"
    asked = json.loads(json.dumps(settings.fixed()))
    if settings.out.exists() and not settings.out.is_dir():
        raise DHTError(f"--out: {settings.out} is a file; give a folder")
    if not file.is_file():
        if settings.out.is_dir() and any(settings.out.iterdir()):
            raise DHTError(f"--out: {settings.out} already holds files that are no comparison; give another folder")
        write_json(file, asked)
        return
    try:
        there = read_json(file)
        other = [f"{key} {shown(there.get(key))} there, {shown(value)} asked" for key, value in asked.items()
                 if there.get(key) != value]  # fmt: skip
    except (OSError, ValueError, AttributeError) as error:
        raise DHTError(f"{file}: not readable ({error}); remove the folder or give another") from error
    if other:
        raise DHTError(
            f"--out: {settings.out} holds a comparison with other settings ({'; '.join(other)}); give another folder"
        )


def gather(settings: CompareSettings) -> dict[str, Any]:
    """`compare.json` of the cells that are there: rows, means, verdicts, regret; it is written too."""
    cells, rows = cells_of(settings), []
    for cell in cells:
        parts = [
            read_json(file(settings, cell)) for file in (cell_file, seconds_file) if file(settings, cell).is_file()
        ]
        if cell_file(settings, cell).is_file():
            rows.append({key: value for part in parts for key, value in part.items()})
    regrets = {}
    for seed in settings.seeds:
        for budget in settings.budgets:
            file = record_of(settings, Training("dht", seed, budget))
            if file.is_file() and (curve := read_json(file).get("regret")):
                regrets[f"{budget:g}-s{seed}"] = curve
    lists = {"methods": settings.methods, "budgets": settings.budgets, "seeds": settings.seeds}
    result: dict[str, Any] = {
        "settings": settings.fixed() | lists | {"ablations": settings.ablations},
        "methods": {name: {"group": METHODS[name].group, "line": METHODS[name].line} for name in settings.methods}
        | {f"ablation:{name}": {"group": "ablation", "line": ABLATIONS[name].line} for name in settings.ablations},
        "cells": len(cells), "missing": len(cells) - len(rows),
        "verdicts": [verdict.as_json() for verdict in verdicts(rows)],
        "summary": summaries(rows), "regret": regrets, "rows": rows,
    }  # fmt: skip
    write_json(settings.out / "compare.json", result)
    return result
