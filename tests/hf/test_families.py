"""Every family against its `transformers` model with the same weights: outputs, gradients, and the way back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from builders import LENGTHS, SIZES, batch, dynamic_model, plain_model
from dht.calibrate import calibrate
from dht.compare.shapes import sizes_of
from dht.errors import ConfigError, DHTError
from dht.hf.configuration import DHTConfig
from dht.hf.convert import FAMILIES, convert, deal_neurons, export
from dht.hf.modeling import DHTForSequenceClassification
from dht.model.packed import Packed
from dht.policy.baselines import DensePolicy, StaticPolicy

DENSE = DensePolicy(SIZES["num_attention_heads"])
BIASED = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
VARIANTS = {name: (name, {}) for name in sorted(FAMILIES)} | {
    "electra without projection": ("electra", {"embedding_size": 60}),
    "modernbert, mean, biases": (
        "modernbert",
        {"classifier_pooling": "mean", "classifier_activation": "relu"} | BIASED,
    ),
    "modernbert, local first": (
        "modernbert",
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "local_attention": 2},
    ),
    "modernbert, all global": ("modernbert", {"layer_types": ["full_attention"] * 3}),
    "roberta with segments": ("roberta", {"type_vocab_size": 1, "hidden_act": "relu"}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def of(variant):
    family, changes = VARIANTS[variant]
    return plain_model(family, **changes)


@variants
@pytest.mark.parametrize("ffn", ["coupled", "dense"])
def test_a_full_plan_equals_transformers_in_outputs_and_gradients(variant, ffn):
    plain = of(variant)
    dynamic = convert(plain, ffn=ffn).eval()
    inputs = batch(pad=plain.config.pad_token_id)
    theirs, ours = plain(**inputs), dynamic(**inputs, policy=DENSE)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    theirs.loss.backward()
    ours.loss.backward()
    gradients = copy.deepcopy(dynamic)
    with torch.no_grad():
        for parameter, (name, source) in zip(gradients.parameters(), dynamic.named_parameters(), strict=True):
            assert source.grad is not None or name.startswith(("encoder.exits.0", "encoder.exits.1")), name
            parameter.copy_(torch.zeros_like(parameter) if source.grad is None else source.grad)
    compared = dict(export(gradients).named_parameters())
    for name, parameter in plain.named_parameters():
        unread = "pooler" in name and parameter.grad is None
        expected = torch.zeros_like(parameter) if unread else parameter.grad
        torch.testing.assert_close(
            compared[name], expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@variants
def test_both_directions_of_conversion(variant, tmp_path):
    plain = of(variant)
    back = export(convert(plain))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    back.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(plain)
    inputs = batch(pad=plain.config.pad_token_id)
    assert torch.equal(loaded(**inputs).logits, plain(**inputs).logits)


@variants
def test_a_base_model_brings_its_encoder(variant):
    plain = of(variant)
    dynamic = convert(plain.base_model, num_labels=2)
    assert dynamic.num_labels == 2
    back = export(dynamic).base_model.state_dict()
    for name, tensor in plain.base_model.state_dict().items():
        if not name.startswith("pooler"):
            assert torch.equal(back[name], tensor), name


def test_a_pooler_starts_every_exit_head():
    plain = plain_model("bert")
    for exit_ in convert(plain).encoder.exits:
        assert torch.equal(exit_.dense.weight, plain.bert.pooler.dense.weight)


@pytest.mark.parametrize("family", ["electra", "modernbert"])
def test_a_saved_dynamic_model_loads_as_it_was(family, tmp_path):
    model = dynamic_model(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = batch()
    with torch.inference_mode():
        ours, theirs = model(**inputs, policy=DENSE).logits, loaded(**inputs, policy=DENSE).logits
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert loaded.config.windows == model.config.windows
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_parts_without_biases_train_none():
    model = dynamic_model("modernbert")
    model(**batch(), policy=DENSE).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias") and "exits" not in name]
    for block in model.encoder.blocks:
        for bias in (block.qkv_bias, block.out_bias, block.up_bias, block.down_bias):
            assert not bias.any()


def test_a_checkpoint_from_before_there_were_families_loads(tmp_path):
    model = dynamic_model("bert")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in (
        "attention_bias", "ffn_bias", "norm_bias", "gated_ffn", "embedding_size", "rotary_thetas", "windows",
        "last_activation", "last_bias", "last_norm",
    ):  # fmt: skip
        config.pop(name, None)
    file.write_text(json.dumps(config))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        ours, theirs = model(**batch(), policy=DENSE).logits, loaded(**batch(), policy=DENSE).logits
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_dealing_gated_neurons_moves_both_halves_and_changes_no_output():
    model = dynamic_model("modernbert")
    block, inputs = model.encoder.blocks[1], batch()
    importance = torch.rand(5, 19)
    unit, neuron = divmod(int(importance.argmax()), 19)
    with torch.no_grad():
        before, best = model(**inputs, policy=DENSE).logits, block.up_weight[unit, :, neuron].clone()
        deal_neurons(block, torch.tensor([0.1, 0.2, 0.9, 0.3, 0.0]), importance)
        assert torch.equal(block.up_weight[2, :, 0], best), "the best neuron goes to the best unit"
        torch.testing.assert_close(model(**inputs, policy=DENSE).logits, before, atol=1e-5, rtol=1e-5)


def test_calibration_deals_the_neurons_that_matter_to_the_units_that_matter():
    """All but one unit's neurons are silenced by their gates: calibration must bring that unit's to the best unit."""
    model = dynamic_model("modernbert")
    inputs = batch()
    alive = 3
    with torch.no_grad():
        for block in model.encoder.blocks:
            dead = torch.arange(5) != alive
            block.up_weight[dead, 1] = 0.0
        before = model(**inputs, policy=DENSE).trace.logits
    calibrate(model, [inputs], head_steps=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, policy=DENSE).logits, before, atol=1e-5, rtol=1e-5)
    for layer, block in enumerate(model.encoder.blocks):
        speaking = block.up_weight[:, 1].flatten(1).any(-1).nonzero().flatten().tolist()
        assert len(speaking) == 1, "one unit's share of neurons speaks, and one unit has them all"
        assert speaking[0] == int(model.policy.ranking()[layer, 0]), "the unit that is ranked first"


def test_a_window_by_hand():
    rows = Packed(torch.zeros(5, 1), torch.tensor([4, 1]), torch.arange(2))
    assert torch.equal(rows.near(3), rows.mask), "nobody is farther than 3 places away"
    long, short = rows.near(1)[:, 0].int().tolist()
    assert long == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert short == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], "a padded place has somebody to attend to"
    assert torch.equal(rows.near(0)[0, 0], torch.eye(4, dtype=torch.bool)), "windows of one layout are told apart"
    assert rows.select(torch.tensor([0])).near(2).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("family", ["electra", "modernbert"])
def test_a_padded_row_of_another_length_has_sound_gradients(family):
    """A window can leave a padded place with nobody to attend to; no NaN may come of it."""
    model = dynamic_model(family)
    policy = StaticPolicy(3, 2, model.policy.ranking())
    output = model(**batch((40, 1)), policy=policy)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_modernbert_runs_in_bfloat16():
    model = dynamic_model("modernbert")
    inputs = batch()
    with torch.inference_mode():
        exact = model(**inputs, policy=DENSE).logits
        with torch.autocast("cpu", torch.bfloat16):
            close = model(**inputs, policy=DENSE).logits.float()
        cast = copy.deepcopy(model).to(torch.bfloat16)(**inputs, policy=DENSE).logits.float()
    assert (close - exact).abs().max() < 0.05 * exact.abs().max()
    assert (cast - exact).abs().max() < 0.1 * exact.abs().max()


def test_rows_are_not_limited_by_positions_where_there_are_none():
    plain = plain_model("modernbert", max_position_embeddings=8)
    inputs = batch(LENGTHS)
    with torch.inference_mode():
        ours = convert(plain).eval()(**inputs, policy=DENSE).logits
        torch.testing.assert_close(ours, plain(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_sizes_are_read_by_their_own_names(tmp_path):
    for family in ("distilbert", "modernbert"):
        plain_model(family).save_pretrained(tmp_path / family)
        sizes = sizes_of(str(tmp_path / family), "dense")
        ffn = (3 if family == "modernbert" else 2) * 2 * 60 * 95
        assert (sizes.layers, sizes.heads) == (3, 5)
        assert sizes.fixed == pytest.approx(ffn / (ffn + 2 * 60 * 4 * 60))


def test_variants_that_do_not_run_are_named():
    with pytest.raises(DHTError, match="this 'bert' has is_decoder=True; only encoders convert"):
        convert(plain_model("bert", is_decoder=True))
    scaled = plain_model("modernbert")
    scaled.config.rope_parameters["full_attention"]["rope_type"] = "yarn"
    with pytest.raises(DHTError, match=r"rope_parameters scale the rotary positions \(full_attention: yarn\)"):
        convert(scaled)


def test_sizes_that_do_not_fit_are_one_clear_error():
    with pytest.raises(ConfigError, match="^intermediate_size: 96 is not a multiple of num_attention_heads = 5$"):
        convert(plain_model("modernbert", intermediate_size=96))
    config = DHTConfig(
        **SIZES | {"hidden_size": 55}, rotary_thetas=[1e4] * 3, windows=[None, 3, -1], embedding_size=0,
        last_activation="sgn", hidden_act="gelo", norm="none",
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        DHTForSequenceClassification(config)
    for part in (
        "rotary_thetas: heads of 11 dimensions cannot be turned in pairs; their size must be even",
        "windows: got [None, 3, -1], must be 3 numbers (one a layer) from 0 on",
        "embedding_size: got 0, must be at least 1",
        "last_activation: transformers has no activation 'sgn'",
        "hidden_act: transformers has no activation 'gelo'",
        "norm: got 'none', allowed: post, pre, modern",
    ):
        assert part in str(caught.value)


def test_every_family_is_an_architecture_of_transformers():
    for family in FAMILIES:
        assert AutoConfig.for_model(family).model_type == family
