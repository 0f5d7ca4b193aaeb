"""Several labels a row, and numbers: from a file through training, evaluation and prediction, and the parts between."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn import metrics as known
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import dht.train as training
from builders import LENGTHS, batch, dynamic_model, plain_model, random_plan
from dht.bench.inputs import Rows
from dht.bench.settings import MIX
from dht.cli import app
from dht.compare.policies import Cascade
from dht.config import TrainSettings
from dht.data import load_data
from dht.errors import ConfigError, DHTError
from dht.evaluate import evaluate
from dht.hf.configuration import DHTConfig
from dht.hf.convert import convert, export
from dht.hf.modeling import DHTForSequenceClassification, exit_loss
from dht.load import load_run
from dht.measure import run_policy
from dht.metrics import macro_f1, number_scores, set_scores
from dht.model.execute import execute
from dht.model.reference import reference
from dht.policy.baselines import FixedPlan
from dht.policy.reward import quality
from dht.predict import predict
from dht.task import MultiLabel, Regression, SingleLabel, task_of
from test_train import FIELDS, encoder  # noqa: F401

TOPICS = {"sport": ["goal", "team", "match"], "money": ["bank", "price", "market"], "food": ["bread", "soup", "cheese"]}
FILLER = ["the", "a", "of", "and", "in", "was", "it", "on"]


def several(rng):
    """A text that names topics, and the topics."""
    topics = [topic for topic in TOPICS if rng.random() < 0.4]
    words = [rng.choice(TOPICS[topic]) for topic in topics] + rng.choices(FILLER, k=rng.randint(2, 8))
    rng.shuffle(words)
    return {"text": " ".join(words), "labels": topics}


def number(rng):
    """A text whose good and bad words count towards its score, which is far from standard."""
    good, bad = rng.randint(0, 3), rng.randint(0, 3)
    words = ["great"] * good + ["awful"] * bad + rng.choices(FILLER, k=rng.randint(2, 6))
    rng.shuffle(words)
    return {"text": " ".join(words), "label": 50.25 + 10 * (good - bad)}


def pair(rng):
    """Two texts that agree on the weather or do not: neither tells by itself."""
    here, there = rng.random() < 0.5, rng.random() < 0.5
    first = [*rng.choices(FILLER, k=rng.randint(1, 3)), "rain" if here else "sun"]
    second = ["wet" if there else "dry", *rng.choices(FILLER, k=rng.randint(1, 3))]
    return {"premise": " ".join(first), "hypothesis": " ".join(second), "label": "yes" if here == there else "no"}


def write(folder, make, **counts):
    rng = random.Random(0)
    folder.mkdir(exist_ok=True)
    for split, count in counts.items():
        lines = [json.dumps(make(rng)) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def train(make, encoder, folder, **changes):  # noqa: F811
    data = write(folder / "data", make, train=600, validation=150, test=100)
    settings = TrainSettings(
        data=str(data), model=str(encoder), out=folder / "run", budget=0.5, epochs=4, batch_size=16, lr=3e-3,
        max_length=24, device="cpu", train_budget=10.0,
    )  # fmt: skip
    news = []
    report = training.train(replace(settings, **changes), say=news.append)
    return folder / "run", report, news


@pytest.fixture(scope="module")
def tagged(encoder, tmp_path_factory):  # noqa: F811
    return train(several, encoder, tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def scored(encoder, tmp_path_factory):  # noqa: F811
    return train(number, encoder, tmp_path_factory.mktemp("number"))


def test_several_labels_are_learned(tagged):
    out, report, news = tagged
    assert any(line.startswith("task: multi (labels are lists of 3 classes; inferred; --task") for line in news)
    assert set(report) >= FIELDS | {"micro_f1", "macro_f1", "subset_accuracy", "label_accuracy", "full_depth_micro_f1"}
    assert (report["task"], report["metric"]) == ("multi_label_classification", "micro_f1")
    trivial = 2 * 0.4 / 1.4  # naming every topic always
    assert report["micro_f1"] > trivial + 0.2
    assert report["accuracy"] == report["subset_accuracy"]
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert load_run(out)[0].config.label_names == {0: "food", 1: "money", 2: "sport"}


def test_numbers_are_learned(scored):
    out, report, news = scored
    assert "task: regression (labels are numbers with fractions; inferred; --task names another)" in news
    assert set(report) >= FIELDS | {"mae", "rmse", "pearson", "spearman", "r2", "full_depth_r2"}
    assert report["accuracy"] is None
    assert report["r2"] > 0.5, "the mean of the labels has 0"
    assert report["rmse"] < 11
    config = load_run(out)[0].config
    assert config.label_mean == pytest.approx(50.25, abs=2)
    assert config.label_std == pytest.approx(15.8, abs=2)


def test_pairs_are_learned_and_served(encoder, tmp_path):  # noqa: F811
    out, report, _ = train(pair, encoder, tmp_path, epochs=6)
    assert report["accuracy"] > 0.8, "either text alone gives 0.5"
    low, high = (
        evaluate(out, str(tmp_path / "data"), budget=budget, device="cpu", repeats=1) for budget in (0.35, 0.9)
    )
    assert low["flops_fraction"] < high["flops_fraction"]
    asked = [{"premise": "the rain", "hypothesis": word} for word in ("wet", "dry")]
    result = CliRunner().invoke(app, ["predict", str(out)], input="\n".join(map(json.dumps, asked)))
    assert [json.loads(line)["label"] for line in result.stdout.splitlines()] == ["yes", "no"]
    split = load_data(tmp_path / "data", splits=("test",)).test
    model, tokenizer = load_run(out)
    told = [row["label"] for row in predict(model, tokenizer, split.inputs)]
    right = [["no", "yes"][label] == said for label, said in zip(split.labels, told, strict=True)]
    assert sum(right) / len(right) == report["accuracy"]
    rows = Rows(tokenizer, load_data(tmp_path / "data"), 24, 0)
    assert all("token_type_ids" in made for made in rows.batches(8, MIX))
    cascade = Cascade(model, model.policy, model, 1.1)
    assert run_policy(cascade, rows.batches(8, MIX), None).accuracy > 0.8, "the second model sees the pair too"


@pytest.mark.parametrize("which", ["tagged", "scored"])
def test_two_budgets_and_the_rivals_are_evaluated(which, request):
    out, trained, _ = request.getfixturevalue(which)
    data = str(out.parent / "data")
    low, high = (evaluate(out, data, budget=budget, device="cpu", repeats=1) for budget in (0.35, 0.9))
    assert low["flops_fraction"] < high["flops_fraction"]
    assert high[trained["metric"]] > trained[f"full_depth_{trained['metric']}"] - 0.15
    patient = evaluate(out, data, budget=0.6, policy="patience", device="cpu", repeats=1)
    assert patient["flops_fraction"] == pytest.approx(0.6, abs=0.15)
    if which == "tagged":
        assert evaluate(out, data, budget=0.6, policy="confidence", device="cpu", repeats=1)["micro_f1"] > 0.5
    else:
        with pytest.raises(DHTError, match="confidence: a regression has none; allowed: patience"):
            evaluate(out, data, budget=0.6, policy="confidence", device="cpu", repeats=1)


def test_several_labels_through_the_command_line(tagged, tmp_path):
    out, report, _ = tagged
    asked = "goal of the team in the match\nbread and bank\n"
    result = CliRunner().invoke(app, ["predict", str(out)], input=asked)
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["label"] for row in told] == [["sport"], ["food", "money"]]
    assert all(len(row["score"]) == len(row["label"]) and min(row["score"]) > 0.5 for row in told)
    assert set(told[0]) == {"label", "score", "layers", "heads", "flops_fraction"}
    file = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["evaluate", str(out), "--json", str(file), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["micro_f1"] == report["micro_f1"]
    assert "micro f1" in result.stdout
    assert "subset accuracy" in result.stdout


def test_numbers_through_the_command_line(scored):
    out, _, _ = scored
    result = CliRunner().invoke(app, ["predict", str(out)], input="great great great the\nawful awful in a\n")
    assert result.exit_code == 0, result.output
    best, worst = (json.loads(line) for line in result.stdout.splitlines())
    assert best["label"] - worst["label"] > 25
    assert best["score"] is None
    result = CliRunner().invoke(app, ["evaluate", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["spearman"] > 0.7
    model, tokenizer = load_run(out)
    detailed = next(iter(predict(model, tokenizer, ["great"], details=True)))
    assert detailed["exits"][-1]["prediction"] == detailed["label"]


@pytest.mark.parametrize("task", ["multi", "regression"])
def test_dense_training_of_every_task(task, encoder, tmp_path):  # noqa: F811
    make = several if task == "multi" else number
    _, report, _ = train(make, encoder, tmp_path, dense=True, epochs=0.3, task=task, train_budget=None)
    assert report["policy"] == "dense"
    assert report["own_dense_seconds"] > 0


def labels_of(problem, rows, outputs, generator):
    if problem == "regression":
        return torch.randn(rows, generator=generator) * 5 + 40
    return (torch.rand(rows, outputs, generator=generator) < 0.5).float()


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_executor_equals_the_reference(problem):
    outputs = 1 if problem == "regression" else 3
    settings = {"problem_type": problem, "num_labels": outputs}
    if problem == "regression":
        settings |= {"label_mean": 40.0, "label_std": 5.0}
    model = dynamic_model("dht", **settings)
    inputs = batch(LENGTHS)
    del inputs["labels"]
    labels = labels_of(problem, len(LENGTHS), outputs, torch.Generator().manual_seed(1))
    plan = random_plan(len(LENGTHS))
    trace = execute(model.encoder, FixedPlan(plan), **inputs)
    exit_loss(trace, labels, model.task).backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    exits = reference(model.encoder, plan, **inputs)
    total, weight = torch.zeros(len(labels)), torch.zeros(len(labels))
    for index, logits in enumerate(exits):
        if problem == "regression":
            loss = (logits[:, 0] - labels).square() / 25
        else:
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
        passed = (plan.layers > index).float()
        total, weight = total + passed * loss, weight + passed
    (total / weight).mean().backward()
    last = torch.stack(exits, 1)[torch.arange(len(labels)), plan.layers - 1]
    torch.testing.assert_close(trace.logits, last, atol=1e-4, rtol=1e-5)
    for name, parameter in model.named_parameters():
        slow = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(fast.get(name, torch.zeros_like(parameter)), slow, atol=2e-5, rtol=1e-4)


def test_quality_of_every_task_by_hand():
    model = dynamic_model("dht", problem_type="multi_label_classification")
    inputs = batch((4, 3))
    del inputs["labels"]
    trace = model(**inputs, every_exit=True, mode="survey").trace
    for exit_ in trace.exits:
        exit_.logits = torch.tensor([[2.0, -1.0, 0.0], [-1.0, -1.0, 3.0]])[exit_.rows]
    truth = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    paid = quality(trace, truth, model.task)
    torch.testing.assert_close(paid, torch.tensor([[2 / 3] * 3, [1 / 3] * 3], dtype=torch.float64))
    sure = quality(trace, truth, MultiLabel("probability"))
    expected = torch.tensor([2.0, 1.0, 0.0]).sigmoid().mean().double()
    torch.testing.assert_close(sure[0, 0], expected, atol=1e-6, rtol=0)

    numbers = Regression(10.0, 2.0)
    got = numbers.quality(torch.tensor([[11.0], [10.0], [20.0]]), torch.tensor([10.0, 10.0, 10.0]))
    assert got.tolist() == [0.75, 1.0, 0.0]
    assert numbers.losses(torch.tensor([[14.0]]), torch.tensor([10.0])).tolist() == [4.0]


def test_what_the_policy_reads_of_an_exit():
    several_labels = MultiLabel()
    now, before = torch.tensor([[[2.0, -2.0], [4.0, 0.0]], [[1.0, -3.0], [-4.0, 0.5]]], dtype=torch.float64)
    on = now.sigmoid()
    seen = several_labels.context(now, before)
    torch.testing.assert_close(seen[0, 0], on[0, 0])
    torch.testing.assert_close(seen[1, 0], (on[1, 0] + 0.5) / 2)
    assert seen[:, 4].tolist() == [1.0, 0.0]
    assert seen[1, 3].item() == pytest.approx(0.0), "the least sure label has no margin"
    assert several_labels.context(now, None)[:, 4:].abs().max() == 0

    numbers = Regression(10.0, 2.0)
    seen = numbers.context(*torch.tensor([[[11.0], [14.0]], [[11.2], [11.0]]], dtype=torch.float64))
    torch.testing.assert_close(seen[:, 0], torch.tensor([0.99, 0.0], dtype=torch.float64))
    assert seen[:, 4].tolist() == [1.0, 0.0]
    torch.testing.assert_close(seen[:, 5], torch.tensor([0.1, 1.0], dtype=torch.float64))
    assert numbers.context(torch.tensor([[11.0]]), None)[0, 0] == 0.5
    for task in (SingleLabel(4), several_labels):
        sure = torch.linspace(task.least_sure + 0.01, 0.99, 5)
        made = task.typical(sure)
        assert made.shape == (5, 4)
        torch.testing.assert_close(made[:, 0], sure)
        assert bool((made[1:, 2] < made[:-1, 2]).all()), "surer rows doubt less"
    logits = torch.tensor([[0.3, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
    probs = logits.softmax(-1)
    torch.testing.assert_close(SingleLabel(4).context(logits, None)[:, :4], SingleLabel(4).typical(probs[:, 0]))


@pytest.mark.filterwarnings("ignore")
def test_metrics_equal_a_known_library():
    rng = np.random.default_rng(0)
    true, said = rng.random((50, 4)) < 0.4, rng.random((50, 4)) < 0.4
    true[:, 3] = said[:, 3] = False
    got = set_scores(torch.tensor(true), torch.tensor(said))
    assert got["micro_f1"] == pytest.approx(known.f1_score(true, said, average="micro", zero_division=0))
    assert got["macro_f1"] == pytest.approx(known.f1_score(true[:, :3], said[:, :3], average="macro"))
    assert got["subset_accuracy"] == pytest.approx(known.accuracy_score(true, said))
    assert got["label_accuracy"] == pytest.approx(1 - known.hamming_loss(true, said))
    assert set_scores(torch.zeros(3, 2), torch.zeros(3, 2))["micro_f1"] == 1.0
    labels, answers = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    expected = known.f1_score(labels, answers, average="macro")
    assert macro_f1(torch.tensor(labels), torch.tensor(answers)) == pytest.approx(expected)

    true, said = rng.normal(size=40).round(1), rng.normal(size=40).round(1)
    got = number_scores(torch.tensor(true), torch.tensor(said))
    assert got["mae"] == pytest.approx(known.mean_absolute_error(true, said))
    assert got["rmse"] == pytest.approx(known.root_mean_squared_error(true, said))
    assert got["r2"] == pytest.approx(known.r2_score(true, said))
    assert got["pearson"] == pytest.approx(stats.pearsonr(true, said).statistic)
    assert got["spearman"] == pytest.approx(stats.spearmanr(true, said).statistic)
    flat = number_scores(torch.ones(3), torch.tensor([1.0, 1.0, 1.0]))
    assert (flat["r2"], flat["pearson"], flat["rmse"]) == (1.0, 0.0, 0.0)


def test_a_regressor_of_transformers_comes_and_goes_with_its_unit(tmp_path):
    plain = plain_model("bert", num_labels=1, problem_type="regression")
    model = convert(plain, label_mean=30.0, label_std=4.0).eval()
    assert isinstance(model.task, Regression)
    inputs = batch()
    del inputs["labels"]
    expected = plain(**inputs).logits
    got = model(**inputs, policy=FixedPlan(random_full(len(expected)))).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    back = export(model).eval()
    assert back.config.problem_type == "regression"
    torch.testing.assert_close(back(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(again, DHTForSequenceClassification)
    assert (again.config.label_mean, again.config.label_std) == (30.0, 4.0)
    assert task_of(DHTConfig(num_labels=1)) == Regression()


def random_full(rows):
    plan = random_plan(rows)
    plan.units[:] = True
    return plan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem_type": "regression", "num_labels": 2}, "problem_type: 'regression' has one output, got 2"),
        (
            {"num_labels": 1, "reward": "probability"},
            "reward: got 'probability', but the task 'regression' takes only 'correct'",
        ),
        ({"num_labels": 1, "label_std": 0.0}, "label_std: got 0.0, must be above 0"),
        ({"num_labels": 1, "label_mean": float("nan")}, "label_mean: got nan, allowed: a number"),
        ({"head": "embedding", "problem_type": "regression"}, "problem_type: got 'regression', an embedding has none"),
        ({"head": "embedding", "label_std": 2.0}, "label_mean, label_std: got 0, 2, only for a regression"),
        ({"label_std": 2.0}, "label_mean, label_std: got 0, 2, only for a regression"),
        (
            {"problem_type": "multi_label_classification", "class_weights": [1.0, 1.0]},
            r"class_weights: got \[1.0, 1.0\], but the task 'multi_label_classification' takes none",
        ),
    ],
)
def test_configurations_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        DHTConfig(**settings).check()


def test_settings_that_cannot_be(encoder, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="--task: got 'tags', allowed: auto, single, multi, regression"):
        TrainSettings(data="x", model="y", out=tmp_path, task="tags").check()
    with pytest.raises(DHTError, match="--class-weights: got 'balanced', but the task is regression"):
        train(number, encoder, tmp_path, class_weights="balanced")


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        (None, torch.ones(7), r"got float32 \[7\], allowed: integers of shape \[7\] for task 'single_label_cl"),
        ("multi_label_classification", torch.ones(7), r"got float32 \[7\], allowed: floats, 1 where .* \[7, 3\]"),
        ("regression", torch.ones(7, 1), r"got float32 \[7, 1\], allowed: floats of shape \[7\] for task 'reg"),
    ],
)
def test_labels_of_another_task(problem, labels, message):
    model = dynamic_model("dht", problem_type=problem, num_labels=1 if problem == "regression" else 3)
    with pytest.raises(ValueError, match=message):
        model(**batch() | {"labels": labels})
