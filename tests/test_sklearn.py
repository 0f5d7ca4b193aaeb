"""`DHTClassifier` as scikit-learn uses estimators: cloned, piped, cross-validated, searched over, pickled."""

from __future__ import annotations

import importlib
import json
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from transformers import AutoTokenizer

from builders import dynamic_model
from dht._estimator_input import as_classes
from dht.errors import CheckpointError, ConfigError, DataError, DHTError
from dht.sklearn import DHTClassifier, DHTRegressor
from test_train import encoder, finished, sentences, settings  # noqa: F401

GOOD = ["lovely {}", "a great {}", "the best {}", "what a fine {}", "I love this {}"]
BAD = ["dreadful {}", "a poor {}", "the worst {}", "what a dull {}", "I hate this {}"]
THINGS = ["film", "book", "song", "meal", "place", "game", "show", "phone"]
X = [line.format(thing) for thing in THINGS for line in (*GOOD, *BAD)]
Y = ["pos" if line in GOOD else "neg" for _ in THINGS for line in (*GOOD, *BAD)]


@pytest.fixture(scope="module")
def make(encoder):  # noqa: F811
    def estimator(**changes):
        values = {"budget": 0.5, "epochs": 12, "batch_size": 16, "lr": 3e-3, "max_length": 16, "device": "cpu"}
        return DHTClassifier(str(encoder), **values | changes)

    return estimator


@pytest.fixture(scope="module")
def fitted(make):
    return make().fit(X, Y)


def test_fit_predict_score(fitted):
    assert fitted.classes_.tolist() == ["neg", "pos"]
    assert fitted.score(X, Y) > 0.9
    probabilities = fitted.predict_proba(np.array(X))
    assert probabilities.shape == (80, 2)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (fitted.classes_[probabilities.argmax(1)] == fitted.predict(X)).all()
    one_by_one = np.concatenate([fitted.predict_proba([text]) for text in X[:5]])
    np.testing.assert_allclose(one_by_one, probabilities[:5], atol=1e-5)
    assert 0 < fitted.report_["train_flops_fraction"] < 3


def test_the_budget_may_change_after_fitting(fitted):
    layers, generous = [], []
    try:
        for budget in (0.1, 1.0):
            fitted.set_params(budget=budget)
            depth, fraction = fitted.spent(X)
            assert depth.shape == fraction.shape == (80,)
            layers.append(depth.mean())
            generous.append(fraction.mean())
        assert layers[0] < layers[1]
        assert generous[0] < generous[1]
        fitted.set_params(budget=2)
        with pytest.raises(ConfigError, match=r"budget: got 2, allowed: a number in \(0, 1\]"):
            fitted.predict(X)
    finally:
        fitted.set_params(budget=0.5)


def test_parameters_and_clones(make, fitted):
    estimator = make(budget=0.3, class_weight="balanced")
    assert estimator.get_params()["budget"] == 0.3
    assert clone(estimator).get_params() == estimator.get_params()
    assert not hasattr(clone(fitted), "model_")
    with pytest.raises(NotFittedError):
        estimator.predict(X)
    with pytest.raises(NotFittedError):
        estimator.save("nowhere")
    assert repr(estimator).startswith("DHTClassifier(")
    assert estimator.__sklearn_tags__().input_tags.string


def test_pipeline_cross_validation_and_grid_search(make):
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipe = make_pipeline(lower, make(epochs=0.5))
    scores = cross_val_score(pipe, X, Y, cv=2, error_score="raise")
    assert scores.shape == (2,)
    search = GridSearchCV(make(epochs=0.5), {"budget": [0.4, 0.8]}, cv=2, error_score="raise").fit(X, Y)
    assert set(search.cv_results_["param_budget"]) == {0.4, 0.8}
    assert search.predict(X[:3]).shape == (3,)
    assert search.classes_.tolist() == ["neg", "pos"]


def test_the_same_seed_fits_the_same_and_global_generators_stay(make):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first, second = (make(epochs=0.5, random_state=3).fit(X, Y).predict_proba(X) for _ in range(2))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    np.testing.assert_array_equal(first, second)


def test_pickles_hold_files_not_modules(fitted, make):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_allclose(again.predict_proba(X), fitted.predict_proba(X), atol=1e-6)
    assert again.get_params() == fitted.get_params()
    state = fitted.__getstate__()
    assert all(isinstance(content, bytes) for content in state["files"].values())
    assert {"model.safetensors", "config.json", "tokenizer.json", "sklearn.json"} <= set(state["files"])
    fresh = pickle.loads(pickle.dumps(make()))
    assert fresh.get_params() == make().get_params()


@pytest.mark.parametrize("labels", [[3, -1], [True, False], ["ä", "b"]])
def test_saved_and_loaded_with_its_label_types(make, labels, tmp_path):
    y = np.array([labels[i % 2] for i in range(40)])
    estimator = make(epochs=0.3).fit(X[:40], y)
    estimator.save(tmp_path / "run")
    again = DHTClassifier.load(tmp_path / "run")
    assert again.classes_.dtype == y.dtype
    assert again.predict(X).dtype == y.dtype
    np.testing.assert_allclose(again.predict_proba(X), estimator.predict_proba(X), atol=1e-6)
    (tmp_path / "run" / "sklearn.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"sklearn.json: cannot be read \(.*\); save the estimator again"):
        DHTClassifier.load(tmp_path / "run")
    (tmp_path / "run" / "sklearn.json").write_text('{"params": {}, "classes": [1, 2, 3], "dtype": "<i8"}')
    with pytest.raises(CheckpointError, match=r"3 classes, but the model has 2"):
        DHTClassifier.load(tmp_path / "run")


def test_a_model_for_another_task_is_no_such_classifier(minilm_path, tmp_path):
    dynamic_model(num_labels=1, problem_type="regression").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(minilm_path).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a model for regression; DHTClassifier gives every text one class, or"):
        DHTClassifier.load(tmp_path)
    dynamic_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a model for single_label_classification; DHTRegressor gives every text"):
        DHTRegressor.load(tmp_path)


SEVERAL = np.array([["film" in line or "book" in line, word == "pos"] for line, word in zip(X, Y, strict=True)]) * 1


def test_several_labels_a_row_are_a_matrix_of_zeros_and_ones(make, tmp_path):
    estimator = make().fit(X, SEVERAL)
    assert estimator.multilabel_
    assert estimator.classes_.tolist() == [0, 1]
    said, probabilities = estimator.predict(X), estimator.predict_proba(X)
    assert (said.shape, said.dtype, probabilities.shape) == ((80, 2), np.int64, (80, 2))
    np.testing.assert_array_equal(said, probabilities > 0.5)
    assert (said == SEVERAL).mean(0).min() > 0.85
    assert estimator.score(X, SEVERAL) == (said == SEVERAL).all(1).mean()
    estimator.save(tmp_path / "run")
    again = DHTClassifier.load(tmp_path / "run")
    np.testing.assert_array_equal(again.predict(X), said)
    assert clone(estimator).__sklearn_tags__().classifier_tags.multi_label
    sparse = pytest.importorskip("scipy.sparse").csr_matrix(SEVERAL)
    scores = cross_val_score(make(epochs=0.3), X, sparse.toarray(), cv=2, error_score="raise")
    assert scores.shape == (2,)
    np.testing.assert_array_equal(as_classes(sparse, 80)[1], as_classes(SEVERAL.astype(bool), 80)[1])


def test_numbers(make, encoder, tmp_path):  # noqa: F811
    numbers = np.array([12.0 if word == "pos" else -3.0 for word in Y])
    params = make().get_params()
    del params["class_weight"]
    estimator = DHTRegressor(**params).fit(X, numbers)
    assert estimator.predict(X).shape == (80,)
    assert estimator.score(X, numbers) > 0.6, "R2"
    assert estimator.spent(X)[0].shape == (80,)
    estimator.save(tmp_path / "run")
    np.testing.assert_allclose(DHTRegressor.load(tmp_path / "run").predict(X), estimator.predict(X), atol=1e-5)
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_allclose(again.predict(X), estimator.predict(X), atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0], r"y: got shape \(1,\), expected \(2,\), one number a text of X"),
        (["a", "b"], "y: got 'a'; allowed: finite numbers"),
        ([1.0, float("inf")], "y: got inf; allowed: finite numbers"),
        ([True, False], "y: got dtype.'bool'.; allowed: finite numbers"),
        ([2, 2], "y: all 2 numbers are 2; training needs numbers that differ"),
    ],
)
def test_numbers_that_are_none(labels, message):
    with pytest.raises(DataError, match=message):
        DHTRegressor().fit(["a", "b"], labels)


def test_a_run_of_dht_train_is_an_estimator_too(finished):  # noqa: F811
    run = DHTClassifier.load(finished[0])
    assert run.budget == 0.4
    assert run.classes_.tolist() == ["negative", "positive"]
    assert set(run.predict(["what a film", "no"])) <= {"negative", "positive"}
    assert run.get_params()["model"] == json.loads((finished[0] / "run.json").read_text())["model"]


def test_pairs_columns_and_tables(make):
    pairs = [(text, thing) for text, thing in zip(X, THINGS * 10, strict=True)]
    estimator = make(epochs=0.3).fit(pairs, Y)
    assert estimator.predict(np.array(pairs)).shape == (80,)
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": X[:3], "b": THINGS[:3]})
    np.testing.assert_array_equal(estimator.predict_proba(table), estimator.predict_proba(pairs[:3]))
    np.testing.assert_array_equal(estimator.predict(table[["a"]]), estimator.predict(table["a"]))


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("one text", ["a"], "X: got one string; give a list of texts"),
        ([], [], "X: no texts; give at least one"),
        (["a", 3], ["x", "y"], "X row 1: the text is 3, a int; allowed: a string"),
        (["a", " "], ["x", "y"], "X row 1: no text"),
        ([("a", "b", "c")], ["x"], "X row 0: got 3 values; allowed: a text, or two for a pair"),
        (["a", ("b", "c")], ["x", "y"], "X: 1 single texts among 1 pairs; give one kind"),
        (["a", "b"], ["x"], r"y: got shape \(1,\), expected \(2,\), one label a text of X"),
        (["a", "b"], [0.5, 1.0], "y: got labels of type float64; allowed: strings, integers or booleans"),
        (["a", "b"], np.array(["x", 3], dtype=object), "y: labels of several types"),
        (["a", "b"], [["x"], ["y"]], r"y: got shape \(2, 1\), expected .*, or \(2, C\), a 0 or 1 for each of C labels"),
        (
            ["a", "b"],
            [[0, 1], [2, 0]],
            "y: got 2 in a matrix; allowed: 0 and 1, whether the row has the column",
        ),
        (["a", "b"], [["x", "y"], ["y", "x"]], "y: got 'x' in a matrix"),
        (["a", "b"], [["x"], ["x", "y"]], "y: its rows differ in length; give one label a text, or several as 0 and 1"),
        (["a", "b"], [[0, 0], [0, 0]], "y: no row has a label; training needs one or more"),
        (["a", "b"], ["x", "x"], "y: all 2 labels are the same; training needs two classes or more"),
        (["a", "b"], ["x", "y"], "X: too few different train texts"),
    ],
)
def test_bad_rows_are_one_line(make, texts, labels, message):
    with pytest.raises(DHTError, match=message):
        make().fit(texts, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 2}, "budget: got 2"),
        ({"validation_fraction": 1}, r"validation_fraction: got 1, allowed: a number in \(0, 1\)"),
        ({"random_state": None}, "random_state: got None, allowed: an integer"),
        ({"class_weight": "even"}, "class-weights: got 'even', allowed: none, balanced"),
    ],
)
def test_bad_parameters_are_one_line(make, changes, message):
    with pytest.raises(DHTError, match=message):
        make(**changes).fit(X, Y)


def test_without_scikit_learn_the_import_says_which_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "dht.sklearn")
    with pytest.raises(ImportError) as caught:
        importlib.import_module("dht.sklearn")
    assert str(caught.value) == (
        'dht.sklearn needs scikit-learn, which is not installed; run pip install "dht-transformer[sklearn]"'
    )
    assert isinstance(caught.value, DHTError)
