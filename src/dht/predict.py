"""`dht predict`: texts in, one JSON object a text out: the answer and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ._rows import without_surrogates
from .data import Text
from .errors import NonFiniteError
from .hf.modeling import DHTForSequenceClassification
from .load import collate, encode, lines_in_batches
from .plan import Trace
from .words import encode_words, split_words, tell_words


def predict(
    model: DHTForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    *,
    batch_size: int = 32,
    max_length: int = 128,
    details: bool = False,
) -> Iterator[dict[str, Any]]:
    """One dict a text, in order: `label`, `score` (its probability), `layers`, `heads`, `flops_fraction`.

    With several labels a row, `label` and `score` are lists; of a regression, `label` is the number and `score` None;
    an embedding has neither, but `embedding`. A tagger's row has `tokens` (the words), `tags` and `scores`: one each a
    word, None of words that are cut off or that the tokenizer drops.

    Args:
        texts: single ones or pairs (for a tagger lists of words, or texts to split at white space), read lazily, a
            batch at a time; lone surrogates, which no UTF-8 can hold, count as U+FFFD.
        batch_size: rows that run together; it does not change any answer.
        max_length: tokens a text is cut to.
        details: also `units` (unit indices per layer run) and `exits` (label and score of each exit passed).

    Raises:
        DataError: a text is not a string, or not words.
        NonFiniteError: the model's answer to a text is not a number.
    """
    names, done = [model.config.label_names[i] for i in range(len(model.config.label_names))], 0
    task = model.task
    words: list[list[str]] = []
    places: list[dict[int, int]] = []
    model.eval()

    def told(i: int, logits: Tensor) -> dict[str, Any]:
        if not model.tags:
            return task.told(logits, names)
        return tell_words(task.told(logits[list(places[i].values())], names), words[i], places[i])

    for held in lines_in_batches(texts, batch_size):
        if model.tags:
            words = split_words(held, done + 1)
            encoded, places = encode_words(tokenizer, words, max_length)
        else:
            encoded = encode_mixed(tokenizer, cleaned(held, done + 1), max_length)
        batch = collate(tokenizer, encoded)
        with torch.inference_mode():
            output = model(**{key: value.to(model.device) for key, value in batch.items()})
        trace: Trace = output.trace
        sound = output.logits.isfinite().flatten(1).all(-1)
        if not bool(sound.all()):
            first = done + 1 + int((~sound).nonzero()[0])
            raise NonFiniteError(
                f"text {first}: the model's answer is not a number; its weights are broken, train anew"
            )
        done += len(held)
        ran, widths = trace.layers, trace.units.sum(-1)
        table, visited = trace.exit_table()
        for i in range(len(held)):
            row: dict[str, Any] = {
                **told(i, trace.logits[i]),
                "layers": int(ran[i]),
                "heads": widths[i, : int(ran[i])].tolist(),
                "flops_fraction": round(float(trace.flops[i] / trace.dense_flops[i]), 6),
            }
            if details:
                row["units"] = [layer.nonzero()[:, 0].tolist() for layer in trace.units[i, : int(ran[i])]]
                at_once = trace.exits[0]
                passed = [] if at_once.layer else [at_once.logits[i]]
                passed += [logits for logits, seen in zip(table[i], visited[i], strict=True) if seen]
                exits = [told(i, logits) for logits in passed]
                answer, score = ("tags", "scores") if model.tags else ("label", "score")
                row["exits"] = [{"prediction": exit_.get(answer), "score": exit_.get(score)} for exit_ in exits]
            yield row


def cleaned(texts: Iterable[Text], first: int = 1) -> list[Text]:
    """Single texts and pairs that a tokenizer can take: lone surrogates become U+FFFD.

    Args:
        first: number of the first text, for the message.

    Raises:
        DataError: a text is not a string.
    """
    found: list[Text] = []
    for i, text in enumerate(texts, start=first):
        if isinstance(text, tuple) and len(text) == 2:
            found.append((without_surrogates(text[0], f"text {i}"), without_surrogates(text[1], f"text {i}")))
        else:
            found.append(without_surrogates(text, f"text {i}"))
    return found


def encode_mixed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int) -> list[dict[str, Any]]:
    """One dict a row, as `encode` makes them, of single texts and pairs in any order."""
    rows: list[dict[str, Any]] = [{} for _ in texts]
    singles = [i for i, text in enumerate(texts) if isinstance(text, str)]
    both = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    made = encode(tokenizer, [str(texts[i]) for i in singles], None, max_length)
    made += encode(tokenizer, [texts[i][0] for i in both], [texts[i][1] for i in both], max_length)
    for i, row in zip([*singles, *both], made, strict=True):
        rows[i] = row
    return rows


def to_line(row: dict[str, Any]) -> str:
    """The row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False)
