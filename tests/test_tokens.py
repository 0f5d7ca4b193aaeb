"""A tag a token: from a file through training, evaluation and prediction, and the parts between."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)
from typer.testing import CliRunner

import dht.train as training
from builders import _CHANGED, LENGTHS, SIZES, _spread, batch, dynamic_model, random_plan
from dht.cli import app
from dht.config import TrainSettings
from dht.data import load_data, read_texts
from dht.errors import ConfigError, DataError, DHTError
from dht.evaluate import evaluate
from dht.export.graphs import PlanGraph
from dht.hf.configuration import DHTConfig
from dht.hf.convert import FAMILIES, convert, export, load_source
from dht.hf.modeling import DHTForSequenceClassification, DHTForTokenClassification, exit_loss
from dht.load import load_run, tokenise
from dht.measure import run_policy
from dht.metrics import entities, entity_scores
from dht.model.execute import execute
from dht.model.reference import reference
from dht.plan import Plan
from dht.policy.baselines import DensePolicy, FixedPlan, StaticPolicy
from dht.policy.reward import quality
from dht.predict import predict
from dht.task import Entities, SingleLabel, TokenTags, task_of
from dht.words import encode_words
from test_train import FIELDS, encoder  # noqa: F401

NAMES, PLACES = ["ada", "grace", "alan", "emmy"], ["london", "paris", "rome", "oslo"]
FILLER = ["the", "went", "to", "saw", "a", "house", "in", "and", "unbelievably", "quickly"]
DENSE = DensePolicy(SIZES["num_attention_heads"])


def sentence(rng):
    """Words with entities of one or two words: what follows `mr` belongs to the person."""
    words, tags = [], []
    for _ in range(rng.randint(2, 6)):
        kind = rng.random()
        if kind < 0.25:
            words, tags = [*words, "mr", rng.choice(FILLER)], [*tags, "B-PER", "I-PER"]
        elif kind < 0.4:
            words, tags = [*words, rng.choice(NAMES)], [*tags, "B-PER"]
        elif kind < 0.6:
            words, tags = [*words, rng.choice(PLACES)], [*tags, "B-LOC"]
        else:
            words, tags = [*words, rng.choice(FILLER)], [*tags, "O"]
    return {"tokens": words, "tags": tags}


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps(row) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tagged(encoder, tmp_path_factory):  # noqa: F811
    folder, rng = tmp_path_factory.mktemp("tagged"), random.Random(0)
    counts = {"train": 600, "validation": 150, "test": 100}
    data = write(folder / "data", **{split: [sentence(rng) for _ in range(n)] for split, n in counts.items()})
    settings = TrainSettings(
        data=str(data), model=str(encoder), out=folder / "run", budget=0.6, epochs=4, batch_size=16, lr=3e-3,
        max_length=24, device="cpu", task="token", train_budget=10.0,
    )  # fmt: skip
    news = []
    return folder / "run", training.train(settings, say=news.append), news


def tagger(family="dht", **settings):
    """A small tagger of random weights; of a family of `transformers`, converted from its own."""
    if family != "dht":
        model = convert(plain_tagger(family), widths=[2, 4, 5], wide_from=3, **settings)
        for exit_ in model.encoder.exits[:-1]:
            _spread(exit_)
        return model.eval()
    torch.manual_seed(0)
    sizes = SIZES | {"norm": "pre", "type_vocab_size": 0, "widths": [2, 4, 5], "wide_from": 3}
    return _spread(DHTForTokenClassification(DHTConfig(head="token", **sizes | settings))).eval()


def plain_tagger(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | _CHANGED.get(family, {}))
    return _spread(AutoModelForTokenClassification.from_config(config)).eval()


def tagged_batch(lengths=LENGTHS, pad=0):
    """A batch whose rows have tags at some of their tokens, one row at none."""
    inputs = batch(lengths, pad=pad)
    shape, generator = inputs["input_ids"].shape, torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, shape, generator=generator)
    tags = (torch.rand(shape, generator=generator) < 0.7) & inputs["attention_mask"].bool()
    tags[min(2, len(lengths) - 1)] = False
    return inputs | {"labels": torch.where(tags, labels, -100)}


def placed_anywhere(inputs):
    """The batch with its padding on the left in some rows and between tokens in others."""
    order = torch.arange(inputs["input_ids"].shape[1]).repeat(len(LENGTHS), 1)
    order[1::3] = order[1::3].flip(1)
    order[2::3] = order[2::3].roll(2, 1)
    return {name: part.gather(1, order) for name, part in inputs.items()}


@pytest.mark.parametrize(("family", "arranged"), [("dht", False), ("dht", True), ("modernbert", False)])
def test_the_executor_equals_the_reference(family, arranged):
    model = tagger(family)
    inputs = tagged_batch(pad=model.config.pad_token_id)
    inputs = placed_anywhere(inputs) if arranged else inputs
    labels = inputs.pop("labels")
    plan = random_plan(len(LENGTHS))
    trace = execute(model.encoder, FixedPlan(plan), **inputs)
    exit_loss(trace, labels, model.task).backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    exits = reference(model.encoder, plan, **inputs)
    total, weight = torch.zeros(len(labels)), torch.zeros(len(labels))
    for index, logits in enumerate(exits):
        at = labels != -100
        each = F.cross_entropy(logits.nan_to_num(neginf=0.0).mT, labels, reduction="none")
        loss = (each * at).sum(-1) / at.sum(-1).clamp_min(1)
        passed = (plan.layers > index).float()
        total, weight = total + passed * loss, weight + passed
    (total / weight).mean().backward()
    last = torch.stack(exits, 1)[torch.arange(len(labels)), plan.layers - 1]
    torch.testing.assert_close(trace.logits, last, atol=1e-4, rtol=1e-5)
    for name, parameter in model.named_parameters():
        slow = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(fast.get(name, torch.zeros_like(parameter)), slow, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert", "dht"])
def test_executed_flops_equal_the_counter(family):
    def counted(run):
        plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
            run()
        return counter.get_total_flops()

    model = tagger(family)
    inputs = batch(pad=model.config.pad_token_id)
    inputs.pop("labels")
    plan = FixedPlan(random_plan(len(LENGTHS)))
    trace = execute(model.encoder, plan, **inputs)
    assert float(trace.flops.sum()) == counted(lambda: execute(model.encoder, plan, **inputs))
    inputs = batch((8, 8, 8))
    inputs.pop("labels")
    dense = float(execute(model.encoder, DENSE, **inputs).dense_flops.sum())
    assert dense == counted(lambda: execute(model.encoder, DENSE, **inputs))
    if family != "dht":
        assert dense == counted(lambda: export(model).eval()(**inputs))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_token_classifier_of_transformers_comes_and_goes_with_its_head(family, tmp_path):
    plain = plain_tagger(family)
    model = convert(plain).eval()
    assert isinstance(model, DHTForTokenClassification)
    inputs = tagged_batch(pad=plain.config.pad_token_id)
    labels = inputs.pop("labels")
    keep = inputs["attention_mask"].bool()
    expected = plain(**inputs).logits
    got = model(**inputs, policy=DENSE).logits
    assert got.shape == expected.shape
    torch.testing.assert_close(got[keep], expected[keep], atol=1e-4, rtol=1e-4)
    assert bool((got[~keep] == 0).all())
    theirs = torch.stack([F.cross_entropy(row, row_tags) for row, row_tags in zip(expected, labels, strict=True)])
    loss = model(**inputs, labels=labels, policy=DENSE).loss
    torch.testing.assert_close(loss, theirs.nan_to_num(0.0).mean(), atol=1e-4, rtol=1e-4)
    back = export(model)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, msg=name)
    plain.save_pretrained(tmp_path)
    assert type(load_source(tmp_path, 3, "token")).__name__.endswith("ForTokenClassification")
    assert not hasattr(load_source(tmp_path, 3), "classifier"), "its head is for tokens"
    assert not hasattr(load_source(tmp_path, 5, "token"), "classifier"), "a head for other tags"


def test_it_is_saved_and_loaded_as_every_model(tmp_path):
    model = tagger("bert")
    model.save_pretrained(tmp_path)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert type(again) is DHTForTokenClassification
    inputs = batch()
    del inputs["labels"]
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(
        ConfigError, match="head: got 'token', which DHTForSequenceClassification is not for; use DHTFor"
    ):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="head: got 'classifier', which DHTForTokenClassification is not for"):
        DHTForTokenClassification(DHTConfig(**SIZES))


def test_a_row_depends_neither_on_its_batch_nor_on_padding():
    model = tagger()
    inputs = batch()
    del inputs["labels"]
    together = model(**inputs)
    for row, length in enumerate(LENGTHS):
        keep = inputs["attention_mask"][row].bool()
        alone = model(inputs["input_ids"][row, keep][None])
        assert alone.logits.shape == (1, length, 3)
        torch.testing.assert_close(together.logits[row, keep], alone.logits[0], atol=1e-5, rtol=1e-4)
        assert int(together.trace.layers[row]) == int(alone.trace.layers[0])
        torch.testing.assert_close(together.trace[row].logits[0, keep], alone.logits[0], atol=1e-5, rtol=1e-4)
    assert model(inputs["input_ids"][:0]).logits.shape == (0, 13, 3)


def test_quality_and_loss_by_hand():
    model = tagger()
    inputs = batch((4, 2))
    del inputs["labels"]
    trace = model(**inputs, every_exit=True, mode="survey").trace
    labels = torch.tensor([[-100, 0, 1, 2], [-100, -100, -100, -100]])
    logits = torch.full((2, 4, 3), -1.0)
    logits[0, [1, 2, 3], [0, 1, 1]] = 2.0  # two of three tags are right
    logits[1, 2:] = -math.inf
    for exit_ in trace.exits:
        exit_.logits = logits[exit_.rows]
    paid = quality(trace, labels, model.task)
    torch.testing.assert_close(paid, torch.tensor([[2 / 3] * 3, [1.0] * 3], dtype=torch.float64))
    high, low = (math.exp(x) / (math.exp(2) + 2 * math.exp(-1)) for x in (2, -1))
    sure = quality(trace, labels, TokenTags(("a", "b", "c"), "probability"))
    torch.testing.assert_close(sure[0], torch.full((3,), (2 * high + low) / 3, dtype=torch.float64))
    assert sure[1].tolist() == [1.0] * 3
    losses = model.task.losses(logits, labels)
    assert losses.tolist() == pytest.approx([-(2 * math.log(high) + math.log(low)) / 3, 0.0])


def test_what_the_policy_reads_of_an_exit():
    task = TokenTags(("a", "b", "c"))
    now, before = torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    now[1, 2], before[1, 2] = -math.inf, -math.inf
    seen, alone = task.context(now, before), SingleLabel(3)
    for row, tokens in enumerate((3, 2)):
        each = alone.context(now[row, :tokens], before[row, :tokens])
        expected = each.mean(0)
        expected[1] = expected[0].square()
        torch.testing.assert_close(seen[row], expected)
        torch.testing.assert_close(task.confidence(now)[row].double(), expected[0])
        assert bool(task.agree(now, before)[row]) == bool(each[:, 4].all())
    assert task.context(now, None)[:, 4:].abs().max() == 0
    torch.testing.assert_close(task.typical(seen[:, 0]), alone.typical(seen[:, 0]))
    assert task.least_sure == 1 / 3


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("I-PER I-PER O I-PER", [("PER", 0, 2), ("PER", 3, 4)]),
        ("B-time-of-day I-time-of-day", [("time-of-day", 0, 2)]),
        ("", []),
    ],
)
def test_entities_of_tags(tags, found):
    assert entities(tags.split()) == found


@pytest.mark.parametrize(
    ("said", "scores"),
    [
        ("B-PER I-PER O B-LOC", (1.0, 1.0, 1.0)),
        ("B-PER O O B-LOC", (0.5, 0.5, 0.5)),  # an end is wrong
        ("B-PER I-PER O B-PER", (0.5, 0.5, 0.5)),  # a type is wrong
        ("O O O B-LOC", (2 / 3, 1.0, 0.5)),
        ("B-PER I-PER B-LOC B-LOC", (0.8, 2 / 3, 1.0)),
        ("O O O O", (0.0, 0.0, 0.0)),
    ],
)
def test_scores_of_entities(said, scores):
    got = entity_scores([["B-PER", "I-PER", "O", "B-LOC"], ["O"]], [said.split(), ["O"]])
    assert (got["entity_f1"], got["entity_precision"], got["entity_recall"]) == pytest.approx(scores)


def test_scores_without_entities_and_of_other_tags():
    assert entity_scores([["O"]], [["O"]]) == {"entity_f1": 1.0, "entity_precision": 1.0, "entity_recall": 1.0}
    assert entity_scores([["O"]], [["B-X"]])["entity_f1"] == 0.0
    names = {0: "B-PER", 1: "I-PER", 2: "O"}
    entity = task_of(DHTConfig(head="token", id2label=names))
    assert entity == Entities(("B-PER", "I-PER", "O"))
    labels, answers = torch.tensor([[-100, 0, 1, 2]]), torch.tensor([[0, 0, 2, 2]])
    figures = entity.metrics(labels, answers)
    assert (figures["accuracy"], figures["entity_f1"]) == (pytest.approx(2 / 3), 0.0)
    plain = task_of(DHTConfig(head="token", id2label={0: "NOUN", 1: "O"}))
    assert (type(plain), plain.metric) == (TokenTags, "macro_f1")
    assert plain.metrics(torch.tensor([[0, 1]]), torch.tensor([[0, 0]])) == {"accuracy": 0.5, "macro_f1": 1 / 3}
    assert plain.metrics(torch.tensor([[-100]]), torch.tensor([[0]])) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_the_first_token_of_a_word_has_its_tag(minilm_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    rows = [{"tokens": ["unbelievably", "\u200b", "nice", "Paris"], "tags": ["O", "O", "B-X", "I-X"]}] * 2
    split = load_data(write(tmp_path, train=rows, validation=rows), splits=("train",), task="token").train
    (row, _) = tokenise(tokenizer, split, 6)
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert pieces[1:5] == ["un", "##bel", "##ie", "##va"]
    assert row["tags"] == [-100, 2, -100, -100, -100, -100], "2 is O; the rest is cut off"
    ((row, _), (places, _)) = encode_words(tokenizer, split.words, 64)
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert [pieces[place] for place in places.values()] == ["un", "nice", "paris"]
    assert list(places) == [0, 2, 3], "nothing is left of a zero-width space"


def test_rows_are_read_as_they_come(tmp_path):
    rows = [{"tokens": ["Ada", "wrote"], "ner_tags": [1, 0]}, {"tokens": ["a"], "ner_tags": [2]}]
    data = load_data(write(tmp_path / "a", train=rows, validation=rows), splits=("train",), task="token")
    assert (data.label_names, data.train.labels, data.train.words[0]) == (
        ["0", "1", "2"],
        [[1, 0], [2]],
        ["Ada", "wrote"],
    )
    assert any("label 'ner_tags' (inferred" in note for note in data.notes)
    assert data.train.rows([1]).inputs == [["a"]]
    names = ["O", "B-PER", "I-PER"]
    known = load_data(tmp_path / "a", splits=("train",), task="token_classification", label_names=names)
    assert known.train.labels == [[1, 0], [2]]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.tsv").write_text('words\ttags\n["x", "y"]\t["O", "B-A"]\n["z"]\t["O"]\n', encoding="utf-8")
    table = load_data(tmp_path / "b", task="token", splits=("train", "validation"))
    assert sorted(table.train.words + table.validation.words) == [["x", "y"], ["z"]]
    assert list(read_texts(["a b\n", '{"tokens": ["c d"]}'], tagged=True)) == [["a", "b"], ["c d"]]


def test_data_sets_declare_their_tags():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER"])),
        }
    )
    table = datasets.Dataset.from_dict({"tokens": [["Ada", "ran"]], "ner_tags": [[1, 0]]}, features=features)
    data = load_data({"train": table}, splits=("train",), task="token")
    assert (data.label_names, data.train.labels) == (["O", "B-PER"], [[1, 0]])


GOOD = {"tokens": ["a", "b"], "tags": ["O", "B-X"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "a b", "tags": ["O"]}, "line 2: words 'a b'; allowed: a list of strings, such as"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, r"line 2: words \['a', 3\]; allowed: a list of strings"),
        ({"tokens": [], "tags": []}, r"line 2: no words \(got \[\]\); write some there or remove the row"),
        ({"tokens": ["a"], "tags": None}, "line 2: no tags; allowed: a list with a tag for each word"),
        ({"tokens": ["a"], "tags": "O"}, "line 2: tags 'O'; allowed: a list with a tag for each word"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "line 2: 1 words, but 2 tags; give each word one tag"),
        ({"tokens": ["a"], "tags": [0.5]}, "line 2: label 0.5; allowed: an integer or a class name"),
        ({"tokens": ["a"], "tags": [1]}, "line 2: tag 1: some tags are integers, others names; use either"),
        ({"words": ["a"], "tags": ["O"]}, "line 2: no column 'tokens'; columns there: .* with --text-column"),
    ],
)
def test_rows_that_cannot_be_tagged(row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path, train=[GOOD, row]), splits=("train",), task="token")


def test_splits_that_cannot_be_tagged(tmp_path):
    for name, rows, message in (
        ("one", [{"tokens": ["a"], "tags": ["O"]}], "all words have the tag 'O'; training needs two tags or more"),
        ("none", [], "no rows; the train split needs at least one"),
        ("two", [{"tokens": ["a"], "ner_tags": ["O"], "labels": ["O"]}], "the tags could be .* with --label-column"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(write(tmp_path / name, train=rows), splits=("train",), task="token")
    write(tmp_path / "other", train=[GOOD], test=[{"tokens": ["a"], "tags": ["B-Y"]}])
    with pytest.raises(DataError, match="line 1: label 'B-Y' is not a known class; allowed: 'B-X', 'O'"):
        load_data(tmp_path / "other", splits=("train", "test"), task="token")


def test_tags_are_learned(tagged):
    out, report, _ = tagged
    figures = {"entity_f1", "entity_precision", "entity_recall", "full_depth_entity_f1", "full_depth_accuracy"}
    assert set(report) >= FIELDS | figures
    assert (report["task"], report["metric"]) == ("token_classification", "entity_f1")
    assert report["entity_f1"] > 0.8
    assert report["accuracy"] > 0.85
    assert report["flops_fraction"] == pytest.approx(0.6, abs=0.15)
    assert report["transformers_seconds"] > 0
    config = json.loads((out / "config.json").read_text())
    assert (config["head"], config["architectures"]) == ("token", ["DHTForTokenClassification"])
    model, _ = load_run(out)
    assert type(model) is DHTForTokenClassification
    assert model.config.label_names == {0: "B-LOC", 1: "B-PER", 2: "I-PER", 3: "O"}
    assert "token-classification" in (out / "README.md").read_text()


def test_two_budgets_and_the_rivals_are_evaluated(tagged):
    out, report, _ = tagged
    data = str(out.parent / "data")
    low, high = (evaluate(out, data, budget=budget, device="cpu", repeats=1) for budget in (0.4, 0.9))
    assert low["flops_fraction"] < high["flops_fraction"]
    assert high["entity_f1"] > report["full_depth_entity_f1"] - 0.1
    for policy in ("patience", "confidence", "random"):
        rival = evaluate(out, data, budget=0.6, policy=policy, device="cpu", repeats=1)
        assert rival["flops_fraction"] == pytest.approx(0.6, abs=0.2)
        assert rival["entity_f1"] > 0.4


def test_tagging_through_the_command_line(tagged):
    out, report, _ = tagged
    asked = 'mr house went to rome\n{"tokens": ["grace", "\\u200b", "unbelievably"]}\n'
    result = CliRunner().invoke(app, ["predict", str(out)], input=asked)
    assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert set(first) == {"tokens", "tags", "scores", "layers", "heads", "flops_fraction"}
    assert first["tokens"] == ["mr", "house", "went", "to", "rome"]
    assert first["tags"] == ["B-PER", "I-PER", "O", "O", "B-LOC"]
    assert min(first["scores"]) > 0.25
    assert (second["tags"], second["scores"][1]) == (["B-PER", None, "O"], None)
    cut = CliRunner().invoke(app, ["predict", str(out), "--max-length", "4"], input="mr house went\n")
    assert json.loads(cut.stdout)["tags"][2] is None
    empty = CliRunner().invoke(app, ["predict", str(out)], input='{"tokens": []}\n')
    assert isinstance(empty.exception, DataError)
    assert "no words" in str(empty.exception)
    result = CliRunner().invoke(app, ["evaluate", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["entity_f1"] == report["entity_f1"]
    assert "entity f1" in result.stderr


def test_predictions_are_what_is_evaluated(tagged):
    out, report, _ = tagged
    model, tokenizer = load_run(out)
    split = load_data(out.parent / "data", splits=("test",), task="token").test
    names = model.config.label_names
    told = list(predict(model, tokenizer, split.inputs, details=True))
    pairs = [
        (names[a], b)
        for tags, row in zip(split.labels, told, strict=True)
        for a, b in zip(tags, row["tags"], strict=True)
    ]
    assert sum(a == b for a, b in pairs) / len(pairs) == pytest.approx(report["accuracy"])
    assert told[0]["exits"][-1] == {"prediction": told[0]["tags"], "score": told[0]["scores"]}
    with pytest.raises(DataError, match="text 2: words 3; allowed: a list of strings"):
        list(predict(model, tokenizer, ["fine", 3]))


def test_it_serves_a_pipeline(tagged):
    out, _, _ = tagged
    tag = pipeline("token-classification", model=str(out), aggregation_strategy="simple")
    assert [found["entity_group"] for found in tag("grace went to rome")] == ["PER", "LOC"]


def test_the_dense_model_is_exported(tagged, tmp_path):
    out, _, _ = tagged
    result = CliRunner().invoke(app, ["export", str(out), "--out", str(tmp_path / "plain")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["head"]
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "BertForTokenClassification"
    result = CliRunner().invoke(app, ["export", str(out), "--out", str(tmp_path / "c"), "--format", "onnx-chain"])
    assert "--format onnx-chain: the model is for token_classification" in str(result.exception)


@pytest.mark.parametrize("family", ["bert", "modernbert", "dht"])
def test_a_plan_as_padded_tensors_is_the_executors(family):
    model = tagger(family)
    inputs = batch(pad=model.config.pad_token_id or 0)
    keep = inputs["attention_mask"].bool()
    del inputs["labels"]
    units = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    if family == "modernbert":
        units[2] = True  # the last exit has a head of its own
    with torch.no_grad():
        got = PlanGraph(model.encoder, units)(**inputs)
        plan = FixedPlan(Plan(units[None].expand(len(LENGTHS), -1, -1)), reads_exits=False)
        expected = model(**inputs, policy=plan).logits
    torch.testing.assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_a_plan_is_exported_as_one_graph(tagged, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, _, _ = tagged
    call = ["export", str(out), "--out", str(tmp_path / "m.onnx"), "--format", "onnx", "--plan", "2x4"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["layers"], report["units"]) == (2, 4)
    assert report["max_difference"] < 1e-4
    model, tokenizer = load_run(out)
    texts = ["grace went to rome", "mr house saw oslo and paris"]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    (got,) = runtime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {k: v.numpy() for k, v in rows.items()})
    with torch.inference_mode():
        expected = model(**rows, policy=StaticPolicy(2, 4, model.policy.ranking())).logits
    keep = rows["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(got)[keep], expected[keep], atol=1e-4, rtol=1e-4)


def test_it_is_timed_with_tags_at_every_length(tagged, monkeypatch):
    import dht.bench.inputs as bench_inputs

    monkeypatch.setattr(bench_inputs, "TIMED_ROWS", 4)
    monkeypatch.setattr(bench_inputs, "SINGLE_ROWS", 2)
    out, _, _ = tagged
    call = ["bench", "--model", str(out), "--batch", "4", "--training-batch", "4", "--tokens", "9,mix"]
    result = CliRunner().invoke(app, [*call, "--fractions", "1.0,.5", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert {(row[1], row[4], row[5]) for row in rows} >= {
        (what, tokens, plan)
        for what in ("inference", "training") for tokens in (9, "mix") for plan in ("dense", "depth", "worst")
    }  # fmt: skip
    tokenizer = load_run(out)[1]
    data = load_data(json.loads((out / "run.json").read_text())["data"], splits=("test",), task="token")
    timed = bench_inputs.Rows(tokenizer, data, 24, seed=0).batches(4, 9)
    assert timed[0]["labels"].shape == (4, 9)
    assert {int((part["labels"] != -100).sum() > 4) for part in timed} == {1}, "most tokens have a tag to learn from"


@pytest.mark.parametrize(
    ("row", "columns", "task"),
    [
        ({"tokens": ["a", "b"], "tags": ["O", "X"]}, {}, "token_classification"),
        ({"words": ["a", "b"], "labels": [0, 1], "text": "a b"}, {}, "multi_label_classification"),
        ({"id": 3, "tokens": ["a", "b"], "ner_tags": [0, 1], "label": "x"}, {}, "token_classification"),
        ({"tokens": ["a", "b"], "text": "a b", "pos": ["V", "N"]}, {"label_column": "pos"}, "multi_label"),
        ({"tokens": ["a", "b"], "pos": ["V", "N"]}, {"label_column": "pos"}, "token_classification"),
        ({"seq": ["a", "b"], "pos": ["V", "N"]}, {"text_column": "seq", "label_column": "pos"}, "token_classification"),
    ],
)
def test_tags_are_told_by_names_or_by_what_the_columns_hold(row, columns, task, tmp_path):
    made = load_data(write(tmp_path, train=[row] * 2), splits=("train",), task="auto", **columns)
    assert made.task.startswith(task)
    if task == "token_classification":
        assert made.train.words == [["a", "b"]] * 2
        assert (
            "task: token (rows are lists of words, with 2 kinds of tags; inferred; --task names another)" in made.notes
        )


def test_tags_are_found_in_tables_too(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    pq.write_table(
        pa.table({"tokens": [["Ada", "wrote"], ["so"]], "ner_tags": [[1, 0], [0]]}), tmp_path / "data/train.parquet"
    )
    made = load_data(tmp_path / "data", splits=("train",), task="auto")
    assert (made.task, made.train.labels) == ("token_classification", [[1, 0], [0]])
    (tmp_path / "data/train.parquet").unlink()
    (tmp_path / "data/train.csv").write_text(
        'tokens,tags\n"[""Ada"", ""wrote""]","[""B-X"", ""O""]"\n', encoding="utf-8"
    )
    assert load_data(tmp_path / "data", splits=("train",), task="auto").train.words == [["Ada", "wrote"]]


def test_dense_training_and_presets(tmp_path):
    rng = random.Random(0)
    data = write(tmp_path / "data", train=[sentence(rng) for _ in range(40)], validation=[sentence(rng)] * 4)
    settings = TrainSettings(
        data=str(data), model="preset:tiny", out=tmp_path / "run", epochs=1, batch_size=16, device="cpu", task="token",
        dense=True, max_length=16,
    )  # fmt: skip
    report = training.train(settings)
    assert (report["policy"], report["metric"]) == ("dense", "entity_f1")
    weighted = TrainSettings(**{**settings.as_json(), "out": tmp_path / "no", "class_weights": "balanced"})
    with pytest.raises(DHTError, match="--class-weights: got 'balanced', but the task is token_classification"):
        training.train(weighted)


def test_batches_of_different_lengths_make_one_outcome():
    model = tagger()
    batches = [tagged_batch(), tagged_batch((3, 5))]
    outcome = run_policy(model, batches, FixedPlan(Plan(torch.ones(7, 3, 5, dtype=torch.bool))))
    assert (outcome.labels.shape, outcome.exit_logits.shape) == ((9, 13), (9, 3, 13, 3))
    assert bool((outcome.labels[7:, 5:] == -100).all())
    assert outcome.predictions[outcome.labels == -100].unique().tolist() == [-100]
    right = (outcome.labels == outcome.predictions).all(-1)
    assert outcome.accuracy == float(right.double().mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "tokens"}, "head: got 'tokens', allowed: classifier, embedding, token"),
        ({"head": "token", "problem_type": "regression"}, "problem_type: got 'regression', a tagger has none"),
        ({"head": "token", "num_labels": 1}, "num_labels: got 1, a tagger needs 2 tags or more"),
        ({"head": "token", "class_weights": [1.0, 1.0]}, "but the task 'token_classification' takes none"),
    ],
)
def test_configurations_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        DHTConfig(**settings).check()


def test_labels_that_cannot_be():
    model, inputs = tagger(), tagged_batch((4, 2))
    with pytest.raises(
        ValueError, match=r"got int64 \[2\], allowed: integers, -100 where there is no tag, of shape \[2, 4"
    ):
        model(**inputs | {"labels": torch.zeros(2, dtype=torch.long)})
    inputs["labels"][1, 3] = 1
    with pytest.raises(
        ValueError, match="labels: row 1 has a tag at place 3, where attention_mask says that there is no"
    ):
        model(**inputs)


def test_a_tokenizer_that_does_not_tell_words():
    class Slow:
        is_fast = False

    with pytest.raises(DHTError, match="its tokenizer, Slow, does not tell which token comes from which word; tagging"):
        encode_words(Slow(), [["a"]], 8)


def test_other_tasks_have_no_place_for_tags():
    assert not DHTForSequenceClassification.tags
    assert not dynamic_model("dht").encoder.tags
