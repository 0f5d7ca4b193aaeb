"""Who is timed: `transformers`, our dense path, fixed plans and the trained policy; a forward, or a training step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adamw import optimizer_of, update
from ..errors import DHTError
from ..hf.convert import FAMILIES, export
from ..hf.modeling import DHTForSequenceClassification, exit_loss
from ..measure import autocast, split_labels
from ..plan import Trace
from ..policy.base import Policy
from ..policy.baselines import DensePolicy
from ..policy.budget import HIGHEST, LOWEST, dual_ascent
from ..policy.learned import LearnedPolicy
from ..policy.reward import quality
from .inputs import Batch
from .plans import REACHED, PreparedPlan, plan_of, shape_for
from .speed import Call, Contender

PRICE_RATE = 0.1  # of `DHTTrainer`
TINY = 1e-9  # a learning rate at which steps take their time and change nothing
PolicyAt = Callable[[int, int], Policy]
"""The policy for batch number i in turn t."""


def plain_of(model: DHTForSequenceClassification) -> PreTrainedModel | None:
    """The same dense weights in `transformers`; None for a preset, which has no counterpart there."""
    return export(model).eval().to(model.device) if model.config.source in FAMILIES else None


def planned(
    kind: str, fraction: float, model: DHTForSequenceClassification, batches: Sequence[Batch], turns: int, seed: int
) -> PolicyAt:
    """Fixed plans of a kind for each batch. Worst-case ones change every turn: a server meets no head set twice.

    Raises:
        DHTError: the model has no plan of that kind near the fraction.
    """
    cost = model.encoder.cost
    generator = torch.Generator().manual_seed(seed)
    versions: list[list[Policy]] = []
    first = 0
    # One fixed set a layer for all batches, as a trained policy keeps them; drawn anew for each kind and fraction.
    sets_seed = int(torch.randint(2**31, (), generator=generator))
    for batch in batches:
        length = int(batch["attention_mask"].sum(-1).double().mean().round())
        shape = shape_for(kind, fraction, cost, length)
        rows = range(first, first + len(batch["attention_mask"]))
        first = rows.stop
        worst = kind == "worst"
        made: list[Policy] = []
        for _ in range(turns if worst else 1):
            draw = generator if worst else torch.Generator().manual_seed(sets_seed)
            made.append(PreparedPlan(plan_of(shape, rows, cost.heads, draw, worst=worst), lasting=not worst))
        versions.append(made)
    return lambda index, turn: versions[index][turn % len(versions[index])]


def priced(model: DHTForSequenceClassification, fraction: float, batches: Sequence[Batch]) -> LearnedPolicy:
    """A copy of the model's policy at the price that makes it spend `fraction` on these rows.

    The price curve kept with a run belongs to its own data; other lengths lie elsewhere on it. The decisions are the
    policy's own: only the price is set.

    Raises:
        DHTError: no price leads there.
    """
    policy = copy.deepcopy(model.policy)
    low, high, best, gap = LOWEST, HIGHEST, 0.0, float("inf")
    model.eval()
    with torch.inference_mode():
        for _ in range(16):
            # Prices that matter lie near 0: halving -1..10 alone would spend its steps far away from them.
            price = 0.0 if low < 0 < high else (low + high) / 2
            policy.price.fill_(price)
            spent = _fraction(model, policy, batches)
            if abs(spent - fraction) < gap:
                best, gap = price, abs(spent - fraction)
            if gap < 0.005:
                break
            low, high = (price, high) if spent > fraction else (low, price)
    policy.price.fill_(best)
    if gap > REACHED:
        raise DHTError(f"policy at {fraction:g}: no price brings the trained policy nearer than {gap:.2f} to it")
    return policy


def _fraction(model: DHTForSequenceClassification, policy: Policy, batches: Sequence[Batch]) -> float:
    executed = dense = 0.0
    for batch in batches:
        _, inputs = split_labels(batch, model.device)
        trace = model(**inputs, policy=policy).trace
        executed, dense = executed + float(trace.flops.sum()), dense + float(trace.dense_flops.sum())
    return executed / dense


def inference(
    model: DHTForSequenceClassification, plain: PreTrainedModel | None, batches: Sequence[Batch]
) -> tuple[list[Contender], Callable[[PolicyAt], Callable[[int, int], Call]]]:
    """The dense contenders, and what makes a contender's `run` of a policy: one forward of a batch."""
    model.eval()
    inputs = [split_labels(batch, model.device)[1] for batch in batches]

    def forward(policy_at: PolicyAt) -> Callable[[int, int], Call]:
        def run(index: int, turn: int) -> Call:
            trace = model(**inputs[index], policy=policy_at(index, turn)).trace
            return Call(trace, trace.policy_seconds)

        return run

    dense = DensePolicy(model.config.num_attention_heads).to(model.device)
    contenders = [Contender("dense", forward(lambda index, turn: dense))]
    if plain is not None:

        def plain_forward(index: int, turn: int) -> Call:
            plain(**inputs[index])
            return Call()

        contenders.insert(0, Contender("transformers", plain_forward))
    return contenders, forward


def training(
    model: DHTForSequenceClassification, plain: PreTrainedModel | None, batches: Sequence[Batch], dtype: torch.dtype
) -> tuple[list[Contender], Callable[[PolicyAt, float], Callable[[int, int], Call]]]:
    """The dense contenders, and what makes a contender's `run` of a policy: one whole training step on a batch.

    A step is forward, backward, gradient clipping and fused AdamW: for all of ours, the dense path too, with a deferred
    embedding table, as `dht train` has it. A learned policy explores, pays its head units and its numbers (as in a
    first epoch, the dearest) and moves its price. Left out: surveys and probes of held-out rows, which come every 50th
    and 32nd step. The learning rate is too small to change anything. All of ours share one copy of the weights and one
    optimizer.
    """
    ours = copy.deepcopy(model).train()
    halves = [split_labels(batch, model.device) for batch in batches]
    optimizer = optimizer_of(ours, TINY)

    def step(policy_at: PolicyAt, fraction: float = 1.0) -> Callable[[int, int], Call]:
        def run(index: int, turn: int) -> Call:
            labels, inputs = halves[index]
            policy = policy_at(index, turn)
            learns = isinstance(policy, LearnedPolicy)
            with autocast(model.device, dtype):
                if policy.trains_exits:
                    mode = "explore" if learns else "exploit"
                    trace = ours(**inputs, policy=policy, mode=mode, every_exit=True, tap_gates=learns).trace
                    loss = exit_loss(trace, labels, ours.task, ours.config.distillation)
                else:
                    output = ours(**inputs, policy=policy, labels=labels)
                    trace, loss = output.trace, output.loss
            loss.backward()
            seconds = trace.policy_seconds
            if isinstance(policy, LearnedPolicy):
                seconds += _observe(policy, trace, quality(trace, labels, ours.task), fraction)
            update(ours, optimizer)
            return Call(trace, seconds)

        return run

    dense = DensePolicy(model.config.num_attention_heads).to(model.device)
    contenders = [Contender("dense", step(lambda index, turn: dense))]
    if plain is not None and model.config.head != "embedding":  # no loss without a head there
        plain = copy.deepcopy(plain).train()
        contenders.insert(0, Contender("transformers", _plain_step(plain, halves, model.device, dtype)))
    return contenders, step


def _plain_step(plain: PreTrainedModel, halves: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Any:
    optimizer = torch.optim.AdamW(plain.parameters(), lr=TINY, weight_decay=0.0, fused=True)

    def run(index: int, turn: int) -> Call:
        labels, inputs = halves[index]
        with autocast(device, dtype):
            loss = plain(**inputs, labels=labels).loss
        loss.backward()
        update(plain, optimizer)
        return Call()

    return run


@torch.no_grad()
def _observe(policy: LearnedPolicy, trace: Trace, paid: torch.Tensor, fraction: float) -> float:
    """What `DHTTrainer` does after a backward; returns its seconds."""
    started = time.perf_counter()
    policy.observe_units(trace)
    policy.observe(trace, paid)
    policy.price.fill_(dual_ascent(float(policy.price), trace.flops_fraction, fraction, PRICE_RATE))
    policy.finish_step()
    return time.perf_counter() - started
