"""The fast executor: runs, layer by layer, only the rows and head units that the policy picks.

Rows that stop are dropped from the packed batch. The others are ordered by head set, unless they lie so already: every
set is one contiguous group that runs as a dense block on sliced weights. `reference.py` is the plain version that the
tests hold this against.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..plan import Account, Exit, Mode, Ran, Trace
from .block import GateTap, Group
from .encoder import Encoder
from .packed import Packed
from .slices import Units

if TYPE_CHECKING:
    from ..policy.base import Policy


SERVES = ("exploit", "probe")
"""Modes in which rows are answered as they are when serving: exits add up, and the lexical one is read."""


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
    from ..policy.base import View, nobody

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    num_layers, cost, learns = len(encoder.blocks), encoder.cost, policy.num_features > 0
    packed = encoder.embeddings(input_ids, attention_mask, token_type_ids)
    bias = encoder.position_bias(packed.max_length) if encoder.position_bias is not None and len(input_ids) else None
    deciding = [policy.decision_flops(layer, cost) for layer in range(num_layers)] if learns else None
    account = Account(cost, packed.lengths, deciding)
    trace = Trace(account)
    logits: Tensor | None = None
    previous: Tensor | None = None
    # Exits learn to stand alone; only what is served, or probed for it, adds up.
    serves = mode in SERVES and not encoder.training and policy.reads_exits
    mixture = encoder.mixture_on(packed.hidden.device) if serves else None
    own: Tensor | None = None  # [R, exits so far, C], if they are to add up
    keep = attention_mask.bool() if encoder.tags else None
    if encoder.lexical is not None and serves:
        logits = encoder.lexical(input_ids, attention_mask)
        trace.exits.append(Exit(0, packed.rows, logits, logits))
        account.lexical = True
        own = logits[:, None]
    # A choice has no gradient, and what a policy keeps may come from inference.
    choosing = torch.no_grad if torch.is_grad_enabled() else nullcontext
    in_step = encoder.sharded  # every rank then has to call every block, if need be with no rows

    for layer in range(num_layers):
        if not packed.rows.numel() and not in_step:
            break
        started = time.perf_counter()
        view = View(layer, packed, logits, previous, input_ids, attention_mask, trace, mode)
        with choosing():
            decision = policy.decide(view) if packed.rows.numel() else nobody(packed.rows, cost.heads)
        if learns and packed.rows.numel():
            trace.decisions.append((packed.rows, decision))
        trace.policy_seconds += time.perf_counter() - started

        chosen = decision.choice.cpu()  # what a policy decides on an accelerator is waited for here
        choice = chosen.tolist()
        runs = _runs(choice)
        if logits is not None and not in_step and max(choice) < 0:
            break  # all leave, and have their exits
        if -1 in choice or len({i for i, _ in runs}) < len(runs):  # else the rows lie group by group as they are
            order = chosen.argsort(stable=True)
            runs = _runs(sorted(choice))
            leaving = runs.pop(0)[1] if runs[0][0] < 0 else 0
            if leaving and logits is None:  # they were not read by the policy and still owe their exit
                if layer == 0:
                    row = int(packed.host_rows[order[0]])
                    raise ValueError(f"row {row}: a policy may not stop a row before layer 1, where no exit was read")
                left = packed.select(order[:leaving])
                trace.exits.append(Exit(layer, left.rows, _exit(encoder, layer, left, keep)))
                account.left.append((left.rows, left.lengths, encoder.attends(layer)))
            order = order[leaving:]
            if not order.numel() and not in_step:
                break
            packed = packed.select(order)
            if logits is not None:
                order = order.to(logits.device, non_blocking=True)
                logits, own = logits[order], None if own is None else own[order]

        sets = decision.sets.tolist()
        used = [(i, tuple(h for h, on in enumerate(sets[i]) if on), count) for i, count in runs]
        parts = [None if len(units) == cost.heads else units for _, units, _ in used]
        taps: list[GateTap | None] = [None] * len(used)
        if tap_gates and used:
            gates = trace.gate_grads.setdefault(layer, [])
            layouts = packed.split([count for *_, count in used])
            taps = [_tap(gates, rows.rows, rows.token_row, units) for rows, units in zip(layouts, parts, strict=True)]
        groups = [Group(units, count, tap) for units, (*_, count), tap in zip(parts, used, taps, strict=True)]
        packed = packed.with_hidden(encoder.blocks[layer](packed, groups, bias, decision.lasting))
        ran = Ran(
            layer, packed.rows, packed.lengths, [(decision.sets[i], len(units), count) for i, units, count in used]
        )
        if used:
            account.ran.append(ran)
        previous, logits = logits, None
        if policy.reads_exits or every_exit or layer == num_layers - 1:
            alone = logits = _exit(encoder, layer + 1, packed, keep)
            if mixture is not None:
                now = alone[:, None].float()
                own = now if own is None else torch.cat([own, now], 1)
                logits = mixed(own, mixture[layer])
            trace.exits.append(Exit(layer + 1, packed.rows, logits, alone))
            ran.exits = encoder.attends(layer + 1)
    places = () if keep is None else keep.shape[1:]
    trace.logits = _answers(trace.exits, len(input_ids), packed.hidden.new_zeros(0, *places, cost.classes))
    return trace


def mixed(own: Tensor, weights: Tensor) -> Tensor:
    """Logits [R, C]: the first exits' own logits, float [R, e, C], each times its weight ([e] or more)."""
    return (own * weights[: own.shape[1], None]).sum(1)  # no product of matrices: autocast would round it


def _runs(choice: list[int]) -> list[tuple[int, int]]:
    """(value, how often) of neighbours that are equal."""
    return [(value, sum(1 for _ in run)) for value, run in groupby(choice)]


def _exit(encoder: Encoder, layer: int, rows: Packed, keep: Tensor | None) -> Tensor:
    """Logits [R, C] of the exit after `layer` in 1..N; of a tagger [R, T, C], -inf at places without a token.

    Args:
        keep: bool [B, T], where the batch has tokens; None = no tagger.
    """
    logits = encoder.exit(layer, rows)
    if keep is None:
        return logits
    here = keep[rows.rows]
    placed = logits.new_full((*here.shape, logits.shape[-1]), -torch.inf)
    placed[here] = logits
    return placed


def _answers(exits: list[Exit], rows: int, none: Tensor) -> Tensor:
    """[B, C] (of a tagger [B, T, C]), the logits of the last exit that each row reached; `none` if there is no exit."""
    if not exits:
        return none
    if len(exits) == 1 and len(exits[0].rows) == rows == 1:
        return exits[0].logits
    answer = exits[0].logits.new_zeros(rows, *exits[0].logits.shape[1:])
    for exit_ in exits:
        answer = answer.index_copy(0, exit_.rows, exit_.logits.to(answer.dtype))
    return answer


def _tap(gates: list[tuple[Tensor, Tensor, Tensor]], rows: Tensor, token_row: Tensor, units: Units | None) -> GateTap:
    """Sums activation * gradient over each row's tokens: d loss / d gate, one entry for attention and one for the FFN.

    It must not hold the trace: the trace holds the graph, the graph holds this hook, and nothing would ever be freed.
    A function and no `partial`, into which a compiler looks: it would compile a block anew for other units.
    """

    def tap(part: str, product: Tensor) -> None:
        per_token = product.sum(-1)
        grads = per_token.new_zeros(rows.numel(), per_token.shape[-1]).index_add(0, token_row, per_token)
        gates.append((rows, torch.tensor(units or range(grads.shape[1]), device=grads.device), grads))

    return tap
