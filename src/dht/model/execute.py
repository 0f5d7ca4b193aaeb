"""The fast executor: runs, layer by layer, only the rows and head units that the policy picks.

Rows that stop are dropped from the packed batch. The others are ordered by head set, so that every set is one
contiguous group that runs as a dense block on sliced weights. `reference.py` is the plain version that the tests hold
this against.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..plan import Exit, Mode, Trace
from .encoder import Encoder
from .packed import Packed

if TYPE_CHECKING:
    from ..policy.base import Policy


def execute(
    encoder: Encoder,
    policy: Policy,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    *,
    mode: Mode = "exploit",
    every_exit: bool = False,
    tap_gates: bool = False,
) -> Trace:
    """What ran for each row and the logits that it led to.

    Args:
        encoder: the modules.
        policy: decides before every layer; see `Policy`.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 1 at real tokens; None = all. Every row needs at least one real token.
        token_type_ids: int64 [B, T] or None.
        mode: passed to the policy.
        every_exit: compute all visited exits (training), even if the policy does not read them.
        tap_gates: fill `trace.gate_grads` during backward.

    Raises:
        ValueError: a row has no real token.
    """
    from ..policy.base import View

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    empty = ~attention_mask.any(-1)
    if bool(empty.any()):
        raise ValueError(
            f"row {int(empty.nonzero()[0])} of the batch has no real token: its attention_mask is all zero"
        )
    batch, num_layers, heads, device = input_ids.shape[0], len(encoder.blocks), encoder.cost.heads, input_ids.device
    cost, learns = encoder.cost, policy.num_features > 0
    packed = encoder.embeddings(input_ids, attention_mask, token_type_ids)
    bias = encoder.position_bias(packed.max_length) if encoder.position_bias is not None and batch else None
    trace = Trace(
        units=torch.zeros(batch, num_layers, heads, dtype=torch.bool, device=device),
        flops=cost.embedding(packed.lengths),
        dense_flops=cost.dense(packed.lengths),
        layer_cost=torch.zeros(batch, num_layers, dtype=torch.float64, device=device),
    )
    logits: Tensor | None = None
    previous: Tensor | None = None

    def leave(layer: int, rows: Packed) -> None:
        """Rows that end after `layer` without having been read by the policy still owe their exit."""
        if rows.rows.numel():
            trace.exits.append(Exit(layer, rows.rows, encoder.exit(layer, rows)))
            trace.flops[rows.rows] += encoder.exit_cost(layer, rows)

    for layer in range(num_layers):
        if not packed.rows.numel():
            break
        started = time.perf_counter()
        view = View(layer, packed, logits, previous, input_ids, attention_mask, trace, mode)
        with torch.no_grad():  # a choice has no gradient, and what a policy keeps may come from inference
            decision = policy.decide(view)
        if learns:
            trace.decisions.append((packed.rows, decision))
        trace.policy_seconds += time.perf_counter() - started

        choice = decision.choice
        order = choice.argsort(stable=True)
        counts = torch.bincount(choice + 1, minlength=decision.sets.shape[0] + 1).tolist()
        leaving, counts = counts[0], counts[1:]
        if leaving and logits is None:
            if layer == 0:
                raise ValueError(f"row {int(packed.rows[choice < 0][0])}: a policy may not stop a row before layer 1")
            leave(layer, packed.select(order[:leaving]))
        if leaving or sum(count > 0 for count in counts) > 1:
            order = order[leaving:]
            packed = packed.select(order)
            if logits is not None:
                logits = logits[order]
            if not packed.rows.numel():
                break

        gates = trace.gate_grads.setdefault(layer, []) if tap_gates else []
        used = [(units, count) for units, count in zip(decision.sets, counts, strict=True) if count]
        groups = packed.split([count for _, count in used])
        outputs = []
        for (mask, _), group in zip(used, groups, strict=True):
            size = int(mask.sum())
            units = None if size == heads else mask.nonzero()[:, 0]
            tap = partial(_tap, gates, group.rows, group.token_row, units) if tap_gates else None
            outputs.append(encoder.blocks[layer](group, units, bias, tap))
            trace.units[group.rows, layer] = mask
            spent = cost.layer(group.lengths, size, group.max_length)
            trace.layer_cost[group.rows, layer] = spent
        packed = packed.with_hidden(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        previous, logits = logits, None
        if policy.reads_exits or every_exit or layer == num_layers - 1:
            logits = encoder.exit(layer + 1, packed)
            trace.exits.append(Exit(layer + 1, packed.rows, logits))
            trace.layer_cost[packed.rows, layer] += encoder.exit_cost(layer + 1, packed)
    trace.flops += trace.layer_cost.sum(-1)
    if learns:  # a row that ran a layer decided before it, and once more unless that was the last
        decided = [policy.decision_flops(layer, cost) for layer in range(num_layers)]
        spent = torch.tensor([0.0, *decided], dtype=torch.float64, device=device).cumsum(0)
        trace.flops += spent[(trace.layers + 1).clamp_max(num_layers)]
    trace.layer_cost /= trace.dense_flops[:, None]
    if trace.exits:
        answer = trace.exits[0].logits.new_zeros(batch, trace.exits[0].logits.shape[-1])
        for exit_ in trace.exits:
            answer = answer.index_copy(0, exit_.rows, exit_.logits)
        trace.logits = answer
    else:
        trace.logits = packed.hidden.new_zeros(0, cost.classes)
    return trace


def _tap(
    gates: list[tuple[Tensor, Tensor, Tensor]],
    rows: Tensor,
    token_row: Tensor,
    units: Tensor | None,
    part: str,
    product: Tensor,
) -> None:
    """Sums activation * gradient over each row's tokens: d loss / d gate, one entry for attention and one for the FFN.

    It must not hold the trace: the trace holds the graph, the graph holds this hook, and nothing would ever be freed.
    """
    per_token = product.sum(-1)
    grads = per_token.new_zeros(rows.numel(), per_token.shape[-1]).index_add(0, token_row, per_token)
    if units is None:
        units = torch.arange(grads.shape[1], device=grads.device)
    gates.append((rows, units, grads))
