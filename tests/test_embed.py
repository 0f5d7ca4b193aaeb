"""Embeddings: maps into one space, a dial without labels, distillation, and the sentence-transformers module."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

import dht.train as training
from builders import LENGTHS, batch, plain_model, random_plan
from dht.cli import app
from dht.config import TrainSettings
from dht.data import load_data
from dht.embed import Embedder, fit_embedder
from dht.errors import CheckpointError, ConfigError, DataError, DHTError
from dht.evaluate import evaluate
from dht.hf.configuration import DHTConfig
from dht.hf.convert import convert, export
from dht.hf.modeling import DHTForSequenceClassification
from dht.load import teacher_of
from dht.maps import fit_maps
from dht.metrics import vector_scores
from dht.model.encoder import EmbeddingHead
from dht.model.execute import execute
from dht.model.reference import reference
from dht.policy.baselines import DensePolicy, FixedPlan, StaticPolicy
from dht.task import Embedding
from test_train import encoder  # noqa: F401

WORDS = [
    "goal", "team", "match", "bank", "price", "market", "bread", "soup", "cheese", "rain", "sun", "wind", "the", "a",
    "of", "and", "in", "was", "it", "on",
]  # fmt: skip


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def source(encoder):  # noqa: F811
    """A tiny encoder whose layers really change what they are given."""
    model = AutoModel.from_pretrained(encoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.encoder.layer:
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model.eval(), AutoTokenizer.from_pretrained(encoder)


@pytest.fixture(scope="module")
def fitted(source):
    return fit_embedder(*source, sentences(400), budget=0.6, max_length=24)


def test_the_full_plan_gives_the_mean_of_the_last_layer(source, fitted):
    model, tokenizer = source
    texts = sentences(20, seed=1)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    got = fitted.encode(texts, policy=DensePolicy(4), batch_size=7)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    plain = export(fitted.model)
    assert torch.equal(
        plain.state_dict()["encoder.layer.2.output.dense.weight"], model.encoder.layer[2].output.dense.weight
    )


def test_the_dial_spends_and_serves(fitted):
    texts = sentences(200, seed=2)
    truth = fitted.encode(texts, policy=DensePolicy(4))
    found = []
    for budget in (0.45, 0.6, 0.9):
        fitted.model.policy.set_budget(budget)
        vectors, layers, fractions = fitted.encode_and_spend(texts)
        found.append((float(fractions.mean()), vector_scores(truth, vectors)["cosine"]))
        assert layers.min() >= 1
        assert fractions.mean() == pytest.approx(budget, abs=0.15)
    fitted.model.policy.set_budget(0.6)
    assert found == sorted(found), "more is spent, and more is right"
    first = StaticPolicy(1, 4, torch.arange(4).repeat(3, 1))
    raw = Embedder(convert_raw(fitted), fitted.tokenizer, 24).encode(texts, policy=first)
    mapped = fitted.encode(texts, policy=first)
    unmapped, at_first = (vector_scores(truth, x)["cosine"] for x in (raw, mapped))
    assert 1 - at_first < (1 - unmapped) / 10, "without the maps the layers do not share a space"
    assert found[-1][1] > at_first


def convert_raw(fitted):
    model = DHTForSequenceClassification(fitted.model.config).eval()
    model.load_state_dict(fitted.model.state_dict())
    for head in model.encoder.exits:
        head.dense.reset_parameters()
    return model


def test_a_text_is_embedded_alike_in_any_company(fitted):
    texts = sentences(30, seed=3)
    together = fitted.encode(texts, batch_size=30)
    for index in (0, 11, 29):
        torch.testing.assert_close(fitted.encode([texts[index]])[0], together[index], atol=1e-5, rtol=1e-5)


def test_no_texts_and_texts_that_are_none(fitted):
    vectors, layers, fractions = fitted.encode_and_spend([])
    assert (vectors.shape, layers.shape, fractions.shape) == ((0, 32), (0,), (0,))
    torch.testing.assert_close(fitted.encode(["a \ud800"]), fitted.encode(["a \ufffd"]))
    assert fitted.encode([("a", "b"), ""]).shape == (2, 32)
    with pytest.raises(DataError, match="text 2: the text is 5, a int; allowed: a string"):
        fitted.encode(["a", 5])
    with pytest.raises(DataError, match="text 60: the text is None"):
        fit_embedder(fitted.model, fitted.tokenizer, [*sentences(59), None])


def test_saved_and_loaded(fitted, tmp_path):
    fitted.save(tmp_path)
    again = Embedder.load(tmp_path, device="cpu")
    assert again.max_length == 24, "a text is cut where it was cut before"
    assert Embedder.load(tmp_path, device="cpu", max_length=9).max_length == 9
    texts = sentences(10, seed=4)
    assert torch.equal(again.encode(texts), fitted.encode(texts))
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    report = evaluate(tmp_path, str(tmp_path / "data"), policy="dense", device="cpu", repeats=1, max_length=24)
    assert report["cosine"] == pytest.approx(1.0)
    assert (report["ranking"], report["neighbour_agreement"], report["accuracy"]) == (pytest.approx(1.0), 1.0, None)
    result = CliRunner().invoke(app, ["predict", str(tmp_path), "--device", "cpu"], input=texts[0])
    told = json.loads(result.stdout)
    assert set(told) == {"embedding", "layers", "heads", "flops_fraction"}
    assert told["embedding"] == pytest.approx(again.encode(texts[:1])[0].tolist(), abs=1e-5)


def test_fast_reference_and_flops_agree():
    model = convert(plain_model("bert"), 1, head="embedding", widths=[2, 4, 5], wide_from=3).eval()
    with torch.no_grad():
        for head in model.encoder.exits:
            assert torch.equal(head.dense.weight, torch.eye(60))
            head.dense.weight.add_(torch.randn(60, 60) * 0.1)
    inputs = batch(LENGTHS)
    del inputs["labels"]
    plan = random_plan(len(LENGTHS))
    trace = execute(model.encoder, FixedPlan(plan), **inputs)
    exits = reference(model.encoder, plan, **inputs)
    for exit_ in trace.exits:
        torch.testing.assert_close(exit_.logits, exits[exit_.layer - 1][exit_.rows], atol=1e-5, rtol=1e-5)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        trace = execute(model.encoder, FixedPlan(random_plan(1)), **{k: v[:1] for k, v in inputs.items()})
    assert counter.get_total_flops() == trace.flops.item()


def test_maps_find_a_linear_map_and_leave_the_last_alone():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(300, 12, generator=generator) + 2 for _ in range(2)]
    truth = states[0] @ torch.randn(12, 12, generator=generator) - 5
    heads = [EmbeddingHead(12), EmbeddingHead(12)]
    fit_maps(heads, states, truth)
    assert torch.nn.functional.cosine_similarity(heads[0](states[0]), truth, dim=-1).min() > 0.999
    assert torch.equal(heads[1].dense.weight, torch.eye(12))


def test_vector_scores_by_hand():
    truth = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert vector_scores(truth, 3 * truth) == pytest.approx({"cosine": 1.0, "neighbour_agreement": 1.0, "ranking": 1.0})
    swapped = vector_scores(truth, truth[[0, 2, 1, 3]])
    assert swapped["neighbour_agreement"] == 0.0
    assert vector_scores(truth[:2], truth[:2])["ranking"] == 1.0


def test_what_the_policy_reads_of_an_embedding():
    task = Embedding()
    now, before = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [4.0, -3.0]])
    seen = task.context(now, before)
    torch.testing.assert_close(seen[:, 0], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert seen[:, 4].tolist() == [1.0, 0.0]
    assert task.context(now, None)[:, 0].tolist() == [0.5, 0.5]
    assert task.quality(now, before).tolist() == pytest.approx([1.0, 0.0])
    assert task.losses(now, before).tolist() == pytest.approx([0.0, 1.0])
    with pytest.raises(DHTError, match="confidence: an embedding has none; allowed: patience"):
        task.confidence(now)
    with pytest.raises(ValueError, match=r"labels: got int64 \[2\], allowed: floats, the full model's embeddings"):
        task.check(torch.zeros(2, dtype=torch.long), now)


def test_trained_from_texts_alone(encoder, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    for split, count, seed in (("train", 320, 5), ("validation", 80, 6), ("test", 60, 7)):
        lines = [json.dumps({"text": text}) for text in sentences(count, seed)]
        (data / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = TrainSettings(
        data=str(data), model=str(encoder), out=tmp_path / "run", budget=0.5, epochs=1, batch_size=16, lr=1e-3,
        max_length=24, device="cpu", task="embedding",
    )  # fmt: skip
    report = training.train(settings)
    assert Embedder.load(tmp_path / "run").max_length == 24
    assert (report["task"], report["metric"]) == ("embedding", "cosine")
    assert report["cosine"] > 0.9
    assert report["full_depth_cosine"] > 0.9
    low, high = (evaluate(tmp_path / "run", str(data), budget=b, device="cpu", repeats=1) for b in (0.4, 0.9))
    assert low["flops_fraction"] < high["flops_fraction"]
    again = evaluate(tmp_path / "run", str(data), budget=0.5, device="cpu", repeats=1)
    assert again["cosine"] == pytest.approx(report["cosine"]), "what is right is what the original encoder says"
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--device", "cpu"])
    assert "neighbour agreement" in result.stderr


def test_something_must_be_learned_from(encoder, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    settings = TrainSettings(data=str(data), model=str(encoder), out=tmp_path / "run", device="cpu", task="embedding")
    with pytest.raises(DHTError, match="--dense: with --task embedding the full model is what is learned from"):
        training.train(replace(settings, dense=True))
    with pytest.raises(DHTError, match="--model: with --task embedding it is what is learned from, and preset:tiny kn"):
        training.train(replace(settings, model="preset:tiny"), overwrite=True)


def test_texts_need_no_label_column(tmp_path):
    (tmp_path / "test.csv").write_text("sentence,other\na,1\nb,2\n", encoding="utf-8")
    made = load_data(tmp_path, splits=("test",), task="embedding")
    assert made.test.texts == ["a", "b"]
    assert made.notes == ["columns: text 'sentence' (inferred; --text-column names others)"]


def test_what_cannot_be(source, tmp_path, encoder):  # noqa: F811
    model, tokenizer = source
    with pytest.raises(DataError, match="texts: got 3; fitting needs a list of 50 or more"):
        fit_embedder(model, tokenizer, ["a", "b", "c"])
    with pytest.raises(DataError, match="texts: got one string, 'word"):
        fit_embedder(model, tokenizer, "word " * 60)
    with pytest.raises(ConfigError, match="--budget: got 0, allowed"):
        fit_embedder(model, tokenizer, sentences(60), budget=0)
    with pytest.raises(ConfigError, match="head: got 'tail', allowed: classifier, embedding"):
        DHTConfig(head="tail").check()
    classifier = convert(model, 2)
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match="a model for single_label_classification, not for embeddings; train with --task"
    ):
        Embedder.load(tmp_path)


def test_what_an_embedding_run_learned_from_must_be_known(fitted, tmp_path):
    assert teacher_of(tmp_path, fitted.model) is fitted.model
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"run.json: does not say the run's model \('model'\)"):
        teacher_of(tmp_path, fitted.model)


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_sentence_transformers(fitted, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize

    from dht.sentence import DHTModule

    module = DHTModule(fitted)
    model = library.SentenceTransformer(modules=[module, Normalize()], device="cpu")
    texts = sentences(12, seed=8)
    got = model.encode(texts, batch_size=5, convert_to_tensor=True)
    torch.testing.assert_close(got, torch.nn.functional.normalize(fitted.encode(texts), dim=-1), atol=1e-5, rtol=1e-5)
    assert model.get_embedding_dimension() == 32
    assert model.max_seq_length == 24
    assert model.similarity(got, got).diagonal().tolist() == pytest.approx([1.0] * 12, abs=1e-5)
    assert module(module.preprocess(texts[:2], prompt="the "))["flops_fraction"].shape == (2,)
    model.save(str(tmp_path), create_model_card=False)
    again = library.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert again.max_seq_length == 24
    torch.testing.assert_close(again.encode(texts, batch_size=5, convert_to_tensor=True), got, atol=1e-6, rtol=1e-5)
    cut = library.SentenceTransformer(modules=[DHTModule(Embedder.load(tmp_path), budget=0.4)], device="cpu")
    assert not torch.equal(cut.encode(texts, convert_to_tensor=True), fitted.encode(texts))
    with pytest.raises(ConfigError, match="--budget: got 2"):
        module.set_budget(2)
