"""No number before agreement: the fast executor against the masked reference on the plans about to be timed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DHTError
from ..hf.modeling import DHTForSequenceClassification, exit_loss
from ..model.reference import lexical_reference, reference
from ..plan import Plan, Trace
from ..policy.base import Policy
from ..task import Task
from .inputs import Batch

OUTPUTS, GRADIENTS = 1e-4, 1e-3
"""Largest differences allowed in float32, relative to the largest logit and to a parameter's largest gradient."""


def check_parity(
    model: DHTForSequenceClassification, batch: Batch, policies: dict[str, Policy], *, gradients: bool
) -> dict[str, float]:
    """The largest relative difference of each policy from the reference, in float32, logits and gradients together.

    Logits are compared as inference runs (without gradients, where weight slices are kept between calls) and, when
    `gradients`, as training runs, together with the gradient of every parameter.

    Args:
        batch: a small labelled batch on the model's device.
        policies: by the name that an error is to give.
        gradients: also compare gradients.

    Raises:
        DHTError: a difference is above `OUTPUTS` or `GRADIENTS`.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    was_training = model.training
    model.eval()
    worst = {}
    for name, policy in policies.items():
        with torch.inference_mode():
            trace = _run(model, policy, inputs)
            worst[name] = _compare(f"{name}: logits", _answers(model, policy, trace, inputs), trace.logits, OUTPUTS)
        if gradients:
            worst[name] = max(worst[name], _compare_gradients(model, name, policy, inputs, batch["labels"]))
    model.train(was_training)
    return worst


def _run(model: DHTForSequenceClassification, policy: Policy, inputs: Batch, *, training: bool = False) -> Trace:
    trace = model(**inputs, policy=policy, every_exit=training, tap_gates=training).trace
    assert isinstance(trace, Trace)
    return trace


def _answers(model: DHTForSequenceClassification, policy: Policy, trace: Trace, inputs: Batch) -> Tensor:
    """The reference's logits [B, C] (of a tagger [B, T, C]) of the exits at which the rows left."""
    places = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("token_type_ids")
    exits = reference(model.encoder, Plan(trace.units), *places, alone=not policy.reads_exits)
    first = _lexical(model, policy, inputs)
    every = torch.stack([exits[0] if first is None else first, *exits], 1)  # by layers run
    return every[torch.arange(len(every), device=every.device), trace.layers]


def _lexical(model: DHTForSequenceClassification, policy: Policy, inputs: Batch) -> Tensor | None:
    """The reference's logits [B, C] of the exit before layer 1, if the policy reads one."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return lexical_reference(model.encoder, ids, keep) if policy.reads_exits else None


def _compare_gradients(
    model: DHTForSequenceClassification, name: str, policy: Policy, inputs: Batch, labels: Tensor
) -> float:
    parameters = dict(model.encoder.named_parameters())
    model.zero_grad(set_to_none=True)
    trace = _run(model, policy, inputs, training=True)
    exit_loss(trace, labels, model.task).backward()
    fast = {key: _gradient(parameter) for key, parameter in parameters.items()}
    model.zero_grad(set_to_none=True)
    places = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("token_type_ids")
    exits = reference(model.encoder, Plan(trace.units), *places, alone=not policy.reads_exits)
    _reference_loss(_lexical(model, policy, inputs), exits, trace.layers, labels, model.task).backward()
    slow = {key: _gradient(parameter) for key, parameter in parameters.items()}
    model.zero_grad(set_to_none=True)
    # A key's bias has no gradient but rounding: softmax does not see it. So small gradients are judged by the largest.
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in slow.values())
    return max(_compare(f"{name}: gradient of {key}", slow[key], fast[key], GRADIENTS, floor) for key in parameters)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _reference_loss(first: Tensor | None, exits: list[Tensor], layers: Tensor, labels: Tensor, task: Task) -> Tensor:
    """`exit_loss`, from the logits of all exits: the mean loss of the exits passed, `first` included if it is there."""
    total = torch.zeros(len(labels), device=labels.device)
    if first is not None:
        total, layers = task.losses(first, labels), layers + 1
    for depth, logits in enumerate(exits, start=1):
        passed = layers >= depth + (first is not None)
        total = total + passed.float() * task.losses(logits, labels)
    return (total / layers).mean()


def _compare(what: str, expected: Tensor, got: Tensor, allowed: float, floor: float = 1e-6) -> float:
    """The largest difference relative to the largest expected value (at least `floor`)."""
    nothing = expected.isneginf() & got.isneginf()  # a tagger's places without a token
    expected, got = expected.masked_fill(nothing, 0.0), got.masked_fill(nothing, 0.0)
    difference = (expected - got).abs().flatten(1) if expected.ndim > 1 else (expected - got).abs()[:, None]
    relative = float(difference.max() / expected.abs().max().clamp_min(floor))
    if not relative <= allowed:  # a NaN is no agreement
        row = int(difference.amax(1).argmax())
        raise DHTError(
            f"bench: the fast executor disagrees with the reference on {what} by {relative:.1e} (allowed {allowed:g},"
            f" largest at index {row}); nothing is timed until they agree"
        )
    return relative
