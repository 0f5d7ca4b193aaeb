"""Labelled texts from a folder, an embedded data set or a Hugging Face data set, checked row by row.

Every error names the file and the line. Class indices are decided by the train split (integers in numeric order, names
in alphabetical order), or by a trained model's class names when they are given.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dht._columns import ColumnChoice, text_columns
from dht._labels import (
    EMBEDDING,
    INTEGER,
    MULTI,
    NUMBER_NAME,
    REGRESSION,
    SINGLE,
    TASKS,
    TOKEN,
    are_binary,
    inferred_task,
    label_list,
    label_name,
    label_number,
    list_names,
    no_label,
    tag_list,
    task_note,
    word_list,
)
from dht._rows import clean_text, decode_line, parse_object, read_lines
from dht._sources import SPLITS, Source, open_source
from dht.errors import DataError, listed, shown

__all__ = [
    "SPLITS",
    "Split",
    "TextData",
    "balanced_weights",
    "cut_validation",
    "load_data",
    "read_texts",
    "split_of",
    "stratified_order",
]

VALIDATION_FRACTION = 0.1
RARE = 0.1
"""A class this small beside the most frequent one is told of."""
STREAM_ROWS = 100_000
"""Rows taken of each streamed split, unless another number is asked for."""

Text = str | tuple[str, str] | list[str]
"""A text, the two texts of a pair, or the words of a row that is to be tagged."""


@dataclass(frozen=True)
class Split:
    """Texts and their labels; of pairs, also the second texts; of rows of words, also the words.

    A label is the index of its class in `TextData.label_names`; with several labels a row, a list of 1.0 for each class
    that the row has and 0.0 for the others; of a regression, the number; of words, a list with each word's tag.
    """

    texts: list[str]
    labels: list[Any]
    pairs: list[str] | None = None
    words: list[list[str]] | None = None

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.labels)
        assert self.pairs is None or len(self.pairs) == len(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def inputs(self) -> list[Text]:
        """Each row as `dht.predict.predict` takes it: a text, both texts of a pair, or its words."""
        if self.words is not None:
            return list(self.words)
        return list(self.texts) if self.pairs is None else list(zip(self.texts, self.pairs, strict=True))

    @property
    def keys(self) -> list[str]:
        """What makes a row the same as another: its text, or both texts of a pair."""
        if self.pairs is None:
            return self.texts
        return [f"{text}\0{pair}" for text, pair in zip(self.texts, self.pairs, strict=True)]

    def rows(self, wanted: Iterable[int]) -> Split:
        """The rows with these numbers."""
        wanted = list(wanted)
        pairs = None if self.pairs is None else [self.pairs[row] for row in wanted]
        words = None if self.words is None else [self.words[row] for row in wanted]
        return Split([self.texts[row] for row in wanted], [self.labels[row] for row in wanted], pairs, words)


def split_of(texts: Sequence[Text], labels: list[Any], where: str) -> Split:
    """The texts or pairs with their labels.

    Args:
        where: begins the message.

    Raises:
        DataError: both kinds of texts.
    """
    singles = [text for text in texts if isinstance(text, str)]
    if len(singles) == len(texts):
        return Split(singles, labels)
    if singles:
        raise DataError(f"{where}: {len(singles)} single texts among {len(texts) - len(singles)} pairs; give one kind")
    return Split([text[0] for text in texts], labels, [text[1] for text in texts])


@dataclass(frozen=True)
class TextData:
    """A data set ready for a tokenizer; a split that was not asked for is None.

    `notes` says what the user should know: columns that were inferred, a validation split that was made, a class that
    is rare, texts that two splits share.
    """

    name: str
    train: Split | None
    validation: Split | None
    test: Split | None
    label_names: list[str]
    notes: list[str] = field(default_factory=list)
    task: str = SINGLE


@dataclass(frozen=True)
class _Checked:
    """A split whose rows were checked but whose labels are still names, sets or lists of names, or numbers."""

    texts: list[str]
    pairs: list[str] | None
    names: list[Any]
    lines: list[int]
    task: str
    width: int = 0  # of lists of 0 and 1, their length
    words: list[list[str]] | None = None

    @property
    def distinct(self) -> set[str]:
        return set(self.names) if self.task == SINGLE else {name for names in self.names for name in names}

    @property
    def integers(self) -> bool:
        return all(INTEGER.fullmatch(name) for name in self.distinct)


def load_data(
    source: Any,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    splits: Sequence[str] = SPLITS,
    optional: Sequence[str] = (),
    label_names: list[str] | None = None,
    stream_rows: int = STREAM_ROWS,
    task: str = "single",
    limit: Sequence[int] | None = None,
) -> TextData:
    """The splits asked for, checked, with labels as class indices.

    Args:
        source: an embedded name (`vader`), a folder holding `train`, `validation`, `test` as .jsonl[.gz], .csv, .tsv,
            .parquet, .arrow, .feather or .ipc, a folder that `save_to_disk` wrote, a Hugging Face dataset id
            (`owner/name`, or `owner/name:config`), or a `Dataset`, `IterableDataset`, or dict of them by split (one
            alone is the train split). An embedded name goes before a folder of that name: write `./vader` for the
            folder.
        text_column: the column that holds the text; two names with a comma between for sentence pairs; None = inferred
            from well-known names, which `notes` says.
        label_column: the column that holds the label, an integer or a name; None = inferred likewise.
        seed: seeds the validation split, should one have to be made.
        splits: the splits that must be there. When there is no validation split, one is made of 10% of train,
            stratified by class, no text on both sides, and `notes` says so.
        optional: splits that are read when they are there; none is made.
        label_names: the classes of a trained model, in its order. Labels are mapped onto them.
        stream_rows: rows taken of each split that is streamed; `notes` says how many there were.
        task: what labels are: "single" (one class), "multi" (a list of classes, or of 0 and 1), "regression" (a
            number), "embedding" (none needed), "token" (a list with a tag for each word; texts are lists of words) or
            "auto" (any of these but an embedding, inferred from the first split that is read, which `notes` says); a
            `problem_type` works too.
        limit: rows kept of train, validation and test at most; which ones, a hash of their texts decides, so it is the
            same draw everywhere, and `notes` tells it.

    Returns:
        The data; splits neither needed nor optional are None.

    Raises:
        DataError: anything that is missing or broken; the message names file and line.
    """
    assert set(splits) | set(optional) <= set(SPLITS), "unknown split"
    if task not in ("auto", *TASKS, *TASKS.values()):
        raise DataError(f"task: got {shown(task)}, allowed: {', '.join(('auto', *TASKS))}")
    problem = TASKS.get(task, task)
    tagged = None if task == "auto" else problem == TOKEN
    choice = ColumnChoice(text_column, label_column, labelled=problem != EMBEDDING, tagged=tagged)
    src = open_source(source, choice, stream_rows)
    make_validation = "validation" in splits and "validation" not in src.rows and "train" in src.rows
    for split in splits:
        if split not in src.rows and not (split == "validation" and make_validation):
            raise DataError(f"no {split} split in {src.name}: {src.missing}")
    wanted = [s for s in SPLITS if s in src.rows and (s in splits or s in optional)]
    # Train decides which classes there are, even when only another split was asked for.
    train_decides = "train" in src.rows and (make_validation or not label_names)
    read = [s for s in SPLITS if s in wanted or (s == "train" and train_decides)]

    if task == "auto":
        problem = _first_task(src, read)
    checked = {split: _check_rows(src, split, problem) for split in read}
    if problem == MULTI:
        checked = _named_sets(src, checked, label_names)
    notes = [note for note in (src.choice.note, *src.notes) if note]
    names, indices = _classes(src, checked, label_names, notes)
    if task == "auto":
        notes += [note for note in (task_note(problem, names),) if note]
    done = {split: _indexed(src, split, rows, names, indices) for split, rows in checked.items()}
    if make_validation:
        done["train"], done["validation"] = cut_validation(done["train"], seed, src.name)
        notes.append(_cut_note(done["train"], done["validation"], seed))
        wanted += [split for split in ("validation",) if split not in wanted]
    result = {split: done[split] for split in wanted}
    if "train" in result and problem == SINGLE:
        _note_rare_classes(result["train"], names, notes)
    _note_shared_texts(result, notes)
    if limit is not None:
        for split, rows in zip(SPLITS, limit, strict=True):
            if split in result and len(result[split]) > rows:
                notes.append(f"{split}: {rows} of {len(result[split])} rows, drawn by a hash of their texts")
                result[split] = drawn(result[split], rows)
    return TextData(src.name, result.get("train"), result.get("validation"), result.get("test"), names, notes, problem)


def read_texts(
    source: str | Path | Iterable[str] | Iterable[bytes], *, text_column: str | None = None, tagged: bool = False
) -> Iterator[Text]:
    r"""The texts to predict, one a line, as they arrive: a plain text, or a JSON object that holds it or a pair.

    Args:
        source: a path (`.gz` is unpacked), `-` for standard input, or lines.
        text_column: the key of the text in a JSON object, as for `load_data`.
        tagged: True for lists of words: an object's `tokens`, or a plain text split at white space.

    Raises:
        DataError: a line is empty, not UTF-8, starts with `{` and is not a JSON object, or its object holds no text.

    >>> list(read_texts(["good\n", '{"text": "bad"}']))
    ['good', 'bad']
    """
    name, lines = _text_lines(source)
    for number, raw in enumerate(lines, start=1):
        where = f"{name} line {number}"
        line = (decode_line(raw, where) if isinstance(raw, bytes) else str(raw)).rstrip("\r\n")
        if number == 1:
            line = line.removeprefix("\ufeff")
        if not line.lstrip().startswith("{"):
            text = clean_text(line, where)
            yield text.split() if tagged else text
            continue
        row = parse_object(line, f"{where} starts with '{{'")
        keys = [key for key in text_columns(list(row), text_column, where, tagged=tagged) if key]
        for key in keys:
            if key not in row:
                raise DataError(f"{where}: the object has no {shown(key)}; keys there: {listed(row)}")
        if tagged:
            yield word_list(row[keys[0]], where)
            continue
        texts = [clean_text(row[key], where) for key in keys]
        yield texts[0] if len(texts) == 1 else (texts[0], texts[1])


def stratified_order(texts: Sequence[str], labels: Sequence[int], seed: int) -> list[list[int]]:
    """For each class, its row numbers in a seeded shuffled order that depends on the texts alone.

    The order is that of SHA-256 over seed and text: it needs no generator state and is the same on every machine and
    version; equal texts stand side by side.

    Args:
        texts: one text a row.
        labels: the class index of each row.
        seed: another seed, another order.

    Returns:
        One list of row numbers a class, class 0 first.
    """
    keys = [hashlib.sha256(f"{seed}\0{text}".encode()).digest() for text in texts]
    classes: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
    for row in sorted(range(len(texts)), key=lambda row: (keys[row], row)):
        classes[labels[row]].append(row)
    return classes


def drawn(split: Split, rows: int) -> Split:
    """At most `rows` of a split, in its order; the same ones on every machine and with every seed."""
    order = stratified_order(split.keys, [0] * len(split), 0)
    return split.rows(sorted(order[0][:rows])) if order else split


def cut_validation(train: Split, seed: int, name: str, fraction: float = VALIDATION_FRACTION) -> tuple[Split, Split]:
    """What is left of a train split, and the validation split cut from it: stratified, no text on both sides.

    Args:
        seed: another seed, another cut.
        name: of the data, for the message.
        fraction: of each class, in (0, 1).

    Raises:
        DataError: no class has two different texts.
    """
    keys = train.keys
    taken: set[int] = set()
    single = all(isinstance(label, int) for label in train.labels)
    for rows in stratified_order(keys, train.labels if single else [0] * len(train), seed):
        size = max(1, round(fraction * len(rows)))
        while size < len(rows) and keys[rows[size]] == keys[rows[size - 1]]:
            size += 1  # equal texts stay on one side
        if size < len(rows):
            taken.update(rows[:size])
    if not taken:
        kinds = f", {len(set(train.labels))} classes" if single else ""
        raise DataError(
            f"{name}: too few different train texts ({len(train)} rows{kinds}) to take a validation split from; add a "
            "validation file or more train rows"
        )
    return (
        train.rows(row for row in range(len(train)) if row not in taken),
        train.rows(row for row in range(len(train)) if row in taken),
    )


def balanced_weights(labels: Sequence[int], classes: int) -> list[float]:
    """What a row of each class counts so that all classes count alike and the mean row 1; a class without rows, 0.

    >>> balanced_weights([0, 0, 0, 1], 2)
    [0.6666666666666666, 2.0]
    """
    counts = Counter(labels)
    present = sum(1 for count in counts.values() if count)
    return [len(labels) / (present * counts[index]) if counts[index] else 0.0 for index in range(classes)]


def _first_task(src: Source, read: Sequence[str]) -> str:
    """The task that the rows of the first split are for; they are kept for the reading proper."""
    if not read:
        return SINGLE
    rows = src.rows[read[0]] = list(src.rows[read[0]])
    return TOKEN if src.choice.tagged else inferred_task([row.text for row in rows], [row.label for row in rows])


def _named_sets(src: Source, checked: dict[str, _Checked], label_names: list[str] | None) -> dict[str, _Checked]:
    """The splits with sets of names in place of raw lists; all splits together show what the lists hold."""
    lists = [row for rows in checked.values() for row in rows.names]
    binary = are_binary(lists, len(label_names) if label_names else None)
    done = {}
    for split, rows in checked.items():
        where = (f"{src.where[split]} {line}" for line in rows.lines)
        names = [list_names(row, binary, place) for row, place in zip(rows.names, where, strict=True)]
        done[split] = replace(rows, names=names, width=len(lists[0]) if binary else 0)
    return done


def _check_rows(src: Source, split: str, task: str) -> _Checked:
    if task == TOKEN:
        return _check_tagged(src, split)
    read = {SINGLE: label_name, MULTI: label_list, REGRESSION: label_number, EMBEDDING: no_label}[task]
    texts: list[str] = []
    names: list[Any] = []
    lines: list[int] = []
    pairs: list[str] = []
    typed: dict[bool, int] = {}  # is the label an int (or a str) -> first line
    for line, text, label, pair in src.rows[split]:
        where = f"{src.where[split]} {line}"
        texts.append(clean_text(text, where))
        if src.choice.pairs:
            pairs.append(clean_text(pair, where))
        names.append(read(label, where))
        lines.append(line)
        first = typed.setdefault(isinstance(label, int), line)
        if task == SINGLE and len(typed) == 2 and first == line:
            raise DataError(
                f"{where}: label {shown(label)} is {'an integer' if isinstance(label, int) else 'a string'}, but "
                "earlier labels are not; use integers or names throughout"
            )
    _require_rows(src, split, len(texts))
    return _Checked(texts, pairs or None, names, lines, task)


def _check_tagged(src: Source, split: str) -> _Checked:
    words: list[list[str]] = []
    names: list[list[str]] = []
    lines: list[int] = []
    integers: bool | None = None
    for line, text, label, _ in src.rows[split]:
        where = f"{src.where[split]} {line}"
        words.append(word_list(text, where))
        tags = tag_list(label, where, len(words[-1]))
        for tag in tags:
            integers = isinstance(tag, int) if integers is None else integers
            if isinstance(tag, int) != integers:
                raise DataError(
                    f"{where}: tag {shown(tag)}: some tags are integers, others names; use either throughout"
                )
        names.append([label_name(tag, where) for tag in tags])
        lines.append(line)
    _require_rows(src, split, len(words))
    return _Checked([" ".join(row) for row in words], None, names, lines, TOKEN, words=words)


def _require_rows(src: Source, split: str, rows: int) -> None:
    if not rows:
        raise DataError(f"{src.where[split].rsplit(' ', 1)[0]}: no rows; the {split} split needs at least one")


def _classes(
    src: Source, checked: dict[str, _Checked], label_names: list[str] | None, notes: list[str]
) -> tuple[list[str], dict[str, int]]:
    """The class names in order of index, and the index of every label that may occur."""
    task, width = next(((rows.task, rows.width) for rows in checked.values()), (SINGLE, 0))
    if task == EMBEDDING:
        return [EMBEDDING], {}
    if "train" in checked:
        _require_variety(src, checked["train"])
    if task == REGRESSION:
        return [NUMBER_NAME], {}
    if label_names or src.declared:
        names = list(label_names or src.declared or [])
    else:
        decisive = checked.get("train") or next(iter(checked.values()))
        distinct = {str(i) for i in range(width)} or decisive.distinct
        names = sorted(distinct, key=int) if width or decisive.integers else sorted(distinct)
        if "train" not in checked:
            notes.append(f"no train split: the classes are those of {next(iter(checked))}: {', '.join(names)}")
    if width and width != len(names):
        raise DataError(f"{src.name}: labels are lists of {width} zeros and ones, but there are {len(names)} classes")
    indices = {name: index for index, name in enumerate(names)}
    if (
        (label_names or width)
        and all(rows.integers for rows in checked.values())
        and not any(INTEGER.fullmatch(name) for name in names)
    ):
        indices = {str(index): index for index in range(len(names))}
        notes.append(f"integer labels are read as positions in the model's classes: {', '.join(names)}")
    return names, indices


def _require_variety(src: Source, train: _Checked) -> None:
    where = src.where["train"].rsplit(" ", 1)[0]
    if train.task == MULTI and not train.distinct:
        raise DataError(f"{where}: no row has a label; training needs one class or more")
    if train.task == TOKEN and len(train.distinct) < 2:
        raise DataError(f"{where}: all words have the tag {shown(train.names[0][0])}; training needs two tags or more")
    if train.task not in (MULTI, TOKEN) and len(set(train.names)) < 2:
        needed = "two classes or more" if train.task == SINGLE else "numbers that differ"
        raise DataError(
            f"{where}: all {len(train.names)} rows have the label {shown(train.names[0])}; training needs {needed}"
        )


def _indexed(src: Source, split: str, rows: _Checked, names: list[str], indices: dict[str, int]) -> Split:
    if rows.task in (REGRESSION, EMBEDDING):
        return Split(rows.texts, rows.names, rows.pairs)
    labels: list[Any] = []
    for line, said in zip(rows.lines, rows.names, strict=True):
        several = rows.task in (MULTI, TOKEN)
        name = next((name for name in (said if several else (said,)) if name not in indices), None)
        if name is not None:
            hint = " (-1 marks hidden labels: use another split)" if name == "-1" else ""
            raise DataError(
                f"{src.where[split]} {line}: label {shown(name)} is not a known class{hint}; "
                f"allowed: {listed(indices)}; fix the label or train with that class"
            )
        if rows.task == TOKEN:
            labels.append([indices[name] for name in said])
        elif several:
            on = {indices[name] for name in said}
            labels.append([float(i in on) for i in range(len(names))])
        else:
            labels.append(indices[said])
    return Split(rows.texts, labels, rows.pairs, rows.words)


def _cut_note(train: Split, validation: Split, seed: int) -> str:
    return (
        f"no validation split: made one of {len(validation)} of the {len(train) + len(validation)} train rows "
        f"({VALIDATION_FRACTION:.0%} of each class, seed {seed}); {len(train)} are left to train on"
    )


def _note_rare_classes(train: Split, names: list[str], notes: list[str]) -> None:
    counts = Counter(train.labels)
    least, most = (pick(range(len(names)), key=lambda index: counts[index]) for pick in (min, max))
    if 0 < counts[least] < RARE * counts[most]:
        notes.append(
            f"classes are unbalanced: {shown(names[least])} has {counts[least]} train rows, {shown(names[most])} "
            f"{counts[most]}; --class-weights balanced makes every class count alike, and macro F1 shows the rare ones"
        )


def _note_shared_texts(splits: dict[str, Split], notes: list[str]) -> None:
    if "train" not in splits:
        return
    seen = set(splits["train"].keys)
    for name, split in splits.items():
        shared = sum(key in seen for key in split.keys) if name != "train" else 0
        if shared:
            notes.append(f"{shared} of the {len(split)} {name} texts are also in train")


def _text_lines(source: str | Path | Iterable[str] | Iterable[bytes]) -> tuple[str, Iterable[str] | Iterable[bytes]]:
    if isinstance(source, str) and source == "-":
        return "standard input", getattr(sys.stdin, "buffer", sys.stdin)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            reason = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(
                f"{path} {reason}; give a file with a text or a JSON object a line, or - for standard input"
            )
        return str(path), read_lines(path)
    return "input", source
