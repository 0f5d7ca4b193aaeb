"""The fast executor against the masked reference: logits, gradients, gate gradients, at odd sizes, one row, none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from builders import LENGTHS, batch, dynamic_model, random_plan
from dht.hf.modeling import exit_loss
from dht.model.block import Block
from dht.model.execute import execute
from dht.model.reference import reference
from dht.plan import Plan
from dht.policy.baselines import DensePolicy, FixedPlan, StaticPolicy

FAMILIES = ("bert", "mpnet", "electra", "modernbert", "dht")


def inputs_of(model, lengths=LENGTHS, seed=0):
    made = batch(lengths, seed, pad=model.config.pad_token_id)
    return made.pop("labels"), made


def reference_loss(exits, plan, labels):
    total, weight = torch.zeros(len(labels)), torch.zeros(len(labels))
    for index, logits in enumerate(exits):
        passed = (plan.layers > index).float()
        total = total + passed * F.cross_entropy(logits, labels, reduction="none")
        weight = weight + passed
    return (total / weight).mean()


@pytest.mark.parametrize("ffn", ["coupled", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [LENGTHS, (5,), (6, 6, 6)], ids=["mixed", "one row", "equal"])
def test_outputs_gradients_and_gates_equal_the_reference(family, ffn, lengths):
    model = dynamic_model(family, ffn=ffn)
    labels, inputs = inputs_of(model, lengths)
    plan = random_plan(len(lengths), seed=len(lengths))
    trace = execute(model.encoder, FixedPlan(plan), **inputs, tap_gates=True)
    exit_loss(trace, labels).backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    gates = torch.ones(plan.units.shape, requires_grad=True)
    exits = reference(model.encoder, plan, **inputs, gates=gates)
    last = torch.stack(exits, 1)[torch.arange(len(lengths)), plan.layers - 1]
    torch.testing.assert_close(trace.logits, last, atol=1e-5, rtol=1e-5)
    for exit_ in trace.exits:
        torch.testing.assert_close(exit_.logits, exits[exit_.layer - 1][exit_.rows], atol=1e-5, rtol=1e-5)
    reference_loss(exits, plan, labels).backward()
    for name, parameter in model.named_parameters():
        slow = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        got = fast.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(got, slow, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    tapped = torch.zeros_like(gates)
    for layer, groups in trace.gate_grads.items():
        for rows, units, grads in groups:
            tapped[rows[:, None], layer, units[None]] += grads
    torch.testing.assert_close(tapped, gates.grad * plan.units, atol=1e-5, rtol=1e-4)
    assert gates.grad.abs().max() > 1e-4, "gates without influence test nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_tells_what_the_plan_asked_for(family):
    model = dynamic_model(family)
    _, inputs = inputs_of(model)
    plan = random_plan(7)
    trace = execute(model.encoder, FixedPlan(plan), **inputs)
    assert torch.equal(trace.units, plan.units)
    assert torch.equal(trace.layers, plan.layers)
    _, visited = trace.exit_table()
    assert torch.equal(visited, torch.arange(3) < plan.layers[:, None])


def test_no_rows():
    model = dynamic_model()
    trace = execute(model.encoder, DensePolicy(5), torch.zeros(0, 4, dtype=torch.long))
    assert trace.logits.shape == (0, 3)
    assert trace.flops_fraction == 0.0


@pytest.mark.parametrize("search", ["tree", "integrated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_batch(family, search):
    """Alone, among others, in another order or under more padding: the same answer and the same plan."""
    model = dynamic_model(family, search=search, head_sets=2)
    labels, inputs = inputs_of(model)
    learn(model, labels, inputs)
    with torch.inference_mode():
        together = model(**inputs).trace
        order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
        shuffled = model(**{k: v[order] for k, v in inputs.items()}).trace
        padded = model(**{k: F.pad(v, (0, 5), value=0 if "mask" in k else 1) for k, v in inputs.items()}).trace
        assert len(set(together.layers.tolist())) > 1 or search == "integrated", "all rows alike tests little"
        for i, length in enumerate(LENGTHS):
            alone = model(**{k: v[i : i + 1, :length] for k, v in inputs.items()}).trace
            for other, at in ((alone, 0), (shuffled, int((order == i).nonzero())), (padded, i)):
                assert torch.equal(other.units[at], together.units[i])
                torch.testing.assert_close(other.logits[at], together.logits[i], atol=1e-5, rtol=1e-5)


def learn(model, labels, inputs, steps=6):
    """Gives the policy something to go by, so that rows differ in what they run."""
    from dht.policy.reward import quality

    for _ in range(steps):
        output = model(**inputs, labels=labels, mode="probe", tap_gates=True)
        output.loss.backward()
        model.policy.observe(output.trace, quality(output.trace, labels))
        model.policy.observe_units(output.trace)
        model.policy.finish_step()
    model.zero_grad()
    model.policy.fix_head_sets(output.trace.context)
    # A price at which rows differ, if there is one.
    for price in torch.linspace(-0.5, 0.5, 21).tolist():
        model.policy.price.fill_(price)
        if len(model(**inputs).trace.layers.unique()) > 1:
            break


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_exits_add_up_when_serving_and_stand_alone_while_they_learn(family):
    model = dynamic_model(family, exit_memory=0.5)
    _, inputs = inputs_of(model)
    plan = random_plan(len(LENGTHS))
    own = {e.layer: e for e in execute(dynamic_model(family).encoder, FixedPlan(plan), **inputs).exits}
    trace = execute(model.encoder, FixedPlan(plan), **inputs)
    exits = reference(model.encoder, plan, **inputs)
    last = torch.stack(exits, 1)[torch.arange(len(LENGTHS)), plan.layers - 1]
    torch.testing.assert_close(trace.logits, last, atol=1e-5, rtol=1e-5)
    added = torch.zeros(len(LENGTHS), 3)
    for exit_ in trace.exits:
        torch.testing.assert_close(exit_.logits, exits[exit_.layer - 1][exit_.rows], atol=1e-5, rtol=1e-5)
        added[exit_.rows] = own[exit_.layer].logits + 0.5 * added[exit_.rows]
    torch.testing.assert_close(trace.logits, added)
    probe = model(**inputs, mode="probe").trace
    assert not torch.allclose(probe.exits[-1].logits, model(**inputs, mode="survey").trace.exits[-1].logits)
    # Without exits before it, the last one has nothing to add.
    full = DensePolicy(5)
    torch.testing.assert_close(model(**inputs, policy=full).logits, dynamic_model(family)(**inputs, policy=full).logits)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, Block):
            module.dropout = module.attention_dropout = 0.0
    for exit_, alone in zip(reference(model.encoder, plan, **inputs), own.values(), strict=True):
        torch.testing.assert_close(exit_[alone.rows], alone.logits, atol=1e-5, rtol=1e-5)
    trained = model(**inputs, policy=FixedPlan(plan)).trace.exits
    model.encoder.mixture = None
    for exit_, alone in zip(trained, model(**inputs, policy=FixedPlan(plan)).trace.exits, strict=True):
        assert torch.equal(exit_.logits, alone.logits)


def test_static_policy_runs_the_best_units_only():
    model = dynamic_model()
    _, inputs = inputs_of(model)
    ranking = torch.tensor([[4, 1, 0, 2, 3]] * 3)
    trace = execute(model.encoder, StaticPolicy(2, 2, ranking), **inputs)
    assert trace.layers.unique().tolist() == [2]
    assert trace.units[:, 0].unique(dim=0).tolist() == [[False, True, False, False, True]]


def test_weight_slices_follow_the_weights():
    """Slices are kept between calls without gradients: a changed weight must change the answer."""
    model = dynamic_model()
    _, inputs = inputs_of(model)
    policy = StaticPolicy(3, 2, model.policy.ranking())
    with torch.no_grad():
        before = execute(model.encoder, policy, **inputs).logits
        assert torch.equal(before, execute(model.encoder, policy, **inputs).logits)
        for block in model.encoder.blocks:
            block.up_weight.mul_(1.5)
        after = execute(model.encoder, policy, **inputs).logits
        slow = reference(model.encoder, Plan(policy.sets.expand(7, -1, -1)), **inputs)[-1]
    assert not torch.allclose(before, after, atol=1e-4)
    torch.testing.assert_close(after, slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_weight_slices_follow_the_optimizer(fused):
    """A fused step does not raise the weights' version counters; stale slices once fed a whole training."""
    model = dynamic_model()
    labels, inputs = inputs_of(model)
    policy = StaticPolicy(3, 2, model.policy.ranking())
    plan = Plan(policy.sets.expand(7, -1, -1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            fast = execute(model.encoder, policy, **inputs).logits
            torch.testing.assert_close(fast, reference(model.encoder, plan, **inputs)[-1], atol=1e-5, rtol=1e-5)
        model(**inputs, labels=labels, policy=policy).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_nothing_of_a_step_is_kept_alive():
    """The gate hooks must not tie the graph into a cycle: memory would grow with every step."""
    import gc
    import weakref

    model = dynamic_model()
    labels, inputs = inputs_of(model)
    gc.disable()
    try:
        output = model(**inputs, labels=labels, mode="explore", tap_gates=True)
        output.loss.backward()
        logits = weakref.ref(output.trace.logits)
        del output
        assert logits() is None
    finally:
        gc.enable()


def test_a_row_without_tokens_is_named():
    model = dynamic_model()
    _, inputs = inputs_of(model)
    inputs["attention_mask"][2] = 0
    with pytest.raises(ValueError, match="row 2 of the batch has no real token"):
        model(**inputs)


def test_a_policy_may_not_stop_before_the_first_layer():
    model = dynamic_model()
    _, inputs = inputs_of(model)
    units = random_plan(7).units
    units[3] = False
    with pytest.raises(ValueError, match="row 3: a policy may not stop a row before layer 1"):
        execute(model.encoder, FixedPlan(Plan(units)), **inputs)


def test_a_plan_with_a_gap_names_the_row():
    units = torch.ones(2, 3, 4, dtype=torch.bool)
    units[1, 1] = False
    with pytest.raises(ValueError, match="row 1 of the plan runs a layer after one that it skips"):
        Plan(units)


def test_bfloat16_is_close_to_the_reference():
    model = dynamic_model()
    _, inputs = inputs_of(model)
    plan = random_plan(7)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fast = execute(model.encoder, FixedPlan(plan), **inputs)
    with torch.inference_mode():
        exits = torch.stack(reference(model.encoder, plan, **inputs), 1)
    slow = exits[torch.arange(7), plan.layers - 1]
    assert (fast.logits.float() - slow).abs().max() < 0.05 * slow.abs().max()


def test_a_trace_of_one_row():
    model = dynamic_model()
    inputs = batch()
    trace = model(**inputs, policy=FixedPlan(random_plan(7))).trace
    for row in (0, 3, -1):
        one = trace[row]
        assert torch.equal(one.units[0], trace.units[row])
        assert one.flops_fraction == pytest.approx(float(trace.flops[row] / trace.dense_flops[row]))
        assert torch.equal(one.logits[0], trace.logits[row])
        assert len(one.exits) == int(trace.layers[row])
        assert torch.equal(one.exits[-1].logits[0], trace.logits[row])
    with pytest.raises(IndexError, match="row 7 of a trace of 7 rows"):
        trace[7]
