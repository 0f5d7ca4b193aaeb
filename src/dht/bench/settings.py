"""What a benchmark is told: which rows of the speed table to measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import DEVICES, DTYPES
from ..errors import ConfigError

WHATS = ("inference", "training", "whole", "bandits")
"""What can be timed; `inference` and `training` (a step) unless asked."""
PLANS = ("depth", "heads", "both", "policy", "worst")
MIX = "mix"
LONGEST = 512


@dataclass(frozen=True)
class BenchSettings:
    """Settings of `dht bench`; every combination of the lists is a row.

    Args:
        data: where the texts come from, as for `dht train`; None = a run's own data, else `vader`.
        models: encoders or folders of trained runs, as `--model` names them; empty = `minilm` on a CPU and, on a GPU,
            BERT's base and large sizes with random weights.
        fractions: of dense FLOPs, each in (0, 1].
        batch: rows a batch; empty = 1, 32, 128 on a CPU and 128, 512 on a GPU.
        training_batch: the same for training steps; empty = 32 on a CPU and those of `batch` on a GPU.
        tokens: tokens a row, or "mix": rows as the data has them, in random order.
        dtype: "float32", "bfloat16" (autocast; of inference on a GPU the weights themselves); empty = both on a CPU,
            bfloat16 on a GPU.
        what: some of `WHATS`: a forward, a training step, a whole training, the bandits alone. plans: some of `PLANS`.
        device: "auto", "cpu" or "cuda".
        repeats: timed runs of each batch; medians are reported.
        seed: of the rows drawn, the head sets and random weights.
    """

    data: str | None = None
    models: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (1.0, 0.5, 0.26, 0.12)
    batch: tuple[int, ...] = ()
    training_batch: tuple[int, ...] = ()
    tokens: tuple[int | str, ...] = (32, 128, MIX)
    dtype: tuple[str, ...] = ()
    what: tuple[str, ...] = WHATS[:2]
    plans: tuple[str, ...] = PLANS
    device: str = "auto"
    repeats: int = 5
    seed: int = 0
    text_column: str | None = None
    label_column: str | None = None
    problems: tuple[str, ...] = field(default=(), repr=False)

    def check(self) -> None:
        """Raises `ConfigError` with every problem."""
        problems = list(self.problems)

        def each(option: str, values: tuple[Any, ...], ok: Any, allowed: str) -> None:
            problems.extend(f"--{option}: got {value}, allowed: {allowed}" for value in values if not ok(value))

        each("fractions", self.fractions, lambda f: 0.0 < f <= 1.0, "numbers in (0, 1], e.g. 1.0,.5,.26,.12")
        each("batch", self.batch, lambda n: n >= 1, "1 or more, e.g. 1,32,128")
        each("training-batch", self.training_batch, lambda n: n >= 1, "1 or more, e.g. 32")
        allowed = f"3 to {LONGEST}, or {MIX}"
        each("tokens", self.tokens, lambda t: t == MIX or (isinstance(t, int) and 3 <= t <= LONGEST), allowed)
        each("dtype", self.dtype, DTYPES.__contains__, ", ".join(DTYPES))
        each("what", self.what, WHATS.__contains__, ", ".join(WHATS))
        each("plans", self.plans, PLANS.__contains__, ", ".join(PLANS))
        each("device", (self.device,), DEVICES.__contains__, ", ".join(DEVICES))
        each("repeats", (self.repeats,), lambda n: n >= 5, "5 or more: fewer make no median worth printing")
        each("seed", (self.seed,), lambda n: 0 <= n < 2**32, "0 to 2^32 - 1")
        needed = ("fractions", "tokens", "what", "plans")
        problems += [f"--{name}: got an empty list" for name in needed if not getattr(self, name)]
        if problems:
            raise ConfigError(problems)

    def as_json(self) -> dict[str, Any]:
        """The settings as plain JSON values; folders by their names, so that a result tells nothing of the machine."""
        kept = {name: value for name, value in asdict(self).items() if name != "problems"}
        data = None if self.data is None else short_name(self.data)
        return kept | {"data": data, "models": [short_name(model) for model in self.models]}


def short_name(name: str) -> str:
    """The last part of a folder's path; any other name (embedded, of a hub) as it is."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def parse(**options: Any) -> BenchSettings:
    """Settings from the command line's comma-separated lists.

    What is no number is kept as a problem for `BenchSettings.check`, so that all problems are told at once.

    >>> parse(batch="1,32", tokens="32,mix").tokens
    (32, 'mix')
    """
    problems: list[str] = []

    def items(option: str, convert: Any, kind: str) -> tuple[Any, ...]:
        found = []
        for part in filter(None, (part.strip() for part in (options.pop(option, None) or "").split(","))):
            try:
                found.append(convert(part))
            except ValueError:
                problems.append(f"--{option.replace('_', '-')}: got {part!r}, allowed: {kind}")
        return tuple(found)

    lists: dict[str, Any] = {
        "models": items("models", str, ""),
        "fractions": items("fractions", float, "numbers in (0, 1], e.g. 1.0,.5,.26,.12"),
        "batch": items("batch", int, "whole numbers, e.g. 1,32,128"),
        "training_batch": items("training_batch", int, "whole numbers, e.g. 32"),
        "tokens": items("tokens", lambda part: part if part == MIX else int(part), f"whole numbers or {MIX}"),
        "dtype": items("dtype", str, ""),
        "what": items("what", str, ""),
        "plans": items("plans", str, ""),
    }
    return BenchSettings(**options, **lists, problems=tuple(problems))
