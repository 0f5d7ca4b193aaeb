"""`dht fit`: a fine-tuned classifier and some texts in, a run folder with a budget dial out."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ._files import write_json
from .config import DEVICES
from .data import SPLITS, Split, load_data, read_texts, split_of
from .errors import ConfigError, DataError, listed
from .fitting import FEWEST_ROWS, figures, fit
from .load import by_length, device_of, load_classifier, tokenise
from .measure import report_of, run_policy, time_policy
from .policy.baselines import DensePolicy
from .train import Say, claim_folder, save_run

FITTED = "fitted.json"
"""In the folder of a fit: digests of the texts that it was fitted on."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of `dht fit`.

    Args:
        model: folder or Hub id of a fine-tuned sequence classifier, or the folder of a finished run.
        data: as for training; with `unlabelled` also a file with a text or JSON object a line.
        out: folder that the run is written to.
        split: the split that the fit rows come from. rows: how many of them, drawn by `seed`; 0 = all.
        unlabelled: leave the labels of the fit rows unread.
        budget: what the model serves until it is told otherwise, in (0, 1].
    """

    model: str
    data: str
    out: Path
    split: str = "validation"
    rows: int = 500
    unlabelled: bool = False
    budget: float = 0.5
    max_length: int = 128
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    text_column: str | None = None
    label_column: str | None = None

    def check(self) -> None:
        """Raises `ConfigError` with every problem."""
        problems = []

        def need(ok: bool, option: str, allowed: str) -> None:
            if not ok:
                problems.append(f"--{option.replace('_', '-')}: got {getattr(self, option)!r}, allowed: {allowed}")

        need(self.split in SPLITS, "split", ", ".join(SPLITS))
        need(self.rows == 0 or self.rows >= FEWEST_ROWS, "rows", f"{FEWEST_ROWS} or more, 0 = all")
        need(0.0 < self.budget <= 1.0, "budget", "a number in (0, 1]")
        need(self.max_length >= 3, "max_length", "3 or more")
        need(self.batch_size >= 1, "batch_size", "1 or more")
        need(self.device in DEVICES, "device", ", ".join(DEVICES))
        need(0 <= self.seed < 2**32, "seed", "0 to 2^32 - 1")
        if problems:
            raise ConfigError(problems)


@dataclass
class _Rows:
    """The rows to fit on, and those to measure on (None: there are no others)."""

    fit: Split
    fit_labelled: bool
    measure: Split | None
    measure_labelled: bool
    measured_on: str
    label_names: list[str]
    name: str


def fit_run(settings: FitSettings, *, overwrite: bool = False, say: Say = lambda _: None) -> dict[str, Any]:
    """Fits a dial, measures it, fills `settings.out`, and returns the report.

    The report has the fields of an evaluation at `settings.budget` and, under `dial`, one dict a budget: `measured` on
    the test split (or on rows that the fit left over), and `expected`, the fit rows with exits that never saw them.

    Args:
        overwrite: replace a run that is already there.
        say: called with a line of news.

    Raises:
        DHTError: bad settings, data or model, or a run in the way.
    """
    settings.check()
    device = device_of(settings.device)
    model, tokenizer = load_classifier(settings.model)
    data = _rows(settings, model, say)
    claim_folder(settings.out, overwrite)
    say(f"fitting exits and policy on {len(data.fit)} texts; the weights stay as they are")
    fitted = fit(
        model, tokenizer, data.fit.inputs, data.fit.labels if data.fit_labelled else None, budget=settings.budget,
        max_length=settings.max_length, batch_size=settings.batch_size, seed=settings.seed, device=device,
    )  # fmt: skip
    fitted.model.config.id2label = dict(enumerate(data.label_names))
    fitted.model.config.label2id = {name: i for i, name in enumerate(data.label_names)}
    expected = measured = fitted.dial()
    run, batches, labelled = fitted.run, [batch for fold in fitted.folds for batch in fold], data.fit_labelled
    if data.measure is not None:
        say(f"measuring on {len(data.measure)} texts ({data.measured_on})")
        batches = by_length(tokenizer, tokenise(tokenizer, data.measure, settings.max_length), settings.batch_size)[0]
        run, labelled = partial(run_policy, fitted.model, batches), data.measure_labelled
        measured = fitted.dial(run=run, labelled=labelled)
    outcome, full = run(None), run(DensePolicy(fitted.model.config.num_attention_heads))
    report = report_of(
        outcome, time_policy(fitted.model, batches),
        budget=settings.budget, policy="learned", search="tree", seed=settings.seed, split=data.measured_on,
        batch_size=settings.batch_size, dtype="float32", threads=torch.get_num_threads(), torch=torch.__version__,
        data=data.name, model=settings.model, ffn=fitted.model.config.ffn,
    )  # fmt: skip
    report |= {
        "agreement": figures(outcome, full, labelled)["agreement"], "dense_accuracy": full.accuracy,
        "full_depth_accuracy": full.accuracy, "fit_rows": len(data.fit), "fit_labelled": data.fit_labelled,
        "lowest_fraction": fitted.lowest,
        "dial": [{"measured": there, "expected": here} for there, here in zip(measured, expected, strict=True)],
    }  # fmt: skip
    if not labelled:
        report |= dict.fromkeys(("accuracy", "macro_f1", "dense_accuracy", "full_depth_accuracy"))
    write_json(settings.out / "run.json", asdict(settings))
    write_json(settings.out / FITTED, sorted({_digest(key) for key in data.fit.keys}))
    save_run(settings.out, fitted.model, tokenizer, report)
    return report


def fitted_on(folder: Path, split: Split) -> list[int]:
    """The rows of `split` whose texts `dht fit` used for the run in `folder`; none if it is no such run."""
    try:
        known = set(json.loads((folder / FITTED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return [row for row, key in enumerate(split.keys) if _digest(key) in known]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows(settings: FitSettings, model: PreTrainedModel, say: Say) -> _Rows:
    """Draws the fit rows; measures on the test split, else on what the draw left over if that is enough.

    Raises:
        DHTError: data that cannot be read or does not fit the model.
    """
    named = cast("dict[int, str]", model.config.id2label)
    names = [named[i] for i in range(len(named))]
    test, labelled = None, True
    if Path(settings.data).is_file():
        if not settings.unlabelled:
            raise DataError(
                f"--data: {settings.data} is a file; give a data folder, or add --unlabelled if it holds a text a line"
            )
        texts = list(read_texts(settings.data, text_column=settings.text_column))
        pool = split_of(texts, [0] * len(texts), f"--data: {settings.data}")
        name, labelled = settings.data, False
    else:
        # A classifier whose classes have no names of their own takes those of the data, in order.
        generic = all(re.fullmatch(r"LABEL_\d+", label) for label in names)
        data = load_data(
            settings.data, text_column=settings.text_column, label_column=settings.label_column, seed=settings.seed,
            splits=(settings.split,), optional=("test",), label_names=None if generic else names,
        )  # fmt: skip
        for note in data.notes:
            say(note)
        if len(data.label_names) != len(names):
            raise DataError(f"--data: {len(data.label_names)} classes, but {settings.model} has {len(names)}")
        if generic:
            say(f"the model's classes have no names; taken for those of the data, in order: {listed(data.label_names)}")
        pool, test, names, name = getattr(data, settings.split), data.test, data.label_names, data.name
    chosen = random.Random(settings.seed).sample(range(len(pool)), min(settings.rows or len(pool), len(pool)))
    taken = set(chosen)
    left = [i for i in range(len(pool)) if i not in taken]
    measure, where = test, "test"
    if test is None or settings.split == "test":
        measure = pool.rows(left) if len(left) >= FEWEST_ROWS else None
        where = "rows left over" if measure else "fit rows, cross-fitted"
    return _Rows(
        pool.rows(chosen), labelled and not settings.unlabelled, measure, labelled, where, names, name
    )  # fmt: skip
