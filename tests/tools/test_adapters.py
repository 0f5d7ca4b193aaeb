"""LoRA adapters of PEFT on a dynamic model: only they train, they merge and unmerge, and they come back from disk."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

from builders import batch, dynamic_model, random_plan
from dht.errors import DHTError
from dht.model.quantize import quantize
from dht.model.reference import reference
from dht.policy.baselines import DensePolicy, FixedPlan
from dht.policy.budget import Schedule
from dht.training import DHTTrainer

peft = pytest.importorskip("peft", reason='adapters need the extra "peft"')

# PEFT asks by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = ["out_weight", "up_weight", "down_weight"]


def adapted(model, seed=0):
    """The model with LoRA on all weights of the blocks; nudged off zero, so that the adapters matter."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_parameters=TARGETS, r=2, lora_alpha=4, task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return wrapped.eval()


class LastingPlan(FixedPlan):
    """Blocks keep the slices of its sets."""

    def decide(self, view):
        return replace(super().decide(view), lasting=True)


def logits(model, plan=None):
    with torch.no_grad():
        return model(**batch(), policy=LastingPlan(plan or random_plan(7))).logits


def test_only_adapters_and_classifiers_train():
    model = adapted(dynamic_model("bert"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = model(**batch(), policy=FixedPlan(random_plan(7))).loss
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert sum("lora_" in name for name in trained) == 3 * len(TARGETS) * 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained
    assert any("lora_A" in name for name in moved)
    assert any("lora_B" in name for name in moved)
    with torch.enable_grad():
        assert model(**batch(), policy=FixedPlan(random_plan(7))).loss < loss


def test_adapted_blocks_equal_the_reference_on_merged_weights():
    model = adapted(dynamic_model("bert"))
    merged = copy.deepcopy(model).merge_and_unload()
    plan, inputs = random_plan(7), batch()
    with torch.no_grad():
        exits = reference(merged.encoder, plan, inputs["input_ids"], inputs["attention_mask"])
    expected = torch.stack(exits)[plan.layers - 1, torch.arange(7)]
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


def test_slices_are_kept_between_calls_and_not_while_adapted():
    base = dynamic_model("bert").eval()
    logits(base)
    kept = base.encoder.blocks[0]._kept.slices
    first = list(kept.values())
    logits(base)
    assert first
    assert all(old is new for old, new in zip(first, kept.values(), strict=True))
    block = base.encoder.blocks[0]
    model = adapted(base)
    block._kept.slices.clear()
    logits(model)
    assert not block._kept.slices, "an adapter computes its weights at every call"
    model.merge_adapter()
    logits(model)
    assert block._kept.slices


def test_weights_that_change_under_a_kept_slice_are_noticed():
    """Merging writes through `.data`, which PyTorch does not count; two adapters may even share an address."""
    base = dynamic_model("bert")
    bare = logits(base)
    model = adapted(base)
    on = logits(model)
    assert (on - bare).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), bare)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), on, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), on, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), bare, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_adapted_blocks_compile_whole():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base = dynamic_model("bert")
    model, plan = adapted(base), DensePolicy(5)
    with torch.no_grad():
        expected = model(**batch(), policy=plan).logits
        base.compile(backend="eager")
        torch.testing.assert_close(model(**batch(), policy=plan).logits, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_adapters_are_merged_before_int8():
    with pytest.raises(DHTError, match=r"the blocks carry adapters; merge them first: model.merge_and_unload\(\)"):
        quantize(adapted(dynamic_model("bert")))


def test_adapters_come_back_from_disk(tmp_path):
    model = adapted(dynamic_model("bert"))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < sum(p.numel() * 4 for p in model.parameters()) / 2
    back = peft.PeftModel.from_pretrained(dynamic_model("bert"), tmp_path).eval()
    torch.testing.assert_close(logits(back), logits(model))


def test_a_policy_learns_while_adapters_train(tmp_path):
    model = dynamic_model("dht")
    wrapped = adapted(model)
    frozen = {name: p.detach().clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    rows = [{key: value[i] for key, value in batch((5,) * 8).items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        save_strategy="no", remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DHTTrainer(
        wrapped, arguments, train_dataset=rows, schedule=Schedule(0.5), feedback=lambda i: batch((3, 4), seed=i),
        feedback_every=1,
    )  # fmt: skip
    trainer.train()
    for name, parameter in wrapped.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert float(model.policy.numbers.pulls.sum()) > 0
    assert int(model.policy.units.clock) > 0
    served = wrapped.merge_and_unload()
    served.save_pretrained(tmp_path / "merged")
    back = type(served).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(back), logits(served.eval()))
    assert torch.equal(back.policy.numbers.moment, model.policy.numbers.moment)
