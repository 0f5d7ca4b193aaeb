"""What a training run is told: one dataclass, checked as a whole before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ._labels import TASKS
from .errors import ConfigError, shown

FASTEST = 2.0
"""Most that a narrow network's learning rate is raised: few steps have to do (decision 14)."""

DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
MAY_CHANGE = ("out", "device", "save_every")
"""Settings that may be others when a run is resumed."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `dht train`.

    Args:
        data: embedded name, folder or Hugging Face data set id; what it is called, where the data is given as such.
        model: embedded name, folder or Hub id of an encoder (`dht.hf.families`), or a preset (`preset:small`).
        out: folder that the run is written to.
        budget: target mean FLOPs at inference as a fraction of the dense model's, in (0, 1].
        train_budget: FLOPs of the whole training, all of it counted, as a fraction of dense training for `epochs`; None
            = `budget`. It is met by taking fewer steps, over which the learning rate decays; in less than two passes
            over the data nothing is dropped out.
        search: "tree" or "integrated". ffn: "coupled" or "dense".
        epochs: passes over the training split that dense training takes; `train_budget` is a share of their FLOPs.
        seed: as usual. batch_size: rows of a step; fewer, 8 at least, where the budget leaves less than 300 steps
            (`dht.spending`).
        lr: peak of a linear decay, as for the dense model; where layers run K of H head units it is times H / K, at
            most `FASTEST` times.
        max_length: tokens a text is cut to.
        device: "auto", "cpu" or "cuda". dtype: "float32" or "bfloat16" (autocast).
        accumulate: batches per optimizer step.
        warm_start, settle: a step's budget starts at `warm_start` and has come down to its final value (`dht.spending`)
            after the share `settle` of all steps.
        crop: tokens that longer texts are cut to in the first part of training (`dht.spending`), each time at another
            place, which takes more steps for the same FLOPs; 0 = never. Pairs, words with tags and texts whose
            embeddings are learned are never cut, nor is anything in dense training or when serving.
        lexical: True for an exit before layer 1 that reads tokens, pairs of neighbours and phrases, fitted before
            training (`dht.lexical`): rows that it is sure of run no layer. For single labels of at most 32 classes in
            tree search, and not for pairs of texts; elsewhere, and in dense training, there is none.
        save_every: checkpoint every so many steps; 0 = once an epoch.
        text_column, label_column: names in the data, as for `load_data`; None = inferred.
        task: "single" (one class a row), "multi" (several), "regression", "token" (a tag a word), "auto" (one of these,
            as the data look), or "embedding" (no labels: what the encoder's last layer says is learned by every exit).
        class_weights: "none", or "balanced": in the loss a row counts n / (C n_c), with n_c rows of its class of n.
        limit: rows of the train, validation and test split that are used at most; None = all.
        dense: train the plain full model instead (one exit, no policy), the reference to compare with.
    """

    data: str
    model: str
    out: Path
    budget: float = 0.26
    train_budget: float | None = None
    search: str = "tree"
    ffn: str = "coupled"
    epochs: float = 3.0
    seed: int = 0
    batch_size: int = 32
    lr: float = 1e-4
    max_length: int = 128
    device: str = "auto"
    dtype: str = "float32"
    accumulate: int = 1
    warm_start: float = 0.4
    settle: float = 0.35
    crop: int = 64
    lexical: bool = True
    save_every: int = 0
    text_column: str | None = None
    label_column: str | None = None
    class_weights: str = "none"
    task: str = "auto"
    limit: tuple[int, ...] | None = None
    dense: bool = False

    def check(self) -> None:
        """Raises `ConfigError` with every problem."""
        problems = []

        def need(ok: Callable[[Any], bool], option: str, allowed: str) -> None:
            got = getattr(self, option)
            try:
                fits = ok(got) and not isinstance(got, bool)
            except (TypeError, OverflowError):
                fits = False
            if not fits:
                problems.append(f"--{option.replace('_', '-')}: got {shown(got)}, allowed: {allowed}")

        def whole(least: int, most: int = 2**31) -> Callable[[Any], bool]:
            return lambda value: isinstance(value, int) and least <= value <= most

        need(lambda b: 0.0 < b <= 1.0, "budget", "a number in (0, 1]")
        need(lambda b: b is None or 0.0 < b < math.inf, "train_budget", "a number above 0")
        need(lambda name: name in ("tree", "integrated"), "search", "tree, integrated")
        need(lambda name: name in ("coupled", "dense"), "ffn", "coupled, dense")
        need(lambda n: 0 < n < math.inf, "epochs", "a number above 0")
        need(whole(1), "batch_size", "1 or more")
        need(whole(1), "accumulate", "1 or more")
        need(lambda rate: 0 < rate < math.inf, "lr", "a number above 0")
        need(whole(3), "max_length", "3 or more")
        need(lambda name: name in ("none", "balanced"), "class_weights", "none, balanced")
        need(lambda name: name in DEVICES, "device", ", ".join(DEVICES))
        need(lambda name: name in DTYPES, "dtype", ", ".join(DTYPES))
        need(lambda b: 0.0 < b <= 1.0, "warm_start", "a number in (0, 1]")
        need(lambda share: 0.0 <= share <= 1.0, "settle", "a number in [0, 1]")
        need(lambda name: name in ("auto", *TASKS), "task", ", ".join(("auto", *TASKS)))
        need(lambda tokens: tokens == 0 or whole(3)(tokens), "crop", "0, or 3 or more")
        need(whole(0), "save_every", "0 or more")
        need(whole(0, 2**32 - 1), "seed", "0 to 2^32 - 1")
        need(lambda three: three is None or (len(three) == 3 and all(map(whole(1), three))), "limit",
             "three whole numbers above 0: rows of train, validation and test")  # fmt: skip
        if self.dense and self.train_budget is not None:
            problems.append(
                f"--train-budget: got {shown(self.train_budget)}, but dense training takes all of --epochs; leave it"
                " out"
            )
        if problems:
            raise ConfigError(problems)

    def check_resumed(self, told: Mapping[str, Any]) -> None:
        """Raises `ConfigError` with every setting that is not the one an interrupted run was `told` (its `as_json`).

        Most of them would have no effect on what a checkpoint holds, and the others would make the run another one.
        """
        now = json.loads(json.dumps(self.as_json()))
        problems = [
            f"--{name.replace('_', '-')}: got {shown(now[name])}, but the run was started with {shown(told[name])}"
            for name in now
            if name in told and name not in MAY_CHANGE and not _same(now[name], told[name])
        ]
        if problems:
            fix = "--resume goes on with the settings of the run: give the same, or start anew in another --out"
            raise ConfigError([*problems[:-1], f"{problems[-1]}; {fix}"])

    def as_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self) | {"out": str(self.out)}


def _same(one: Any, other: Any) -> bool:
    """True for equal settings, and for two ways to write the path of one file or folder."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    paths = Path(one), Path(other)
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])
