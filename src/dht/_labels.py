"""What the label column holds: one class a row, a list of classes, or a number; and how each row's label is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from dht._rows import without_surrogates
from dht.errors import DataError, shown

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
EMBEDDING, TOKEN = "embedding", "token_classification"
TASKS = {"single": SINGLE, "multi": MULTI, "regression": REGRESSION, "embedding": EMBEDDING, "token": TOKEN}
"""Names of the tasks on the command line -> `problem_type`, as `transformers` has it (the last two have none there)."""
IGNORED = -100
"""In place of a tag, where a token has none; as in `transformers`."""
NUMBER_NAME = "value"
"""The one output of a regression."""

INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?")


def inferred_task(texts: Sequence[object], labels: Sequence[object]) -> str:
    """The `problem_type` of raw rows.

    Lists of words with lists of labels are tags; other lists are several labels; numbers, not all of them whole, are a
    regression.
    """
    if labels and all(isinstance(value, list) for value in (*texts, *labels)):
        return TOKEN
    if any(_as_list(label) is not None for label in labels):
        return MULTI
    numbers = [_as_number(label) for label in labels]
    known = [number for number in numbers if number is not None]
    if len(known) == len(numbers) and any(math.isfinite(number) and number != int(number) for number in known):
        return REGRESSION
    return SINGLE


def task_note(task: str, names: Sequence[str]) -> str | None:
    """What was inferred, in one line; None of the usual case, one class a row."""
    if task == SINGLE:
        return None
    what = {
        MULTI: f"labels are lists of {len(names)} classes",
        TOKEN: f"rows are lists of words, with {len(names)} kinds of tags",
        REGRESSION: "labels are numbers with fractions",
    }[task]
    short = next(short for short, name in TASKS.items() if name == task)
    return f"task: {short} ({what}; inferred; --task names another)"


def label_name(label: object, where: str) -> str:
    """The label as a class name; integers in their shortest form.

    Raises:
        DataError: it is neither an integer nor a name.
    """
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    if isinstance(label, str):
        name = label.strip()
        if INTEGER.fullmatch(name):
            return str(int(name))
        if name and not DECIMAL.fullmatch(name):
            return name.encode("utf-8", "replace").decode()
    got = "no label" if label is None or label == "" else f"label {shown(label)}"
    raise DataError(f"{where}: {got}; allowed: an integer or a class name; fix or remove the row")


def label_number(label: object, where: str) -> float:
    """The label as a finite number.

    Raises:
        DataError: it is none.
    """
    number = _as_number(label)
    if number is None or not math.isfinite(number):
        got = "no label" if label is None or label == "" else f"label {shown(label)}"
        raise DataError(f"{where}: {got}; allowed for a regression: a finite number; fix or remove the row")
    return number


def no_label(label: object, where: str) -> float:
    """Nothing: an embedding needs no label."""
    return 0.0


def label_list(label: object, where: str) -> list[str | int | float]:
    """The label as a list of raw class labels: a list, one written as JSON, or names with commas between.

    Raises:
        DataError: it is none, or holds something that is no class label.
    """
    found = _as_list(label)
    if found is None and isinstance(label, str) and label.strip():
        found = [part.strip() for part in label.split(",")]
    if found is None:
        got = "no label" if label is None or label == "" else f"label {shown(label)}"
        raise DataError(f'{where}: {got}; allowed for several labels: a list, such as [] or ["a", "b"]')
    for part in found:
        whole = isinstance(part, float) and part in (0.0, 1.0)
        if not whole:
            label_name(part, where)
    return found


def tag_list(label: object, where: str, words: int) -> list[str | int | float]:
    """The tags of a row of so many words: a list, or one written as JSON.

    Raises:
        DataError: it is none, holds something that is no tag, or is not as long as the words.
    """
    found = _as_list(label)
    if found is None:
        got = "no tags" if label is None or label == "" else f"tags {shown(label)}"
        raise DataError(f'{where}: {got}; allowed: a list with a tag for each word, such as ["B-PER", "O"]')
    if len(found) != words:
        raise DataError(f"{where}: {words} words, but {len(found)} tags; give each word one tag")
    for tag in found:
        label_name(tag, where)
    return found


def word_list(words: object, where: str) -> list[str]:
    """The words of a row as they are, lone surrogates as U+FFFD: a list, or one written as JSON.

    Raises:
        DataError: it is none, holds something else than strings, or none that is more than white space.
    """
    found = _as_list(words)
    if found is None or not all(isinstance(word, str) for word in found):
        raise DataError(f'{where}: words {shown(words)}; allowed: a list of strings, such as ["Ada", "wrote"]')
    if not any(str(word).strip() for word in found):
        raise DataError(f"{where}: no words (got {shown(words)}); write some there or remove the row")
    return [without_surrogates(word, where) for word in found]


def are_binary(lists: Sequence[Sequence[object]], classes: int | None = None) -> bool:
    """True if the lists hold a 0 or a 1 for every class, False if they hold classes.

    Lists of classes 0 and 1 look alike, but they name no class twice, and in order: one that does not settles it, and
    so does a number for every class.

    Args:
        classes: how many there are, if that is known.
    """
    lengths = {len(row) for row in lists}
    if len(lengths) != 1 or not all(not isinstance(x, str) and x in (0, 1) for row in lists for x in row):
        return False
    return lengths == {classes} or any(list(row) != sorted(set(row)) for row in lists)  # type: ignore[type-var]


def list_names(label: Sequence[object], binary: bool, where: str) -> tuple[str, ...]:
    """The names of the classes in a list; of a list of 0 and 1, the places of the ones.

    Raises:
        DataError: a class is named twice, or by a fraction.
    """
    if binary:
        return tuple(str(i) for i, on in enumerate(label) if on)
    names = tuple(label_name(part, where) for part in label)
    if len(set(names)) < len(names):
        raise DataError(f"{where}: label {shown(list(label))} names a class twice; name each once")
    return names


def _as_list(label: object) -> list[str | int | float] | None:
    if isinstance(label, str) and label.lstrip().startswith("["):
        try:
            label = json.loads(label)
        except (ValueError, RecursionError):
            return None
    if hasattr(label, "tolist") and not isinstance(label, str):
        label = label.tolist()
    return list(label) if isinstance(label, list | tuple) else None


def _as_number(label: object) -> float | None:
    if isinstance(label, bool):
        return None
    if isinstance(label, str):
        label = label.strip()
        return float(label) if DECIMAL.fullmatch(label) else None
    try:
        return float(label) if isinstance(label, int | float) else None
    except OverflowError:
        return None
