"""What a scikit-learn estimator is given: texts or pairs, and their classes, rows of 0 and 1, or numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._rows import clean_text
from .data import Text
from .errors import DataError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray


def as_texts(X: Any) -> list[Text]:
    """The texts or pairs in `X`: a list, an array, a Series, or a table of one column, or of two for pairs.

    Raises:
        DataError: something else, or nothing.
    """
    if isinstance(X, str):
        raise DataError("X: got one string; give a list of texts")
    values = X.to_numpy() if hasattr(X, "to_numpy") else X
    rows = values.tolist() if hasattr(values, "tolist") else list(values)
    if not rows:
        raise DataError("X: no texts; give at least one")
    texts: list[Text] = []
    for number, row in enumerate(rows):
        parts = list(row) if isinstance(row, list | tuple) else [row]
        cleaned = [clean_text(part, f"X row {number}") for part in parts]
        if len(cleaned) not in (1, 2):
            raise DataError(f"X row {number}: got {len(cleaned)} values; allowed: a text, or two for a pair")
        texts.append(cleaned[0] if len(cleaned) == 1 else (cleaned[0], cleaned[1]))
    return texts


def as_classes(y: Any, rows: int) -> tuple[NDArray[Any], list[Any]]:
    """The classes, sorted, and for each row the index of its class, or 1.0 or 0.0 for each class.

    Args:
        y: [n] strings, integers or booleans; or [n, C] of 0 and 1, one column a label, dense or sparse. The classes are
            then the numbers of the columns.
        rows: n.

    Raises:
        DataError: something else, or nothing that could be learned.
    """
    labels = _array(y.toarray() if hasattr(y, "toarray") else y)
    if labels.ndim == 2 and len(labels) == rows and labels.shape[1] > 1:
        return _several(labels)
    if labels.shape != (rows,):
        raise DataError(
            f"y: got shape {labels.shape}, expected ({rows},), one label a text of X, or ({rows}, C), a 0 or 1 for each"
            " of C labels"
        )
    if labels.dtype.kind not in "OUSiub":
        raise DataError(f"y: got labels of type {labels.dtype}; allowed: strings, integers or booleans")
    try:
        classes, indices = np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise DataError(f"y: labels of several types ({error}); use strings or integers throughout") from None
    if len(classes) < 2:
        raise DataError(f"y: all {len(labels)} labels are the same; training needs two classes or more")
    return classes, indices.tolist()


def _array(y: Any) -> NDArray[Any]:
    try:
        return np.asarray(y)
    except ValueError:
        raise DataError(
            "y: its rows differ in length; give one label a text, or several as 0 and 1 in columns"
            " (sklearn.preprocessing.MultiLabelBinarizer makes them)"
        ) from None


def _several(labels: NDArray[Any]) -> tuple[NDArray[Any], list[Any]]:
    odd = labels[~np.isin(labels, (0, 1))] if labels.dtype.kind in "biuf" else labels.ravel()
    if len(odd):
        raise DataError(
            f"y: got {shown(odd.tolist()[0])} in a matrix; allowed: 0 and 1, whether the row has the column's label"
        )
    if not labels.any():
        raise DataError("y: no row has a label; training needs one or more")
    return np.arange(labels.shape[1]), labels.astype(float).tolist()


def as_numbers(y: Any, rows: int) -> list[float]:
    """The number of each row.

    Raises:
        DataError: not `rows` finite numbers, or all the same.
    """
    labels = _array(y)
    if labels.dtype == object and all(isinstance(value, int | float) for value in labels.flat):
        labels = labels.astype(float)
    if labels.shape != (rows,):
        raise DataError(f"y: got shape {labels.shape}, expected ({rows},), one number a text of X")
    if labels.dtype.kind not in "iuf" or not np.isfinite(labels).all():
        odd = next((x for x in labels.tolist() if not isinstance(x, int | float) or not np.isfinite(x)), labels.dtype)
        raise DataError(f"y: got {shown(odd)}; allowed: finite numbers")
    if (labels == labels[0]).all():
        raise DataError(f"y: all {rows} numbers are {labels[0]}; training needs numbers that differ")
    numbers: list[float] = labels.astype(float).tolist()
    return numbers
