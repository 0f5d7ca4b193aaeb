"""`DHTClassifier`: a dynamic text classifier as a scikit-learn estimator."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import SaveStrategy

from ._extras import optional
from ._files import write_json
from ._rows import clean_text
from .config import TrainSettings
from .data import VALIDATION_FRACTION, Split, Text, TextData, cut_validation
from .errors import CheckpointError, DataError
from .load import by_length, check_budget, load_run
from .plan import Trace
from .predict import encode_mixed
from .task import SingleLabel
from .train import dynamic_trainer, fit, save_run

optional("sklearn", "sklearn", "dht.sklearn")
from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: E402
from sklearn.utils.validation import check_is_fitted  # noqa: E402

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DHTClassifier"]

STATE_FILE = "sklearn.json"


class DHTClassifier(ClassifierMixin, BaseEstimator):
    """Texts in, classes out; trained as `dht train` does, on a part of the rows that is held out for the policy.

    X is a sequence of texts, or of pairs of texts. `budget` may be changed after fitting (`set_params(budget=0.5)`):
    the same weights then spend more or less.

    Args:
        model: embedded name, folder or Hub id of an encoder, or a preset, as for `dht train`.
        budget: target mean FLOPs as a fraction of the dense model's, in (0, 1].
        search, ffn, epochs, batch_size, lr, max_length, device, dtype: as for `dht train`.
        class_weight: None, or "balanced": every class counts alike in the loss.
        validation_fraction: share of each class that is held out of the weights' training; the policy learns from it.
        random_state: seed of data order, initial heads and exploration. The global generators are left as they were.
        verbose: 0 = silent, 1 = the progress bar of training.

    Attributes:
        classes_: [C], the labels seen in `fit`, sorted.
        model_, tokenizer_: the trained model, its policy included, and its tokenizer.
        report_: train_flops_fraction and train_seconds.

    Example:
        >>> from dht.sklearn import DHTClassifier
        >>> DHTClassifier(model="preset:tiny", budget=0.4).get_params()["budget"]
        0.4
    """

    def __init__(
        self,
        model: str = "minilm",
        *,
        budget: float = 0.26,
        search: str = "tree",
        ffn: str = "coupled",
        epochs: float = 3.0,
        batch_size: int = 32,
        lr: float = 1e-4,
        max_length: int = 128,
        device: str = "auto",
        dtype: str = "float32",
        class_weight: str | None = None,
        validation_fraction: float = VALIDATION_FRACTION,
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.model, self.budget, self.search, self.ffn = model, budget, search, ffn
        self.epochs, self.batch_size, self.lr, self.max_length = epochs, batch_size, lr, max_length
        self.device, self.dtype, self.class_weight = device, dtype, class_weight
        self.validation_fraction, self.random_state, self.verbose = validation_fraction, random_state, verbose

    def fit(self, X: Any, y: Any) -> DHTClassifier:
        """Trains on texts `X` [n] and labels `y` [n]: strings, integers or booleans.

        Raises:
            DHTError: a text, a label or a parameter that cannot be used.
        """
        texts = _texts(X)
        labels = np.asarray(y)
        if labels.shape != (len(texts),):
            raise DataError(f"y: got shape {labels.shape}, expected ({len(texts)},), one label a text of X")
        if labels.dtype.kind not in "OUSiub":
            raise DataError(f"y: got labels of type {labels.dtype}; allowed: strings, integers or booleans")
        if not 0.0 < self.validation_fraction < 1.0:
            raise DataError(f"validation_fraction: got {self.validation_fraction}, allowed: a number in (0, 1)")
        if not isinstance(self.random_state, int | np.integer):
            raise DataError(f"random_state: got {self.random_state!r}, allowed: an integer")
        try:
            classes, indices = np.unique(labels, return_inverse=True)
        except TypeError as error:
            raise DataError(f"y: labels of several types ({error}); use strings or integers throughout") from None
        if len(classes) < 2:
            raise DataError(f"y: all {len(labels)} labels are the same; training needs two classes or more")
        whole = _split(texts, indices.tolist())
        train, held_out = cut_validation(whole, self.random_state, "X", self.validation_fraction)
        data = TextData("X", train, held_out, None, [str(label) for label in classes])
        with tempfile.TemporaryDirectory() as scratch, _generators_kept():
            fitted = fit(self._settings(Path(scratch) / "run"), data=data, make=self._trainer)
        self.classes_ = classes
        self.model_, self.tokenizer_ = fitted.model.eval(), fitted.tokenizer
        self.report_ = fitted.report
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each text, [n]."""
        probabilities = self.predict_proba(X)
        chosen: NDArray[Any] = self.classes_[probabilities.argmax(-1)]
        return chosen

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """The probability of each class for each text, float64 [n, C], in the order of `classes_`."""
        return self._run(X)[0]

    def spent(self, X: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """What each text takes: layers run, int64 [n], and FLOPs as a fraction of the dense model's, float64 [n]."""
        return self._run(X)[1:]

    def save(self, folder: str | Path) -> None:
        """Writes the fitted estimator; `dht predict` and `dht evaluate` read the folder too.

        Raises:
            DHTError: it cannot be written.
        """
        check_is_fitted(self, "model_")
        save_run(Path(folder), self.model_, self.tokenizer_, self.report_)
        state = {"params": self.get_params(), "classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str}
        write_json(Path(folder) / STATE_FILE, state)

    @classmethod
    def load(cls, folder: str | Path) -> DHTClassifier:
        """The estimator that `save` wrote, or one around a run of `dht train`; nothing is unpickled.

        Raises:
            CheckpointError: the folder holds neither.
        """
        model, tokenizer = load_run(folder)
        if not isinstance(model.task, SingleLabel):
            raise CheckpointError(f"{folder}: a model for {model.task.name}; DHTClassifier gives every text one class")
        path = Path(folder) / STATE_FILE
        names = [model.config.label_names[index] for index in range(len(model.config.label_names))]
        state: dict[str, Any] = {"params": {"budget": model.config.budget}, "classes": names, "dtype": "O"}
        try:
            state |= _read(path)
            if not path.is_file():  # a run of `dht train`, which says what it was told
                told = _read(path.with_name("run.json"))
                state["params"] = {name: told[name] for name in cls().get_params() if name in told}
            estimator = cls(**state["params"])
            estimator.classes_ = np.array(state["classes"], dtype=np.dtype(state["dtype"]))
            estimator.report_ = _read(path.with_name("report.json"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); save the estimator again") from None
        if estimator.classes_.shape != (len(names),):
            raise CheckpointError(f"{path}: {estimator.classes_.size} classes, but the model has {len(names)}")
        if estimator.device == "cpu":
            model.cpu()
        estimator.model_, estimator.tokenizer_ = model, tokenizer
        return estimator

    def __getstate__(self) -> dict[str, Any]:
        """Plain values, and of a fitted estimator the bytes of the files that `save` writes: no module is pickled."""
        if not hasattr(self, "model_"):
            state: dict[str, Any] = super().__getstate__()
            return state
        with tempfile.TemporaryDirectory() as scratch:
            self.save(scratch)
            return {"files": {path.name: path.read_bytes() for path in Path(scratch).iterdir()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "files" not in state:
            super().__setstate__(state)
            return
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in state["files"].items():
                (Path(scratch) / Path(name).name).write_bytes(content)
            self.__dict__.update(self.load(scratch).__dict__)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array, tags.input_tags.string = True, False, True
        return tags

    def _settings(self, out: Path) -> TrainSettings:
        return TrainSettings(
            data="X", model=self.model, out=out, budget=self.budget, search=self.search, ffn=self.ffn,
            epochs=self.epochs, seed=int(self.random_state), batch_size=self.batch_size, lr=self.lr,
            max_length=self.max_length, device=self.device, dtype=self.dtype,
            class_weights=self.class_weight or "none",
        )  # fmt: skip

    def _trainer(self, *args: Any) -> Trainer:
        """The trainer of `dht train` without checkpoints, and silent unless asked otherwise."""
        trainer = dynamic_trainer(*args)
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.remove_callback(PrinterCallback)
        if not self.verbose:
            trainer.remove_callback(ProgressCallback)
        return trainer

    def _run(self, X: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Probabilities, layers and FLOPs fractions of `X`, batches of like length at a time."""
        check_is_fitted(self, "model_")
        texts = _texts(X)
        self.model_.policy.set_budget(check_budget(self.budget))
        rows = encode_mixed(self.tokenizer_, texts, self.max_length)
        batches, order = by_length(self.tokenizer_, rows, self.batch_size)
        found = []
        for batch in batches:
            with torch.inference_mode():
                trace: Trace = self.model_(**{name: part.to(self.model_.device) for name, part in batch.items()}).trace
            fraction = trace.flops / trace.dense_flops
            found.append([part.cpu().numpy() for part in (trace.logits.double().softmax(-1), trace.layers, fraction)])
        back = np.argsort(order)
        probabilities, layers, fractions = (np.concatenate(column)[back] for column in zip(*found, strict=True))
        return probabilities, layers, fractions


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return kept


def _texts(X: Any) -> list[Text]:
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


def _split(texts: Sequence[Text], labels: list[int]) -> Split:
    singles = [text for text in texts if isinstance(text, str)]
    if len(singles) == len(texts):
        return Split(singles, labels)
    if singles:
        raise DataError(f"X: {len(singles)} single texts among {len(texts) - len(singles)} pairs; give one kind")
    return Split([text[0] for text in texts], labels, [text[1] for text in texts])


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Puts the global random generators, which training seeds, back to where they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
