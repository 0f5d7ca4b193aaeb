"""Which columns hold the text (or the two of a pair) and the label: as given, or inferred from well-known names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dht.errors import DataError, listed, shown

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
)
"""Column names of sentence pairs, in upper or lower case."""
TEXTS = ("sentence", "content", "review", "comment", "tweet", "document", "question", "query", "utterance", "message")
"""Column names of single texts, should none be called `text`."""
WORDS = ("words",)
"""Column names of the words of a row, should none be called `tokens`."""
TAGS = ("ner_tags", "labels")
"""Column names of their tags, should none be called `tags`."""
LABELS = ("labels", "target", "class", "category", "sentiment", "intent", "emotion", "stars", "rating", "gold_label")
"""Column names of labels, should none be called `label`."""


class Columns(NamedTuple):
    """Names of the columns: the text, its second half (None = single texts) and the label."""

    text: str
    pair: str | None
    label: str


class ColumnChoice:
    """The columns of one data source: the first header that is seen decides, later ones must have the same columns.

    Args:
        text: the text column, two names with a comma between for sentence pairs, or None = inferred.
        label: the label column, or None = inferred.
        labelled: False if no label is needed: the text stands in for it.
        tagged: True if texts are lists of words and labels lists of tags; None = if the columns are called so.
    """

    def __init__(
        self, text: str | None = None, label: str | None = None, labelled: bool = True, *, tagged: bool | None = False
    ) -> None:
        self._text, self._label, self._labelled, self._tagged = text, label, labelled, tagged
        self._found: Columns | None = None

    def of(self, columns: Sequence[str], where: str) -> Columns:
        """The columns to read of a file or table that has `columns`.

        Raises:
            DataError: one is missing or there twice, or more than one could be meant.
        """
        found = self._found
        if found is None:
            if self._tagged is None:
                self._tagged = self._text is None and look_tagged(columns, self._label)
            text, pair = text_columns(columns, self._text, where, tagged=self.tagged)
            label = text
            if self.tagged:
                label = self._label or _single(columns, "tags", TAGS, where, "label")
            elif self._labelled:
                label = self._label or _single(columns, "label", LABELS, where)
            found = Columns(text, pair, label)
        for name, option in ((found.text, "text"), (found.pair, "text"), (found.label, "label")):
            if name is not None:
                _require(columns, name, option, where)
        self._found = found
        return found

    @property
    def tagged(self) -> bool:
        """True if the columns hold lists of words and their tags, as was said or as they are called."""
        return bool(self._tagged)

    @property
    def pairs(self) -> bool:
        """True if the rows read so far hold pairs of texts."""
        return self._found is not None and self._found.pair is not None

    @property
    def note(self) -> str | None:
        """What was inferred, in one line; None if nothing was, or just `text` and `label`."""
        found = self._found
        given = self._text and (self._label or not self._labelled)
        usual = (("text", None, "label"), ("text", None, "text"), ("tokens", None, "tags"))
        if found is None or given or found in usual:
            return None
        pair = f" with {shown(found.pair)}" if found.pair else ""
        if not self._labelled:
            return f"columns: text {shown(found.text)}{pair} (inferred; --text-column names others)"
        return (
            f"columns: text {shown(found.text)}{pair}, label {shown(found.label)} (inferred; --text-column and "
            "--label-column name others)"
        )


def text_columns(
    columns: Sequence[str], given: str | None, where: str, *, tagged: bool = False
) -> tuple[str, str | None]:
    """The text column and that of its second half (None = single texts); missing ones are not looked for yet.

    Args:
        tagged: True for the column of lists of words, which have no second half.

    Raises:
        DataError: more than one could be the text.
    """
    if tagged:
        return given or _single(columns, "tokens", WORDS, where, "text"), None
    if given is not None:
        first, comma, second = given.partition(",")
        return (first.strip(), second.strip()) if comma and given not in columns else (given, None)
    known = _folded(columns)
    for one, other in PAIRS:
        if one in known and other in known and (one == "text" or "text" not in known):
            return known[one], known[other]
    return _single(columns, "text", TEXTS, where), None


def look_tagged(columns: Sequence[str], label: str | None = None) -> bool:
    """True if columns are called as words and tags are, and no text, or pair of texts, with its label is there too.

    Args:
        label: the column that was named for the label or the tags, if one was.

    >>> look_tagged(["id", "tokens", "ner_tags"]), look_tagged(["text", "label", "tokens", "tags"])
    (True, False)
    >>> look_tagged(["premise", "hypothesis", "tokens", "labels"])
    False
    """
    known = _folded(columns)

    def has(*names: str) -> bool:
        return any(name in known for name in names)

    labelled = label is not None or has("label", *LABELS)
    tagged = label is not None or has("tags", *TAGS)
    paired = any(one in known and other in known for one, other in PAIRS)
    return has("tokens", *WORDS) and tagged and not ((paired or has("text", *TEXTS)) and labelled)


def _folded(columns: Sequence[str]) -> dict[str, str]:
    """Lower-case name -> column; a column that is in lower case already goes before others."""
    return {name.casefold(): name for name in columns} | {name: name for name in columns if name == name.casefold()}


def _single(columns: Sequence[str], usual: str, others: Sequence[str], where: str, option: str | None = None) -> str:
    known = _folded(columns)
    if usual in known:
        return known[usual]
    found = [known[name] for name in others if name in known]
    if len(found) > 1:
        raise DataError(
            f"{where}: the {usual} could be {listed(found)}; name the right one with --{option or usual}-column"
        )
    return found[0] if found else usual


def _require(columns: Sequence[str], column: str, option: str, where: str) -> None:
    if columns.count(column) > 1:
        raise DataError(f"{where}: {columns.count(column)} columns are called {shown(column)}; rename one")
    if column not in columns:
        raise DataError(
            f"{where}: no column {shown(column)}; columns there: {listed(columns)}; "
            f"name the right one with --{option}-column"
        )
