"""Conversion both ways against `transformers`, saving and loading, and the Auto classes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, GPT2Config, GPT2Model

from builders import SIZES, batch, dynamic_model, plain_model
from dht.errors import ConfigError, DHTError
from dht.hf.configuration import DHTConfig
from dht.hf.convert import convert, deal_neurons, export, load_source
from dht.hf.modeling import DHTForSequenceClassification
from dht.policy.baselines import DensePolicy

DENSE = DensePolicy(SIZES["num_attention_heads"])


@pytest.mark.parametrize("ffn", ["coupled", "dense"])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_full_plan_equals_transformers_in_outputs_and_gradients(family, ffn):
    plain = plain_model(family)
    dynamic = convert(plain, ffn=ffn).eval()
    inputs = batch(pad=plain.config.pad_token_id)
    theirs = plain(**inputs)
    ours = dynamic(**inputs, policy=DENSE)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    theirs.loss.backward()
    ours.loss.backward()
    words = dynamic.encoder.embeddings.words.weight.grad
    torch.testing.assert_close(words, plain.get_input_embeddings().weight.grad, atol=1e-5, rtol=1e-4)
    names = ("layer.1.attention.self.query.weight", "layer.1.attention.attn.q.weight")
    (query,) = (p.grad for name, p in plain.named_parameters() if name.endswith(names))
    torch.testing.assert_close(
        dynamic.encoder.blocks[1].qkv_weight.grad[:, 0].flatten(0, 1), query, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_export_loads_into_plain_transformers(family, tmp_path):
    plain = plain_model(family)
    back = export(convert(plain))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, msg=name)
    back.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = batch(pad=plain.config.pad_token_id)
    torch.testing.assert_close(loaded(**inputs).logits, plain(**inputs).logits)


def test_token_types_are_used():
    plain = plain_model("bert")
    dynamic = convert(plain).eval()
    inputs = batch()
    types = (torch.arange(inputs["input_ids"].shape[1]) > 2).long().expand_as(inputs["input_ids"])
    with torch.inference_mode():
        ours = dynamic(**inputs, token_type_ids=types, policy=DENSE).logits
        torch.testing.assert_close(ours, plain(**inputs, token_type_ids=types).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours, dynamic(**inputs, policy=DENSE).logits, atol=1e-3)


def test_dealing_neurons_changes_no_output():
    model = dynamic_model()
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs, policy=DENSE).logits
        importance = torch.rand(5, 19)
        best = model.encoder.blocks[0].up_bias.flatten()[importance.flatten().argmax()].item()
        deal_neurons(model.encoder.blocks[0], torch.tensor([0.1, 0.2, 0.9, 0.3, 0.0]), importance)
        torch.testing.assert_close(model(**inputs, policy=DENSE).logits, before, atol=1e-5, rtol=1e-5)
        assert model.encoder.blocks[0].up_bias[2, 0].item() == best, "the best neuron goes to the best unit"


@pytest.mark.parametrize("search", ["tree", "integrated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policy_travels_bit_exactly(search, dtype, tmp_path):
    model = dynamic_model(search=search)
    inputs = batch()
    for _ in range(3):
        output = model(**inputs, mode="explore", tap_gates=True)
        output.loss.backward()
        model.policy.observe_units(output.trace)
        model.policy.observe(output.trace, torch.rand(7, 3, dtype=torch.float64))
        model.policy.finish_step()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(loaded, DHTForSequenceClassification)
    assert loaded.encoder.embeddings.words.weight.dtype == dtype
    for (name, ours), theirs in zip(
        model.policy.state_dict().items(), loaded.policy.state_dict().values(), strict=True
    ):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    if dtype == torch.float32:
        inputs.pop("labels")
        with torch.inference_mode():
            ours, theirs = model(**inputs), loaded.eval()(**inputs)
        assert torch.equal(ours.trace.units, theirs.trace.units)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=1e-6)  # memory alignment may round


def test_casting_the_model_leaves_the_policy_in_float64():
    model = dynamic_model().to(torch.bfloat16)
    assert model.policy.numbers.gram.dtype == torch.float64
    assert model.policy.price.dtype == torch.float64
    assert model.policy.curve_price.dtype == torch.float64


def test_auto_config_knows_dht(tmp_path):
    DHTConfig(**SIZES).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DHTConfig)


def test_base_model_and_classifier_sources(tmp_path):
    plain_model("bert").save_pretrained(tmp_path / "classifier")
    assert "Classification" in type(load_source(tmp_path / "classifier", 3)).__name__
    base = load_source(tmp_path / "classifier", 2)
    assert type(base).__name__ == "BertModel", "another number of classes takes the encoder only"
    assert convert(AutoModel.from_config(base.config), 2).num_labels == 2
    with pytest.raises(DHTError, match="cannot load"):
        load_source(tmp_path / "nothing", 2)


def test_an_unknown_architecture_is_named():
    with pytest.raises(DHTError, match="cannot convert architecture 'gpt2'; what works: bert, camembert, distilbert"):
        convert(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11)))


def test_all_configuration_problems_at_once():
    config = DHTConfig(
        **SIZES | {"hidden_size": 61}, widths=[0, 9], wide_from=7, train_widths="some", search="trie", budget=1.5,
        format_version=9,
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        DHTForSequenceClassification(config)
    for part in (
        "format_version: the checkpoint has 9, this dht reads up to 4; install a newer dht",
        "hidden_size: 61 is not a multiple of num_attention_heads = 5",
        "widths: got [0, 9], must be ascending numbers in 1..5",
        "search: got 'trie', allowed: tree, integrated",
        "train_widths: got 'some', allowed: narrowest, all",
        "wide_from: got 7, must be in 0..3",
        "budget: got 1.5, must be in (0, 1]",
    ):
        assert part in str(caught.value)
