"""Before training: layers that will run a part of their head units learn from themselves at full width what to say.

Cutting a pretrained layer breaks what it had learned, and a few thousand labelled rows do not repair it. Its own hidden
states, before the cut, are a far richer teacher than labels, and imitating them needs no labels and no dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from .hf.modeling import DHTForSequenceClassification
from .plan import Trace
from .policy.base import Policy, View
from .policy.baselines import DepthPolicy

LR = 1e-3
"""Peak learning rate: the blocks alone are trained, on a smooth target."""

ROWS = 8
"""Rows of a batch: many small steps go further than few large ones at the same FLOPs."""


class EveryRow(DepthPolicy):
    """All rows run the units of `sets` [N, H]; no exit on the way."""

    name = "every row"
    trains_exits = False

    def stops(self, view: View) -> Tensor:
        return torch.zeros_like(view.rows, dtype=torch.bool)


def imitate(model: DHTForSequenceClassification, batches: Sequence[dict[str, Tensor]], sets: Tensor) -> float:
    """Trains the blocks so that `sets` give the hidden states of all units; returns the FLOPs that this took.

    The loss is the squared error over the variance, averaged over the layers that run; of the teacher, a frozen copy,
    only a forward is run.

    Args:
        batches: inputs, one optimizer step each, on the model's device; labels are ignored.
        sets: bool [N, H], the units of each layer; a layer without any is not trained, nor are those above it.

    Source: hidden-state distillation as in TinyBERT (arXiv 1909.10351), here from a layer to a part of itself.
    """
    if not batches:
        return 0.0
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    whole = EveryRow(sets.any(-1, keepdim=True).expand_as(sets))
    part, spent = EveryRow(sets), 0.0
    was_training = model.training
    model.eval()
    trained = [p for p in model.encoder.blocks.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            wanted, taught = _hidden(teacher, inputs, whole)
        said, learned = _hidden(model, inputs, part)
        loss = torch.stack([(x - y).square().mean() / y.var() for x, y in zip(said, wanted, strict=True)]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad(set_to_none=True)
        spent += float(taught.flops.sum()) + 3.0 * float(learned.flops.sum())
    model.train(was_training)
    return spent


def _hidden(
    model: DHTForSequenceClassification, inputs: dict[str, Tensor], policy: Policy
) -> tuple[list[Tensor], Trace]:
    """Float32 [S, D] of every layer that ran, the tokens of all rows end to end, and the trace."""
    found: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda module, args, out: found.append(out)) for b in model.encoder.blocks]
    try:
        trace = model(**inputs, policy=policy).trace
    finally:
        for hook in hooks:
            hook.remove()
    return [hidden.float() for hidden in found], trace
