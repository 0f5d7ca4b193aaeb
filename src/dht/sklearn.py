"""`DHTClassifier` and `DHTRegressor`: dynamic models of texts as scikit-learn estimators."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import SaveStrategy

from ._estimator_input import as_classes, as_numbers, as_texts
from ._extras import optional
from ._files import write_json
from ._labels import MULTI, NUMBER_NAME, REGRESSION, SINGLE
from .config import TrainSettings
from .data import VALIDATION_FRACTION, TextData, cut_validation, split_of
from .errors import CheckpointError, DataError
from .hf.modeling import DHTForSequenceClassification
from .load import by_length, check_budget, load_run
from .plan import Trace
from .predict import encode_mixed
from .train import dynamic_trainer, fit, save_run

optional("sklearn", "sklearn", "dht.sklearn")
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin  # noqa: E402
from sklearn.utils.validation import check_is_fitted  # noqa: E402

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DHTClassifier", "DHTRegressor"]

STATE_FILE = "sklearn.json"


class _DynamicEstimator(BaseEstimator):
    """What both estimators share: parameters, training on a part of the rows, saving, and what a text takes."""

    _tasks: ClassVar[tuple[str, ...]] = ()
    _answers: ClassVar[str] = ""

    def __init__(
        self,
        model: str = "minilm",
        *,
        budget: float = 0.26,
        train_budget: float | None = None,
        search: str = "tree",
        ffn: str = "coupled",
        epochs: float = 3.0,
        batch_size: int = 32,
        lr: float = 1e-4,
        max_length: int = 128,
        device: str = "auto",
        dtype: str = "float32",
        validation_fraction: float = VALIDATION_FRACTION,
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.model, self.budget, self.train_budget, self.search, self.ffn = model, budget, train_budget, search, ffn
        self.epochs, self.batch_size, self.lr, self.max_length = epochs, batch_size, lr, max_length
        self.device, self.dtype = device, dtype
        self.validation_fraction, self.random_state, self.verbose = validation_fraction, random_state, verbose

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
        write_json(Path(folder) / STATE_FILE, {"params": self.get_params(), **self._learned()})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The estimator that `save` wrote, or one around a run of `dht train`; nothing is unpickled.

        Raises:
            CheckpointError: the folder holds neither.
        """
        model, tokenizer = load_run(folder)
        if model.task.name not in cls._tasks:
            raise CheckpointError(
                f"{folder}: a model for {model.task.name}; {cls.__name__} gives every text {cls._answers}"
            )
        path = Path(folder) / STATE_FILE
        state: dict[str, Any] = {"params": {"budget": model.config.budget}}
        try:
            state |= _read(path)
            if not path.is_file():  # a run of `dht train`, which says what it was told
                told = _read(path.with_name("run.json"))
                state["params"] = {name: told[name] for name in cls().get_params() if name in told}
            estimator = cls(**state["params"])
            estimator._learn(state, model)
            estimator.report_ = _read(path.with_name("report.json"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); save the estimator again") from None
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

    def _learned(self) -> dict[str, Any]:
        """What `save` keeps beside the model, as JSON has it."""
        return {}

    def _learn(self, state: dict[str, Any], model: DHTForSequenceClassification) -> None:
        """Takes up what `_learned` said; a run of `dht train` has said nothing."""

    def _fit(self, X: Any, labels: list[Any], names: list[str], task: str) -> None:
        if not 0.0 < self.validation_fraction < 1.0:
            raise DataError(f"validation_fraction: got {self.validation_fraction}, allowed: a number in (0, 1)")
        if not isinstance(self.random_state, int | np.integer):
            raise DataError(f"random_state: got {self.random_state!r}, allowed: an integer")
        whole = split_of(X, labels, "X")
        train, held_out = cut_validation(whole, self.random_state, "X", self.validation_fraction)
        data = TextData("X", train, held_out, None, names, task=task)
        with tempfile.TemporaryDirectory() as scratch, _generators_kept():
            fitted = fit(self._settings(Path(scratch) / "run"), data=data, make=self._trainer)
        self.model_, self.tokenizer_ = fitted.model.eval(), fitted.tokenizer
        self.report_ = fitted.report

    def _settings(self, out: Path) -> TrainSettings:
        return TrainSettings(
            data="X", model=self.model, out=out, budget=self.budget, train_budget=self.train_budget,
            search=self.search, ffn=self.ffn, epochs=self.epochs, seed=int(self.random_state),
            batch_size=self.batch_size, lr=self.lr, max_length=self.max_length, device=self.device, dtype=self.dtype,
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
        """Logits (float64), layers and FLOPs fractions of `X`, batches of like length at a time."""
        check_is_fitted(self, "model_")
        texts = as_texts(X)
        self.model_.policy.set_budget(check_budget(self.budget))
        rows = encode_mixed(self.tokenizer_, texts, self.max_length)
        batches, order = by_length(self.tokenizer_, rows, self.batch_size)
        found = []
        for batch in batches:
            with torch.inference_mode():
                trace: Trace = self.model_(**{name: part.to(self.model_.device) for name, part in batch.items()}).trace
            fraction = trace.flops / trace.dense_flops
            found.append([part.cpu().numpy() for part in (trace.logits.double(), trace.layers, fraction)])
        back = np.argsort(order)
        logits, layers, fractions = (np.concatenate(column)[back] for column in zip(*found, strict=True))
        return logits, layers, fractions


class DHTClassifier(ClassifierMixin, _DynamicEstimator):
    """Texts in, classes out; trained as `dht train` does, on a part of the rows that is held out for the policy.

    X is a sequence of texts, or of pairs of texts; y holds a class a row, or several as a matrix of 0 and 1. `budget`
    may be changed after fitting (`set_params(budget=0.5)`): the same weights then spend more or less.

    Args:
        model: embedded name, folder or Hub id of an encoder, or a preset, as for `dht train`.
        budget: target mean FLOPs as a fraction of the dense model's, in (0, 1].
        train_budget, search, ffn, epochs, batch_size, lr, max_length, device, dtype: as for `dht train`.
        class_weight: None, or "balanced": every class counts alike in the loss (with one class a row).
        validation_fraction: share of each class that is held out of the weights' training; the policy learns from it.
        random_state: seed of data order, initial heads and exploration. The global generators are left as they were.
        verbose: 0 = silent, 1 = the progress bar of training.

    Attributes:
        classes_: [C], the labels seen in `fit`, sorted; of a matrix, the numbers of its columns.
        multilabel_: True if a row has any number of them.
        model_, tokenizer_: the trained model, its policy included, and its tokenizer.
        report_: train_flops_fraction and train_seconds.

    Example:
        >>> from dht.sklearn import DHTClassifier
        >>> DHTClassifier(model="preset:tiny", budget=0.4).get_params()["budget"]
        0.4
    """

    _tasks = (SINGLE, MULTI)
    _answers = "one class, or any number of them"

    def __init__(
        self,
        model: str = "minilm",
        *,
        budget: float = 0.26,
        train_budget: float | None = None,
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
        super().__init__(
            model, budget=budget, train_budget=train_budget, search=search, ffn=ffn, epochs=epochs,
            batch_size=batch_size, lr=lr, max_length=max_length, device=device, dtype=dtype,
            validation_fraction=validation_fraction, random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any) -> Self:
        """Trains on texts `X` [n] and labels `y`: [n] strings, integers or booleans, or [n, C] of 0 and 1.

        Raises:
            DHTError: a text, a label or a parameter that cannot be used.
        """
        texts = as_texts(X)
        classes, labels = as_classes(y, len(texts))
        several = isinstance(labels[0], list)
        self._fit(texts, labels, [str(label) for label in classes], MULTI if several else SINGLE)
        self.classes_, self.multilabel_ = classes, several
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each text, [n]; with several a row int64 [n, C], 1 where a text has the class."""
        logits = self._run(X)[0]
        chosen: NDArray[Any] = (logits > 0).astype(np.int64) if self.multilabel_ else self.classes_[logits.argmax(-1)]
        return chosen

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """The probability of each class for each text, float64 [n, C], in the order of `classes_`."""
        logits = torch.from_numpy(self._run(X)[0])
        probabilities: NDArray[Any] = (logits.sigmoid() if self.multilabel_ else logits.softmax(-1)).numpy()
        return probabilities

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def _settings(self, out: Path) -> TrainSettings:
        return replace(super()._settings(out), class_weights=self.class_weight or "none")

    def _learned(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str}

    def _learn(self, state: dict[str, Any], model: DHTForSequenceClassification) -> None:
        names = [model.config.label_names[i] for i in range(len(model.config.label_names))]
        self.multilabel_ = model.task.name == MULTI
        self.classes_ = np.array(state.get("classes", names), dtype=np.dtype(state.get("dtype", "O")))
        if self.classes_.shape != (len(names),):
            raise ValueError(f"{self.classes_.size} classes, but the model has {len(names)}")


class DHTRegressor(RegressorMixin, _DynamicEstimator):
    """Texts in, numbers out; everything else, parameters included, as in `DHTClassifier`, with no classes to weigh.

    Attributes:
        model_, tokenizer_, report_: as there.
    """

    _tasks = (REGRESSION,)
    _answers = "a number"

    def fit(self, X: Any, y: Any) -> Self:
        """Trains on texts `X` [n] and numbers `y` [n].

        Raises:
            DHTError: a text, a number or a parameter that cannot be used.
        """
        texts = as_texts(X)
        self._fit(texts, as_numbers(y, len(texts)), [NUMBER_NAME], REGRESSION)
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The number of each text, float64 [n], in the unit of `y`."""
        numbers: NDArray[Any] = self._run(X)[0][:, 0]
        return numbers


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return kept


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
