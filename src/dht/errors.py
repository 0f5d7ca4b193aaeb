"""Errors that a user sees: one line that says what is wrong, where, what was got, what is allowed, how to fix it."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AssetError",
    "CheckpointError",
    "ConfigError",
    "DHTError",
    "DataError",
    "NonFiniteError",
    "listed",
    "shown",
]


class DHTError(ValueError):
    r"""An error a user can act on; `str(error)` is always one line.

    The command line prints it as `dht: error: ...` and leaves with exit status 2. Broken invariants of our own are
    `assert`s, never this.

    Args:
        message: what is wrong, where, got, allowed, how to fix. Line breaks in it (from data or from another
            library's message) become spaces.

    >>> str(DHTError("budget is 1.5;\n allowed: (0, 1]"))
    'budget is 1.5; allowed: (0, 1]'
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(part for line in message.splitlines() if (part := line.strip())))


class DataError(DHTError):
    """Data that cannot be used: a missing file or column, a broken line, a label that no class has."""


class AssetError(DHTError):
    """A named model or data set that cannot be fetched, verified or stored."""


class CheckpointError(DHTError):
    """A saved run that is corrupt, half-written, or written in a newer format."""


class NonFiniteError(DHTError):
    """A NaN or an infinity where the bandits need a number; nothing was learned from it."""


class ConfigError(DHTError):
    """Settings that cannot work; every problem that was found is in the one message.

    Args:
        problems: one sentence each, or a single one as a string.

    >>> str(ConfigError(["budget is 0; allowed: (0, 1]", "epochs is -1; allowed: 1 or more"]))
    '2 problems: (1) budget is 0; allowed: (0, 1] (2) epochs is -1; allowed: 1 or more'
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, "a ConfigError without a problem"
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            numbered = " ".join(f"({i}) {problem}" for i, problem in enumerate(self.problems, start=1))
            super().__init__(f"{len(self.problems)} problems: {numbered}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)


def shown(value: object, limit: int = 60) -> str:
    """The value as it goes into an error message: `repr`, printable in any terminal, cut at `limit` characters.

    >>> shown("x" * 100, limit=10)
    "'xxxxxx..."
    """
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(values: Iterable[object], limit: int = 10) -> str:
    """The values as an error message lists them: at most `limit`, then how many there are in all.

    >>> listed(["a", "b"]), listed(range(30), limit=2), listed([])
    ("'a', 'b'", '0, 1, ... (30 in all)', 'none')
    """
    values = list(values)
    text = ", ".join(shown(value, 40) for value in values[:limit])
    return f"{text}, ... ({len(values)} in all)" if len(values) > limit else text or "none"
