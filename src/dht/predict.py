"""`dht predict`: texts in, one JSON object a text out: the answer and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ._rows import without_surrogates
from .data import Text
from .errors import NonFiniteError
from .hf.modeling import DHTForSequenceClassification
from .load import collate, encode, lines_in_batches


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
    an embedding has neither, but `embedding`.

    Args:
        texts: single ones or pairs, read lazily, a batch at a time; lone surrogates, which no UTF-8 can hold, count
            as U+FFFD.
        batch_size: rows that run together; it does not change any answer.
        max_length: tokens a text is cut to.
        details: also `units` (unit indices per layer run) and `exits` (label and score of each exit passed).

    Raises:
        DataError: a text is not a string.
        NonFiniteError: the model's answer to a text is not a number.
    """
    names, done = [model.config.label_names[i] for i in range(len(model.config.label_names))], 0
    task = model.task
    model.eval()
    for held in lines_in_batches(texts, batch_size):
        held = cleaned(held, done + 1)
        batch = collate(tokenizer, encode_mixed(tokenizer, held, max_length))
        with torch.inference_mode():
            trace = model(**{key: value.to(model.device) for key, value in batch.items()}).trace
        sound = trace.logits.isfinite().all(-1)
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
                **task.told(trace.logits[i], names),
                "layers": int(ran[i]),
                "heads": widths[i, : int(ran[i])].tolist(),
                "flops_fraction": round(float(trace.flops[i] / trace.dense_flops[i]), 6),
            }
            if details:
                row["units"] = [layer.nonzero()[:, 0].tolist() for layer in trace.units[i, : int(ran[i])]]
                told = [task.told(logits, names) for logits, seen in zip(table[i], visited[i], strict=True) if seen]
                row["exits"] = [{"prediction": exit_.get("label"), "score": exit_.get("score")} for exit_ in told]
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
