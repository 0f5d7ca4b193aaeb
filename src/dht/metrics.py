"""Figures that a report gives beside accuracy: F1 of classes and of label sets, errors and correlations of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

COMPARED = 2000
"""Rows that are compared with one another: their number of pairs grows with the square."""


def macro_f1(labels: Tensor, predictions: Tensor) -> float:
    """Unweighted mean over the classes that occur of their F1, in [0, 1].

    Args:
        labels, predictions: int64 [n], classes.
    """
    classes = torch.cat([labels, predictions]).unique()
    return _mean(_f1(labels == value, predictions == value) for value in classes)


def set_scores(labels: Tensor, predictions: Tensor) -> dict[str, float]:
    """Micro and macro F1, subset accuracy (all labels of a row right) and label accuracy (single labels right).

    Args:
        labels, predictions: [n, C], 1 where a row has the label. A label that occurs on neither side does not count in
            the macro F1; where none occurs at all, everything is right and F1 is 1.
    """
    true, said = labels.bool(), predictions.bool()
    occurs = (true | said).any(0).nonzero()[:, 0].tolist()
    return {
        "micro_f1": _f1(true, said) if occurs else 1.0,
        "macro_f1": _mean(_f1(true[:, i], said[:, i]) for i in occurs) if occurs else 1.0,
        "subset_accuracy": float((true == said).all(-1).double().mean()),
        "label_accuracy": float((true == said).double().mean()),
    }


def number_scores(labels: Tensor, predictions: Tensor) -> dict[str, float]:
    """Mean absolute and root mean squared error, R2, Pearson's and Spearman's correlation.

    A correlation with something constant is 0; R2 on constant labels is 1 if all predictions are right, else 0.

    Args:
        labels, predictions: float [n].
    """
    true, said = labels.double(), predictions.double()
    error, spread = said - true, (true - true.mean()).square().sum()
    squared = error.square().sum()
    return {
        "mae": float(error.abs().mean()),
        "rmse": float(error.square().mean().sqrt()),
        "r2": float(1 - squared / spread) if spread > 0 else float(squared == 0),
        "pearson": _correlation(true, said),
        "spearman": _correlation(_ranks(true), _ranks(said)),
    }


def vector_scores(labels: Tensor, answers: Tensor) -> dict[str, float]:
    """Mean cosine to the truth, and how the rows rank each other: what a search among them would notice.

    `neighbour_agreement`: the share of rows whose nearest other row is that of the true vectors. `ranking`: the mean
    over rows of Spearman's correlation between the cosines to all others, true and given. Both among the first 2,000
    rows, and 1 with fewer than three.

    Args:
        labels, answers: float [n, D].
    """
    true, said = (torch.nn.functional.normalize(part.double(), dim=-1) for part in (labels, answers))
    scores = {"cosine": float((true * said).sum(-1).mean()), "neighbour_agreement": 1.0, "ranking": 1.0}
    true, said = true[:COMPARED], said[:COMPARED]
    rows = len(true)
    if rows < 3:
        return scores
    others = ~torch.eye(rows, dtype=torch.bool, device=true.device)
    near, found = ((part @ part.T)[others].view(rows, rows - 1) for part in (true, said))
    scores["neighbour_agreement"] = float((near.argmax(-1) == found.argmax(-1)).double().mean())
    scores["ranking"] = _mean(_correlation(_ranks(a), _ranks(b)) for a, b in zip(near, found, strict=True))
    return scores


def entity_scores(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities, all types together: right are those whose type and both ends are.

    Where neither side has an entity, all three are 1.

    Args:
        truth, answers: of each row its tags, as `entities` reads them.
    """
    true, said = (
        {(row, *entity) for row, tags in enumerate(side) for entity in entities(tags)} for side in (truth, answers)
    )
    hit = len(true & said)
    precision, recall = hit / max(len(said), 1), hit / max(len(true), 1)
    if not true and not said:
        precision = recall = 1.0
    f1 = 2 * precision * recall / (precision + recall) if hit else precision * recall
    return {"entity_f1": f1, "entity_precision": precision, "entity_recall": recall}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first word and the word after the last of every entity in a row of BIO tags.

    Tags that break the scheme are read as by the CoNLL script: an I-X that goes on with nothing begins an entity.

    >>> entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    found: list[tuple[str, int, int]] = []
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, now = tag.partition("-")
        if kind and (mark != "I" or now != kind):
            found.append((kind, start, place))
            kind = ""
        if mark != "O" and not kind:
            kind, start = now, place
    return found


def _f1(true: Tensor, said: Tensor) -> float:
    hit, total = int((true & said).sum()), int(true.sum()) + int(said.sum())
    return 2 * hit / total


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _correlation(one: Tensor, other: Tensor) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = one.norm() * other.norm()
    return float(one @ other / scale) if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Float64 [n], ranks from 0; equal values share the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    ranks: Tensor = (last - (count.double() + 1) / 2)[place]
    return ranks
