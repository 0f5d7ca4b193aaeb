"""What is done to blocks leaves their results alone: checkpointing, compilation; and int8, which nearly does."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

import dht
from builders import batch, dynamic_model, random_plan
from dht.errors import ConfigError, DHTError
from dht.model.quantize import Int8Weight, quantize
from dht.policy.baselines import DensePolicy, FixedPlan
from launching import alone


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.dropout = module.attention_dropout = 0.0
    return model


def gradients(model, plan=None):
    """Loss, gradients and gate gradients of a step; without a plan under one with many head sets."""
    model.zero_grad()
    output = model(**batch(), policy=FixedPlan(plan or random_plan(7)), tap_gates=True)
    output.loss.backward()
    gates = [grads for layer in sorted(output.trace.gate_grads) for *_, grads in output.trace.gate_grads[layer]]
    return output.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, gates


def same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def runs_of(model):
    """A list that grows with every run of a block."""
    runs = []
    for block in model.encoder.blocks:
        block.attention_norm.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("family", ["bert", "dht"])
def test_checkpointed_gradients_are_the_same(family):
    plain = without_dropout(dynamic_model(family)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed._set_gradient_checkpointing(True, gradient_checkpointing_func=_checkpoint)
    once, twice = runs_of(plain), runs_of(checkpointed)
    loss, grads, gates = gradients(plain)
    again, regrads, regates = gradients(checkpointed)
    assert len(twice) == 2 * len(once), "every block ran again in backward"
    same([loss, *grads.values(), *gates], [again, *regrads.values(), *regates])
    assert list(grads) == list(regrads)


def test_checkpointing_keeps_no_activations_for_the_gates():
    """What autograd holds between forward and backward shrinks although the gates are listened to."""

    def held(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            model(**batch(), policy=DensePolicy(5), tap_gates=True)
        return sum(sizes)

    model = without_dropout(dynamic_model("bert")).train()
    before = held(model)
    model._set_gradient_checkpointing(True, gradient_checkpointing_func=_checkpoint)
    assert held(model) < before / 2


def _checkpoint(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def test_the_reentrant_variant_is_refused():
    model = dynamic_model()
    name = "activation_checkpointing_enable"  # since transformers 5.23
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    with pytest.raises(ConfigError, match="got use_reentrant=True, allowed: use_reentrant=False"):
        enable({"use_reentrant": True})


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


# What the compiler's own code warns of while it traces: it looks at `.grad` of views, and uses torch.jit.
COMPILER = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def of_compiler(test):
    for mark in COMPILER:
        test = mark(test)
    return test


@of_compiler
def test_compiled_blocks_give_the_same(dynamo):
    plain = without_dropout(dynamic_model("bert"))
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager")  # all that inductor does but kernels: graphs, their backward, fake tensors
    plan = random_plan(6, seed=1)
    plan.units[:] = plan.units[:1]
    plan.units[:3, 1:] = False
    inputs = batch((5, 3, 9, 4, 8, 2))
    for model in (plain, compiled):
        model.zero_grad()
    ours, theirs = (model(**inputs, policy=FixedPlan(plan)) for model in (compiled, plain))
    ours.loss.backward()
    theirs.loss.backward()
    same([ours.logits], [theirs.logits])
    pairs = zip(compiled.parameters(), plain.parameters(), strict=True)
    same(*zip(*((mine.grad, other.grad) for mine, other in pairs if other.grad is not None), strict=True))
    graphs = dynamo["stats"]["unique_graphs"]
    assert graphs > 0
    assert not dynamo["graph_break"], "a block is one graph"
    # Other numbers of rows and tokens run through the graphs that are there.
    for lengths in ((4, 7, 2, 6), (11, 3, 10, 2, 5, 9, 4, 8)):
        inputs, plan = batch(lengths), random_plan(len(lengths), seed=1)
        plan.units[:] = plan.units[:1]
        plan.units[: len(lengths) // 2, 1:] = False
        same([compiled(**inputs, policy=FixedPlan(plan)).logits], [plain(**inputs, policy=FixedPlan(plan)).logits])
    assert dynamo["stats"]["unique_graphs"] <= graphs + 1


@of_compiler
def test_a_copy_of_a_compiled_model_runs_its_own_weights(dynamo):
    plain = dynamic_model("bert")
    plain.compile(backend="eager")
    changed = copy.deepcopy(plain)
    expected = dynamic_model("bert")
    for model in (changed, expected):
        for block in model.encoder.blocks:
            nn.init.ones_(block.out_bias)
            nn.init.zeros_(block.attention_norm.bias)
    policy = DensePolicy(5)
    with torch.no_grad():
        same([changed(**batch(), policy=policy).logits], [expected(**batch(), policy=policy).logits])
        assert not dynamo["stats"]["unique_graphs"], "as a copy of every module, it is not compiled"
        assert not torch.equal(plain(**batch(), policy=policy).logits, expected(**batch(), policy=policy).logits)
    assert dynamo["stats"]["unique_graphs"]


INDUCTOR = """
import copy, torch
from builders import batch, dynamic_model
from dht.policy.baselines import DensePolicy

plain = dynamic_model("bert")
compiled = copy.deepcopy(plain)
# Building the compiler's own headers first pays for many kernels, not for one.
compiled.encoder.blocks[0].compile(options={"cpp_cache_precompile_headers": False})
with torch.no_grad():
    ours, theirs = (model(**batch((5, 3, 9)), policy=DensePolicy(5)).logits for model in (compiled, plain))
torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
print("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_block():
    """In a process of its own: the setuptools that it imports refuse to come after other modules."""
    assert alone("-c", INDUCTOR).strip().endswith("graphs 1")


@pytest.mark.parametrize("options", [{"family": "bert"}, {"family": "mpnet", "ffn": "dense"}, {"family": "dht"}])
def test_int8_is_near_the_float_model(options):
    plain = dynamic_model(**options)
    rounded = dht.quantize(copy.deepcopy(plain))
    policy = FixedPlan(random_plan(7))
    with torch.no_grad():
        ours, theirs = (model(**batch(), policy=policy).logits for model in (rounded, plain))
    assert 0 < float((ours - theirs).abs().max()) < 0.1 * float(theirs.std())


def test_int8_products_are_those_of_the_rounded_weights():
    """Against float64 arithmetic on the same rounded numbers, both orders of axes, with units left out."""
    torch.manual_seed(0)
    weight, hidden, bias = torch.randn(5, 12, 30), torch.randn(7, 30), torch.randn(36)
    units = torch.tensor([0, 2, 3])
    kept = Int8Weight.of(weight, (-1,)).index_select(0, units).flatten(0, 1)
    restored = kept.values.double() * kept.scale
    assert (restored - weight[units].flatten(0, 1)).abs().max() <= kept.scale.max() / 2 + 1e-6
    step = hidden.double().abs().amax(1, keepdim=True) / 127
    rounded = (hidden / step.float()).round().double() * step
    ours = nn.functional.linear(hidden, kept, bias)
    torch.testing.assert_close(ours, (rounded @ restored.T + bias).float(), atol=1e-4, rtol=1e-4)
    mixed = torch.randn(7, 36)
    down = Int8Weight.of(weight, (0, 1)).index_select(0, units).flatten(0, 1)
    step = mixed.double().abs().amax(1, keepdim=True) / 127
    rounded = (mixed / step.float()).round().double() * step
    expected = rounded @ (down.values.double() * down.scale) + bias[:30]
    torch.testing.assert_close(nn.functional.linear(mixed, down.t(), bias[:30]), expected.float(), atol=1e-4, rtol=1e-4)


def test_int8_results_do_not_depend_on_the_batch():
    model = quantize(dynamic_model("bert"))
    whole = batch()
    with torch.no_grad():
        together = model(**whole, policy=FixedPlan(random_plan(7))).logits
        for row in range(7):
            plan = random_plan(7)
            plan.units = plan.units[row : row + 1]
            alone = model(**{k: v[row : row + 1] for k, v in whole.items()}, policy=FixedPlan(plan)).logits
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)


def test_int8_takes_a_quarter_of_the_blocks_memory():
    def weight_bytes(block):
        weights = [getattr(block, name) for name in ("qkv_weight", "out_weight", "up_weight", "down_weight")]
        parts = [t for w in weights for t in ((w.values, w.scale) if isinstance(w, Int8Weight) else (w,))]
        return sum(part.numel() * part.element_size() for part in parts)

    model = dynamic_model("bert")
    before = weight_bytes(model.encoder.blocks[0])
    assert weight_bytes(quantize(model).encoder.blocks[0]) < 0.3 * before


def test_a_quantised_model_is_neither_saved_nor_made_elsewhere(tmp_path):
    with pytest.raises(DHTError, match="a quantised model is not saved; save the float model and quantise it after"):
        quantize(dynamic_model()).save_pretrained(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
    with pytest.raises(DHTError, match="the model is on meta, allowed: cpu; call model.cpu"):
        quantize(dynamic_model().to("meta"))


def test_int8_and_compilation_exclude_each_other():
    compiled = dynamic_model()
    compiled.compile(backend="eager")
    with pytest.raises(DHTError, match=r"the model is compiled; quantise a copy.deepcopy of it, which is not"):
        quantize(compiled)
    with pytest.raises(DHTError, match="the blocks are in int8, allowed: float; compile a model that is not quantised"):
        quantize(copy.deepcopy(compiled)).compile()


@of_compiler
def test_every_family_checkpoints_compiles_and_rounds(dynamo):
    """ModernBERT has what the others lack: rotary positions, local attention, a gate in the FFN, no biases."""
    plain = without_dropout(dynamic_model("modernbert")).train()
    compiled, checkpointed = copy.deepcopy(plain), copy.deepcopy(plain)
    compiled.compile(backend="eager")
    checkpointed._set_gradient_checkpointing(True, gradient_checkpointing_func=_checkpoint)
    few = random_plan(7, seed=1)
    few.units[:] = few.units[:1]
    loss, grads, gates = gradients(plain, few)
    for model in (compiled, checkpointed):
        again, regrads, regates = gradients(model, few)
        same([loss, *grads.values(), *gates], [again, *regrads.values(), *regates])
    plan = FixedPlan(random_plan(7))
    with torch.no_grad():
        expected = plain.eval()(**batch(), policy=plan).logits
        ours = quantize(copy.deepcopy(plain))(**batch(), policy=plan).logits
    assert 0 < float((ours - expected).abs().max()) < 0.1 * float(expected.std())
