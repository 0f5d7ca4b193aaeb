"""A budget dial for a fine-tuned classifier: weights untouched, rows never judged by exits that saw them."""

from __future__ import annotations

import copy
import hashlib
import json
import random

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel
from typer.testing import CliRunner

import dht
import dht.evaluate as evaluation
from builders import SIZES, batch, dynamic_model, plain_model
from dht.cli import app
from dht.data import Split, load_data
from dht.dial import FitSettings, fit_run
from dht.errors import ConfigError, DataError, DHTError
from dht.exits import fit_exits, lent
from dht.hf.convert import convert
from dht.load import by_length, load_classifier, load_run, tokenise
from dht.measure import run_policy
from dht.policy.baselines import DensePolicy
from test_train import FIELDS

DENSE = DensePolicy(4)


@pytest.fixture(scope="module")
def sentences(vader_path):
    """200 real sentences, 100 of each class, and their labels."""
    rows = load_data(str(vader_path), splits=("train",)).train
    draw = random.Random(0)
    chosen = [
        i for label in (0, 1) for i in draw.sample([j for j, given in enumerate(rows.labels) if given == label], 100)
    ]
    draw.shuffle(chosen)
    return [rows.texts[i] for i in chosen], [rows.labels[i] for i in chosen]


@pytest.fixture(scope="module")
def classifier(minilm_path, sentences):
    """A tiny BERT that answers by its words, each class as often: what a fine-tuned one does, without the training."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **names)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        inputs = tokenizer(sentences[0], padding=True, truncation=True, max_length=48, return_tensors="pt")
        model.classifier.weight.mul_(4 / model(**inputs).logits.diff().std())
        model.classifier.bias[1] -= model(**inputs).logits.diff().median()
    return model, tokenizer


@pytest.fixture(scope="module")
def fitted(classifier, sentences):
    return dht.fit(*classifier, *sentences, budget=0.7, max_length=48, batch_size=16)


@pytest.fixture(scope="module")
def folders(classifier, sentences, tmp_path_factory):
    """The classifier as a checkpoint, data with a test split, and a file of bare texts."""
    root = tmp_path_factory.mktemp("fit")
    for part in classifier:
        part.save_pretrained(root / "model")
    (root / "data").mkdir()
    rows = [json.dumps({"text": t, "label": ("negative", "positive")[y]}) for t, y in zip(*sentences, strict=True)]
    (root / "data" / "validation.jsonl").write_text("\n".join(rows[:120]), encoding="utf-8")
    (root / "data" / "test.jsonl").write_text("\n".join(rows[120:]), encoding="utf-8")
    (root / "texts.txt").write_text("\n".join(sentences[0]), encoding="utf-8")
    return root


def test_a_full_plan_gives_the_originals_logits(classifier, sentences, fitted):
    model, tokenizer = classifier
    inputs = tokenizer(sentences[0][:40], padding=True, truncation=True, max_length=48, return_tensors="pt")
    with torch.no_grad():
        theirs, ours = model(**inputs).logits, fitted.model(**inputs, policy=DENSE).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert theirs.argmax(-1).bincount().min() > 5


def test_the_weights_are_frozen_bit_for_bit(classifier, sentences):
    model, tokenizer = classifier
    before = copy.deepcopy(model.state_dict())
    ours = dht.fit(model, tokenizer, *sentences, max_length=48).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in convert(model, widths=[4]).state_dict().items():
        if not name.startswith(("policy.", "encoder.exits.0.", "encoder.exits.1.")):
            assert torch.equal(tensor, ours[name]), name


def test_budgets_are_met_and_cost_little(fitted):
    for point in fitted.dial((0.9, 0.7, 0.5)):
        # Few rows, and leaving moves a whole third of the FLOPs at once.
        assert point["flops_fraction"] == pytest.approx(point["budget"], abs=0.04)
        assert point["confidence"]["flops_fraction"] == pytest.approx(point["budget"], abs=0.1)
    whole, half, least = fitted.dial((1.0, 0.6, 0.01))
    assert whole["agreement"] >= half["agreement"] > 0.6
    assert half["agreement"] > least["agreement"] - 0.05
    assert least["flops_fraction"] == pytest.approx(fitted.lowest, abs=0.01)
    assert least["mean_layers"] == 1.0
    kept = float(fitted.model.policy.price)
    fitted.model.policy.set_budget(0.7)
    assert float(fitted.model.policy.price) == kept, "the dial is put back to the budget of the fit"


def test_without_labels_the_same_is_fitted(classifier, sentences, fitted):
    bare = dht.fit(*classifier, sentences[0], budget=0.7, max_length=48, batch_size=16)
    for (name, ours), theirs in zip(bare.model.state_dict().items(), fitted.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert "accuracy" in fitted.dial((0.5,))[0]
    assert "accuracy" not in bare.dial((0.5,))[0]
    named = [("negative", "positive")[label] for label in sentences[1]]
    again = dht.fit(*classifier, sentences[0], named, budget=0.7, max_length=48, batch_size=16)
    assert again.dial((0.5,)) == fitted.dial((0.5,)), "names and indices of classes are the same labels"


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "dht"])
def test_exits_answer_as_the_full_model_and_never_see_their_own_fold(family):
    model = dynamic_model(family, pooling="attention")
    inputs = [batch(tuple(3 + (i * 7 + j) % 9 for i in range(30)), seed=j) for j in range(4)]
    encoder, fold = model.encoder, torch.arange(120) % 3
    with torch.no_grad():  # answers that depend on the row
        encoder.exits[-1].classifier.weight.mul_(10)
    full = run_policy(model, inputs, DensePolicy(SIZES["num_attention_heads"]))
    teacher = full.exit_logits[:, -1].softmax(-1)
    other = teacher.clone()
    other[fold == 1] = teacher[fold == 1].flip(0)
    last = copy.deepcopy(encoder.exits[-1].state_dict())
    first, second = fit_exits(encoder, inputs, teacher, fold), fit_exits(encoder, inputs, other, fold)
    same = [
        all(torch.equal(a, b) for a, b in zip(x.state_dict().values(), y.state_dict().values(), strict=True))
        for x, y in zip(first, second, strict=True)
    ]
    assert same == [False, True, False]
    assert all(torch.equal(tensor, last[name]) for name, tensor in encoder.exits[-1].state_dict().items())

    fit_exits(encoder, inputs, teacher, fold)
    with torch.no_grad():
        logits = torch.cat(
            [
                model(b["input_ids"], b["attention_mask"], mode="probe", every_exit=True).trace.exit_table()[0]
                for b in inputs
            ]
        )
    blind = -(teacher * teacher.mean(0).log()).sum(-1).mean()
    for layer in range(2):
        told = -(teacher * logits[:, layer].log_softmax(-1)).sum(-1).mean()
        assert told < 0.95 * blind, layer


def test_lent_exits_are_given_back(fitted):
    encoder = fitted.model.encoder
    own = encoder.exits
    with pytest.raises(RuntimeError, match="inside"), lent(encoder, fitted.exits[0]):
        assert encoder.exits is fitted.exits[0]
        raise RuntimeError("inside")
    assert encoder.exits is own


def test_a_dynamic_model_keeps_its_last_exit(classifier, sentences, tmp_path):
    model, tokenizer = classifier
    dense = convert(model, widths=[2, 4], pooling="mean", ffn="dense").eval()
    dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    dense, tokenizer = load_classifier(str(tmp_path))
    fitted = dht.fit(dense, tokenizer, sentences[0], max_length=48)
    rows = by_length(tokenizer, tokenise(tokenizer, Split(*sentences), 48), 50)[0]
    theirs, ours = run_policy(dense, rows, DENSE), run_policy(fitted.model, rows, DENSE)
    assert torch.equal(theirs.exit_logits[:, -1], ours.exit_logits[:, -1])
    assert fitted.model.config.widths == [4]


def test_the_run_folder_is_like_any_other(folders, tmp_path):
    out = tmp_path / "run"
    settings = FitSettings(
        model=str(folders / "model"), data=str(folders / "data"), out=out, rows=100, max_length=48, budget=0.6
    )
    news = []
    report = fit_run(settings, say=news.append)
    assert json.loads((out / "report.json").read_text()) == report
    assert set(report) >= {name for name in FIELDS if "train" not in name}
    assert (report["num_examples"], report["fit_rows"], report["split"]) == (80, 100, "test")
    served = next(p for p in fit_points(report) if p["budget"] == 0.6)
    assert served["accuracy"] == report["accuracy"]
    assert report["dense_accuracy"] == report["full_depth_accuracy"]
    assert any("the weights stay as they are" in line for line in news)
    with pytest.raises(DHTError, match="already holds files"):
        fit_run(settings)

    evaluated = invoke("evaluate", out, "--max-length", 48)
    assert json.loads(evaluated.stdout.splitlines()[-1])["accuracy"] == report["accuracy"]
    cheap = json.loads(invoke("evaluate", out, "--budget", 0.4, "--max-length", 48).stdout.splitlines()[-1])
    assert cheap["flops_fraction"] < report["flops_fraction"]
    answer = json.loads(invoke("predict", out, "-", text="what a film\n").stdout)
    assert answer["label"] in ("negative", "positive")
    again = fit_run(FitSettings(**settings.__dict__ | {"model": str(out), "out": tmp_path / "again"}))
    assert again["dense_accuracy"] == report["dense_accuracy"], "a dial can be fitted again"


def test_rivals_are_matched_on_texts_that_the_fit_has_not_seen(classifier, folders, sentences, tmp_path, monkeypatch):
    made = []
    rival = evaluation.rival
    monkeypatch.setattr(evaluation, "rival", lambda *given: made.append(given[3]) or rival(*given))

    def matched_on(rows):
        out = tmp_path / str(rows)
        fit_run(FitSettings(str(folders / "model"), str(folders / "data"), out, rows=rows, max_length=48))
        news = []
        where = {"max_length": 48, "batch_size": 256, "repeats": 1, "say": news.append}
        evaluation.evaluate(out, str(folders / "data"), policy="confidence", **where)
        evaluation.evaluate(out, str(folders / "data"), split="validation", **where)
        return out, [tuple(ids[ids > 0].tolist()) for batch in made[-2] for ids in batch["input_ids"]], news

    out, matched, news = matched_on(60)
    known = set(json.loads((out / "fitted.json").read_text()))
    fresh = [t for t in sentences[0][:120] if hashlib.sha256(t.encode()).hexdigest()[:16] not in known]
    assert len(known) == len(fresh) == 60
    encoded = classifier[1](fresh, truncation=True, max_length=48)["input_ids"]
    assert sorted(matched) == sorted(map(tuple, encoded))
    assert news == ["60 of the 120 validation texts are those that dht fit was fitted on"]
    _, matched, news = matched_on(100)
    assert len(matched) == 120, "20 are too few to match on"
    assert news[0] == (
        "matched on validation, 100 of whose 120 texts dht fit was fitted on: on other texts the policy will spend "
        "more than the budget"
    )


def fit_points(report):
    return [point["measured"] for point in report["dial"]]


def invoke(*arguments, text=None):
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=text)
    assert result.exit_code == 0, result.output
    return result


def test_pairs_go_to_the_model_as_pairs(classifier, sentences, tmp_path):
    model, tokenizer = copy.deepcopy(classifier[0]), classifier[1]
    firsts, labels = ["it was so"] * 200, sentences[1]

    def answers(rows):
        cut = {"padding": True, "truncation": True, "max_length": 48, "return_tensors": "pt"}
        with torch.no_grad():
            return model(**tokenizer(firsts[rows], sentences[0][rows], **cut)).logits

    with torch.no_grad():
        model.classifier.bias[1] -= answers(slice(None)).diff().median()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [
        json.dumps({"premise": first, "hypothesis": second, "label": ("negative", "positive")[label]})
        for first, second, label in zip(firsts, *sentences, strict=True)
    ]
    data = tmp_path / "pairs"
    data.mkdir()
    (data / "validation.jsonl").write_text("\n".join(rows[:120]), encoding="utf-8")
    (data / "test.jsonl").write_text("\n".join(rows[120:]), encoding="utf-8")
    report = fit_run(FitSettings(str(tmp_path / "model"), str(data), tmp_path / "run", rows=60, max_length=48))
    right = (answers(slice(120, None)).argmax(-1) == torch.tensor(labels[120:])).double().mean()
    assert report["dense_accuracy"] == pytest.approx(float(right)), "as the classifier answers pairs"
    assert report["fit_rows"] == 60
    (data / "bare.jsonl").write_text("\n".join(rows), encoding="utf-8")
    bare = FitSettings(
        str(tmp_path / "model"), str(data / "bare.jsonl"), tmp_path / "bare", rows=60, unlabelled=True, max_length=48
    )
    assert fit_run(bare)["num_examples"] == 140


def test_the_command_prints_accuracy_against_budget(folders, tmp_path):
    shown = invoke(
        "fit", folders / "model", "--data", folders / "data", "--out", tmp_path / "a", "--rows", 60, "--split", "test",
        "--max-length", 32,
    )  # fmt: skip
    assert "20 texts" not in shown.output, "too few are left over to measure on"
    assert "80 texts (fit rows, cross-fitted)" not in shown.output
    assert "60 texts (fit rows, cross-fitted), fitted on 60" in shown.output
    assert "dense" in shown.output
    assert "0.26" in shown.output


def test_a_file_of_texts_is_enough(folders, tmp_path):
    shown = invoke(
        "fit", folders / "model", "--data", folders / "texts.txt", "--unlabelled", "--out", tmp_path / "b", "--rows",
        100, "--max-length", 32,
    )  # fmt: skip
    assert "100 texts (rows left over), fitted on 100" in shown.output
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["accuracy"] is None
    assert 0.5 < report["agreement"] <= 1.0
    assert load_run(tmp_path / "b")[0].config.budget == 0.5
    card = (tmp_path / "b" / "README.md").read_text()
    assert "Exits and policy fitted to the untouched weights on" in card
    assert "| accuracy |" not in card


def test_classes_without_names_take_those_of_the_data(classifier, folders, tmp_path):
    model, tokenizer = copy.deepcopy(classifier[0]), classifier[1]
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model.config.label2id = {"LABEL_0": 0, "LABEL_1": 1}
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    news = []
    fit_run(FitSettings(str(tmp_path / "m"), str(folders / "data"), tmp_path / "out", max_length=24), say=news.append)
    assert any("taken for those of the data, in order: 'negative', 'positive'" in line for line in news)
    assert load_run(tmp_path / "out")[0].config.id2label == {0: "negative", 1: "positive"}


def test_texts_and_labels_that_cannot_be_used(classifier, sentences):
    texts, labels = sentences
    for given, told, words in (
        (texts[:12], labels[:12], "texts: got 12, a dial needs 50 or more"),
        ("one text", None, "texts: got 1, "),
        ([*texts, ""], None, "texts: number 200 is ''; allowed: strings with something in them, or pairs"),
        ([*texts, ("a", "")], None, "texts: number 200 is ('a', ''); allowed: strings with something in them, or"),
        ([*texts, ("a", "b")], None, "texts: 200 single texts among 1 pairs; give one kind"),
        (texts, labels[:7], "labels: got 7 for 200 texts; give one each, or None"),
        (texts, [*labels[:199], 2], "labels: number 199 is 2; allowed: 'negative', 'positive', 0, 1"),
        (texts[:1] * 60, None, "to all 60; give texts of several classes"),
    ):
        with pytest.raises(DataError) as error:
            dht.fit(*classifier, given, told)
        assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"--budget: got 1.5, allowed: a number in \(0, 1\]"):
        dht.fit(*classifier, *sentences, budget=1.5)


def test_models_without_a_fitting_head(classifier, sentences, folders, minilm_path, tmp_path):
    tokenizer = classifier[1]
    sizes = {"vocab_size": 99, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    base = BertModel(BertConfig(**sizes, num_hidden_layers=2))
    with pytest.raises(DHTError, match="BertModel has no sequence classification head to keep; .* with dht train"):
        dht.fit(base, tokenizer, sentences[0])
    several = plain_model("bert", problem_type="multi_label_classification")
    with pytest.raises(DHTError, match="has 3 output.* and problem_type 'multi_label_classification'"):
        dht.fit(several, tokenizer, sentences[0])
    with pytest.raises(DHTError, match=r"has 1 output\(s\)"):
        dht.fit(plain_model("bert", num_labels=1), tokenizer, sentences[0])
    with pytest.raises(DHTError, match="it has one layer, so there is no depth to choose"):
        dht.fit(plain_model("bert", num_hidden_layers=1), tokenizer, sentences[0])
    with pytest.raises(DHTError, match="has no sequence classification head to keep; .*: dht train --model minilm"):
        load_classifier("minilm")
    with pytest.raises(DHTError, match="model: cannot load"):
        load_classifier(str(folders))
    good = {"model": str(folders / "model"), "data": str(folders / "data"), "out": tmp_path / "x"}
    with pytest.raises(
        ConfigError, match=r"2 problems: .*--split: got 'dev'.*--rows: got 7, allowed: 50 or more, 0 = all"
    ):
        FitSettings(**good | {"rows": 7, "split": "dev"}).check()
    with pytest.raises(DataError, match="is a file; give a data folder, or add --unlabelled"):
        fit_run(FitSettings(**good | {"data": str(folders / "texts.txt")}))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"premise": "a", "hypothesis": "b"}\n' * 60 + "a text alone\n")
    with pytest.raises(DataError, match="mixed.jsonl: 1 single texts among 60 pairs; give one kind"):
        fit_run(FitSettings(**good | {"data": str(mixed), "unlabelled": True}))
    three = copy.deepcopy(plain_model("bert"))
    three.save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(DataError, match="--data: 2 classes, but .*three has 3"):
        fit_run(FitSettings(**good | {"model": str(tmp_path / "three")}))
