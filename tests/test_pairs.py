"""Sentence pairs and class weights on their way from rows to the loss and to an answer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer
from typer.testing import CliRunner

import dht.train as training
from builders import batch, dynamic_model
from dht.cli import app
from dht.config import TrainSettings
from dht.data import Split
from dht.errors import ConfigError
from dht.hf.configuration import DHTConfig
from dht.hf.modeling import exit_loss
from dht.load import collate, encode, load_run, tokenise
from dht.predict import encode_mixed, predict
from dht.task import SingleLabel
from test_train import encoder  # noqa: F401


@pytest.fixture(scope="module")
def tokenizer(minilm_path):
    return AutoTokenizer.from_pretrained(minilm_path)


def test_pairs_are_encoded_as_the_tokenizer_does(tokenizer):
    split = Split(["it rains", "she sings a song"], [1, 0], ["it is wet outside", "no"])
    rows = tokenise(tokenizer, split, 64)
    made = collate(tokenizer, rows)
    expected = tokenizer(split.texts, split.pairs, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(made[name], expected[name]), name
    assert made["labels"].tolist() == [1, 0]
    assert made["token_type_ids"].any()
    assert "token_type_ids" not in collate(tokenizer, encode(tokenizer, split.texts, None, 64))
    short = encode(tokenizer, ["one " * 50], ["two " * 5], 16)[0]["input_ids"]
    assert len(short) == 16
    assert tokenizer.decode(short).count("two") == 5, "the longer text is cut"


def test_single_texts_and_pairs_in_one_batch(tokenizer):
    texts = ["alone", ("it rains", "it is wet"), "alone too"]
    rows = encode_mixed(tokenizer, texts, 32)
    made = collate(tokenizer, rows)
    for i, text in enumerate(texts):
        alone = tokenizer(*([text] if isinstance(text, str) else text))
        length = len(alone["input_ids"])
        assert made["input_ids"][i, :length].tolist() == alone["input_ids"]
        assert made["token_type_ids"][i, :length].tolist() == alone["token_type_ids"]
        assert made["attention_mask"][i].sum() == length


def test_class_weights_weigh_rows_of_the_loss():
    model, rows = dynamic_model(), batch()
    trace = model(**rows).trace
    total, weight = torch.zeros(7), torch.zeros(7)
    for exit_ in trace.exits:
        total[exit_.rows] += F.cross_entropy(exit_.logits, rows["labels"][exit_.rows], reduction="none")
        weight[exit_.rows] += 1
    by_class = torch.tensor([0.5, 3.0, 0.0])
    weighted = SingleLabel(3, class_weights=tuple(by_class.tolist()))
    expected = (total / weight * by_class[rows["labels"]]).mean()
    torch.testing.assert_close(exit_loss(trace, rows["labels"], weighted), expected)
    torch.testing.assert_close(exit_loss(trace, rows["labels"]), (total / weight).mean())
    model.config.class_weights = [1.0, 1.0, 0.0]
    assert model(**rows).loss.item() < exit_loss(trace, rows["labels"]).item()


def test_class_weights_that_cannot_be(tmp_path):
    settings = TrainSettings(data="x", model="y", out=tmp_path, class_weights="even")
    with pytest.raises(ConfigError, match="--class-weights: got 'even', allowed: none, balanced"):
        settings.check()
    with pytest.raises(ConfigError, match=r"class_weights: got \[1.0\], must be 2 finite numbers of at least 0"):
        DHTConfig(class_weights=[1.0]).check()


def test_a_pair_classifier_from_csv_to_answers(encoder, tmp_path):  # noqa: F811
    lines = ["premise,hypothesis,label"]
    lines += [f"it rains {i},{'it is wet' if i % 5 else 'it is dry'},{'yes' if i % 5 else 'no'}" for i in range(60)]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = TrainSettings(
        data=str(tmp_path), model=str(encoder), out=tmp_path / "run", budget=0.5, epochs=1, batch_size=8,
        max_length=24, device="cpu", class_weights="balanced",
    )  # fmt: skip
    news = []
    training.train(settings, say=news.append)
    assert any("text 'premise' with 'hypothesis', label 'label' (inferred;" in line for line in news)
    assert any("no validation split: made one of" in line for line in news)
    model, tokenizer = load_run(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["class_weights"]
    assert kept == pytest.approx([54 / 22, 54 / 86], rel=0.1)
    asked = '{"premise": "it rains", "hypothesis": "it is wet"}\n{"premise": "it rains", "hypothesis": "it is dry"}\n'
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "run")], input=asked)
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert told == list(predict(model, tokenizer, [("it rains", "it is wet"), ("it rains", "it is dry")]))
    assert told[0]["score"] != told[1]["score"], "the second text counts"
    dense = replace(settings, out=tmp_path / "dense", dense=True, epochs=0.3)
    assert training.train(dense)["policy"] == "dense"


def test_earlier_exits_learn_from_the_last_one():
    model, rows = dynamic_model(), batch()
    labels = rows["labels"]
    trace = model(**rows).trace
    answers, depth = trace.logits.detach().softmax(-1), trace.layers
    total, weight = torch.zeros(7), torch.zeros(7)
    for exit_ in trace.exits:
        for row, logits in zip(exit_.rows.tolist(), exit_.logits, strict=True):
            hard = -logits.log_softmax(-1)[labels[row]]
            soft = -(answers[row] * logits.log_softmax(-1)).sum()
            total[row] += hard if exit_.layer == depth[row] else 0.75 * hard + 0.25 * soft
            weight[row] += 1
    loss = exit_loss(trace, labels, SingleLabel(3), 0.25)
    torch.testing.assert_close(loss, (total / weight).mean())
    assert loss.item() != exit_loss(trace, labels).item()
    model.config.distillation = 0.25
    torch.testing.assert_close(model(**rows).loss, exit_loss(model(**rows).trace, labels, SingleLabel(3), 0.25))
