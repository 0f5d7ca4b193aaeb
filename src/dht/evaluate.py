"""`dht evaluate`: one policy on one split of a data set, against the dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .config import DTYPES
from .data import Split, load_data
from .dial import fitted_on
from .embed import with_embeddings
from .errors import ConfigError, DataError
from .fitting import FEWEST_ROWS
from .load import by_length, check_budget, load_run, teacher_of, tokenise
from .measure import report_of, run_policy, time_policy
from .rivals import rival
from .task import Embedding

SPLITS = ("train", "validation", "test")


def evaluate(
    folder: Path,
    data: str,
    *,
    split: str = "test",
    budget: float | None = None,
    policy: str = "learned",
    batch_size: int = 32,
    max_length: int = 128,
    device: str = "auto",
    dtype: str = "float32",
    text_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    repeats: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The report of `policy` at `budget` on a split; a policy with a threshold is matched to the budget on validation.

    Args:
        folder: a finished run.
        budget: None = the one trained for.
        repeats: timed runs of each batch.
        say: called with a line of news.

    Raises:
        DHTError: a bad option, a run or data that cannot be read.
    """
    problems = []
    if split not in SPLITS:
        problems.append(f"--split: got {split!r}, allowed: {', '.join(SPLITS)}")
    if dtype not in DTYPES:
        problems.append(f"--dtype: got {dtype!r}, allowed: {', '.join(DTYPES)}")
    if batch_size < 1:
        problems.append(f"--batch-size: got {batch_size}, allowed: 1 or more")
    if problems:
        raise ConfigError(problems)
    if budget is not None:
        check_budget(budget)
    model, tokenizer = load_run(folder, device)
    budget = model.config.budget if budget is None else budget
    names = model.config.label_names
    label_names = [names[i] for i in range(len(names))]
    matched = policy in ("confidence", "patience", "random", "hash", "length")
    loaded = load_data(
        data, text_column=text_column, label_column=label_column, seed=seed, label_names=label_names,
        splits=(split,), optional=("validation",) if matched else (), task=model.task.name,
    )  # fmt: skip
    for note in loaded.notes:
        say(note)
    if isinstance(model.task, Embedding):
        loaded = with_embeddings(loaded, teacher_of(folder, model), tokenizer, max_length)

    def batches(rows: Split) -> list[dict[str, torch.Tensor]]:
        return by_length(tokenizer, tokenise(tokenizer, rows, max_length), batch_size)[0]

    measured: Split = getattr(loaded, split)
    fitted = len(fitted_on(folder, measured))
    if fitted:
        say(f"{fitted} of the {len(measured)} {split} texts are those that dht fit was fitted on")
    calibration: list[dict[str, torch.Tensor]] = []
    if matched:
        if loaded.validation is None:
            raise DataError(f"--policy {policy}: needs a validation split in {data} to match the budget {budget:g} on")
        calibration = batches(_unseen(folder, loaded.validation, say))
    rows = batches(measured)
    chosen = rival(policy, model, budget, calibration)
    chosen.to(model.device)
    torch_dtype = getattr(torch, dtype)
    outcome = run_policy(model, rows, chosen, dtype=torch_dtype)
    timing = time_policy(model, rows, chosen, dtype=torch_dtype, repeats=repeats)
    return report_of(
        outcome, timing,
        budget=budget, policy=policy, search=model.config.search, seed=model.config.policy_seed, split=split,
        batch_size=batch_size, dtype=dtype, threads=torch.get_num_threads(), torch=torch.__version__, data=loaded.name,
        ffn=model.config.ffn,
    )  # fmt: skip


def _unseen(folder: Path, validation: Split, say: Callable[[str], None]) -> Split:
    """The rows to match a rival on: not those that exits were fitted to, which are surer of them than of others."""
    seen = set(fitted_on(folder, validation))
    if len(validation) - len(seen) >= FEWEST_ROWS or not seen:
        return validation.rows(row for row in range(len(validation)) if row not in seen)
    say(
        f"matched on validation, {len(seen)} of whose {len(validation)} texts dht fit was fitted on: on other texts "
        "the policy will spend more than the budget"
    )
    return validation
