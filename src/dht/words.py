"""Rows of words for a tagger: each word's tag stands at the first of its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ._labels import IGNORED, word_list
from .errors import DHTError


def encode_words(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]], max_length: int
) -> tuple[list[dict[str, Any]], list[dict[int, int]]]:
    """One dict of `input_ids` a row, without padding, and where its words begin: word -> place of its first token.

    Words that are cut off, or of which the tokenizer makes nothing, have no place.

    Args:
        rows: the words of each row.
        max_length: tokens a row is cut to.

    Raises:
        DHTError: the tokenizer does not tell which token comes from which word, or takes no words.
    """
    if not rows:
        return [], []
    if not tokenizer.is_fast:
        raise DHTError(
            f"model: its tokenizer, {type(tokenizer).__name__}, does not tell which token comes from which word; "
            "tagging needs one of the tokenizers library (a tokenizer.json)"
        )
    made = tokenizer(
        [list(words) for words in rows], is_split_into_words=True, truncation=True, max_length=max_length,
        return_attention_mask=False,
    )  # fmt: skip
    places: list[dict[int, int]] = []
    for i in range(len(rows)):
        first: dict[int, int] = {}
        for place, word in enumerate(made.word_ids(i)):
            if word is not None:
                first.setdefault(word, place)
        places.append(first)
    return [{"input_ids": ids} for ids in made["input_ids"]], places


def split_words(texts: Iterable[Any], first: int = 1) -> list[list[str]]:
    """The words of each row: a list of them as it is, a text split at white space; lone surrogates become U+FFFD.

    Args:
        first: number of the first row, for the message.

    Raises:
        DataError: neither, or no words.
    """
    return [
        word_list(text.split() if isinstance(text, str) else text, f"text {number}")
        for number, text in enumerate(texts, start=first)
    ]


def tell_words(told: Mapping[str, Any], words: list[str], places: Mapping[int, int]) -> dict[str, Any]:
    """`tokens` (the words), and of each word its tag and score; None of a word without a place.

    Args:
        told: what `TokenTags.told` says of the words that have one, in the order of `places`.
        places: as `encode_words` gives them.
    """
    row: dict[str, Any] = {"tokens": words}
    for name, values in told.items():
        known = dict(zip(places, values, strict=True))
        row[name] = [known.get(word) for word in range(len(words))]
    return row


def encode_tagged(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]], tags: Sequence[Sequence[int]], max_length: int
) -> list[dict[str, Any]]:
    """As `encode_words`, each row with `tags`: that of a word at its first token, -100 at all other tokens."""
    encoded, places = encode_words(tokenizer, rows, max_length)
    for row, first, wanted in zip(encoded, places, tags, strict=True):
        row["tags"] = [IGNORED] * len(row["input_ids"])
        for word, place in first.items():
            row["tags"][place] = wanted[word]
    return encoded
