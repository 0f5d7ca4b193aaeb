"""Before training: exit heads that say something, FFN neurons dealt to head units, and a first ranking of the units.

All of it comes from a few batches that run densely without touching the encoder's weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._labels import IGNORED
from .hf.convert import deal_neurons
from .hf.modeling import DHTForSequenceClassification, exit_loss
from .maps import fit_maps
from .model.execute import execute
from .plan import Trace
from .policy.reward import quality
from .task import Embedding


def calibrate(
    model: DHTForSequenceClassification, batches: Iterable[dict[str, Tensor]], *, head_steps: int = 60, lr: float = 5e-4
) -> float:
    """Readies a converted model for training and returns the FLOPs spent, in units of one dense forward of one batch.

    1. The hidden states of `batches` are computed once and every exit head is fitted to them.
    2. Gate gradients of the exits' loss give the importance of heads and neurons.
    3. Neurons are dealt to units, best to best (`ffn="coupled"`), which changes no output; the head posteriors learn.

    Args:
        batches: inputs with `labels`, on the model's device; kept in memory.
        head_steps: optimizer steps on the exit heads.
        lr: learning rate of those steps.
    """
    batches = list(batches)
    model.policy.restart()
    model.policy.mean_tokens.zero_()  # while weights are trained all rows pay alike (decision 13)
    encoder = model.encoder
    was_training = model.training
    model.eval()
    frozen = [p for p in model.parameters() if p.requires_grad]
    _fit_exit_heads(model, batches, head_steps, lr)
    for parameter in frozen:
        parameter.requires_grad_(False)
    heads = torch.zeros(len(encoder.blocks), encoder.cost.heads, dtype=torch.float64)
    neurons = [torch.zeros(b.down_weight.shape[:2], dtype=torch.float64) for b in encoder.blocks]
    traces = []
    spent = 0.0
    for batch in batches:
        labels = batch["labels"]
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.enable_grad():
            trace = _surveyed(model, inputs, heads, neurons)
            exit_loss(trace, labels, model.task).backward()
        traces.append((trace, labels))
        spent += 1.0 + 2.0  # a forward for the heads; a forward and the activations' half of a backward for the gates
    for parameter in frozen:
        parameter.requires_grad_(True)
    if model.config.ffn == "coupled":
        for block, unit, neuron in zip(encoder.blocks, heads, neurons, strict=True):
            deal_neurons(block, unit, neuron)
            neuron.copy_(neuron.flatten().sort(dim=0, descending=True).values.view_as(neuron)[_rank(unit)])
    for trace, labels in traces:
        model.policy.observe(trace, quality(trace, labels, model.task))
        _observe_importance(model, trace, heads, neurons)
        model.policy.finish_step()
    model.train(was_training)
    return spent


def _rank(importance: Tensor) -> Tensor:
    """int64 [H], each unit's place in the order of importance, 0 = best."""
    return importance.argsort(dim=0, descending=True).argsort(dim=0)


def _fit_exit_heads(
    model: DHTForSequenceClassification, batches: list[dict[str, Tensor]], steps: int, lr: float
) -> None:
    encoder, task = model.encoder, model.task
    pooled: list[list[Tensor]] = [[] for _ in encoder.blocks]
    told = []
    for batch in batches:
        labels = batch["labels"]
        if model.tags:  # every token that has a tag is a row of its own
            labels = labels[batch["attention_mask"].bool()][:, None]
            tagged = labels[:, 0] != IGNORED
            labels = labels[tagged]
        told.append(labels)
        with torch.no_grad():
            rows = encoder.embeddings(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
            bias = encoder.position_bias(rows.max_length) if encoder.position_bias is not None else None
            for layer, block in enumerate(encoder.blocks):
                rows = rows.with_hidden(block(rows, None, bias))
                read = encoder.pool(layer + 1, rows).float()
                pooled[layer].append(read[tagged][:, None] if model.tags else read)
    labels = torch.cat(told)
    states = [torch.cat(part) for part in pooled]
    if isinstance(task, Embedding):
        fit_maps(list(encoder.exits), states, labels)
        return
    optimizer = torch.optim.AdamW(encoder.exits.parameters(), lr=lr)
    for _ in range(steps):
        loss = torch.stack([task.losses(e(x), labels).mean() for e, x in zip(encoder.exits, states, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)


def _surveyed(
    model: DHTForSequenceClassification, inputs: dict[str, Tensor], heads: Tensor, neurons: list[Tensor]
) -> Trace:
    """A dense trace whose backward adds each row's |d loss / d gate| to `heads` [N, H] and to `neurons`."""
    encoder = model.encoder
    hooks: list[Any] = []
    layers = {id(block): i for i, block in enumerate(encoder.blocks)}

    def listen(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, (group,), *rest = args  # a survey is one group, of all units
        layer = layers[id(block)]

        def tap(part: str, product: Tensor) -> None:
            flat = product.flatten(1)
            per_row = flat.new_zeros(rows.lengths.numel(), flat.shape[1]).index_add(0, rows.token_row, flat)
            if part == "attention":
                per_unit = per_row.view(len(per_row), *product.shape[1:]).sum(-1)
                heads[layer] += per_unit.abs().sum(0).double().cpu()
            else:
                neurons[layer] += per_row.abs().sum(0).view(product.shape[1:]).double().cpu()

        return rows, (group._replace(tap=tap),), *rest

    hooks.extend(block.register_forward_pre_hook(listen) for block in encoder.blocks)
    words = encoder.embeddings.words
    hooks.append(words.register_forward_hook(lambda *a: a[-1].requires_grad_()))
    try:
        return execute(
            encoder, model.policy, inputs["input_ids"], inputs["attention_mask"], inputs.get("token_type_ids"),
            mode="survey", every_exit=True,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()


def _observe_importance(
    model: DHTForSequenceClassification, trace: Trace, heads: Tensor, neurons: list[Tensor]
) -> None:
    """Feeds the posteriors of the head units with the batch-mean importance of head and neurons together."""
    policy = model.policy
    value = heads / heads.mean(1, keepdim=True)
    if model.config.ffn == "coupled":
        share = torch.stack([n.sum(-1) for n in neurons])
        value = value + share / share.mean(1, keepdim=True)
        value = value / 2
    rows, context = trace.units.shape[0], trace.context
    for layer in range(policy.layers):
        weight = torch.zeros(rows, policy.layers, policy.heads, dtype=torch.float64)
        target = torch.zeros_like(weight)
        weight[:, layer], target[:, layer] = 1.0, value[layer].expand(rows, -1)
        policy.units.update(context[:, layer], weight.flatten(1), target.flatten(1))
