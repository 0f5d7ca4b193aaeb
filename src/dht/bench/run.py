"""`dht bench`: models and rows in, parity checked, the speed table out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import DHTError
from ..load import device_of
from ..policy.base import Policy
from ..policy.baselines import DensePolicy
from .bandits import measure_bandits
from .contend import PolicyAt, inference, plain_of, planned, priced, training
from .header import header
from .inputs import on_device
from .parity import check_parity
from .settings import BenchSettings
from .speed import Contender, rows_of, take_turns
from .subject import SIZES, Subject, load_subject
from .whole import measure_whole

Say = Callable[[str], None]


def bench(settings: BenchSettings, say: Say = lambda _: None) -> dict[str, Any]:
    """The full result: `header`, `parity` (largest differences), `rows` (see `rows_of`), `left_out` (sentences).

    Where they were asked for also `bandits` (see `measure_bandits`) and `whole` (rows of `measure_whole`).

    Args:
        say: called with a line of news.

    Raises:
        DHTError: bad settings, nothing to load, or the fast executor disagrees with the reference.
    """
    settings.check()
    device = device_of(settings.device)
    result: dict[str, Any] = {"header": header(settings, device), "parity": {}, "rows": [], "left_out": []}

    def leave_out(what: str) -> None:
        if what not in result["left_out"]:
            result["left_out"].append(what)
            say(f"left out: {what}")

    if "bandits" in settings.what:
        result["bandits"] = measure_bandits(settings.repeats, say)
        for name in result["bandits"]["left_out"]:
            leave_out(f"{name}: not installed; the extra `bench` has it")
    if "whole" in settings.what:
        encoders = settings.models or ("minilm",)
        result["whole"] = [row for name in encoders for row in measure_whole(name, settings, say)]
    if not {"inference", "training"} & set(settings.what):
        return result
    names = settings.models or (("minilm",) if device.type == "cpu" else tuple(SIZES))
    subjects = [load_subject(name, settings, device) for name in names]
    if device.type == "cpu" and not torch.cuda.is_available():
        leave_out("GPU rows: torch sees no CUDA device here")
    for subject in subjects:
        result["parity"][subject.name] = _parity(subject, settings, leave_out)
        say(f"{subject.name}: the executor agrees with the reference")
    for subject in subjects:
        result["rows"] += _measure(subject, settings, device, leave_out, say)
    return result


def _parity(subject: Subject, settings: BenchSettings, leave_out: Say) -> dict[str, float]:
    """Checks every kind of plan that is to be timed, and the trained policy, on a small batch of odd lengths."""
    model = subject.model
    batch = on_device(subject.rows.odd(), model.device)
    policies: dict[str, Policy] = {}
    for kind, fraction in _asked(subject, settings):
        if kind == "policy":
            policies[kind] = model.policy
            continue
        try:
            policies[f"{kind} {fraction:g}"] = planned(kind, fraction, model, [batch], 1, settings.seed)(0, 0)
        except DHTError as error:
            leave_out(f"{subject.name}: {error}")
    policies["dense"] = DensePolicy(model.config.num_attention_heads).to(model.device)
    return check_parity(model, batch, policies, gradients="training" in settings.what)


def _asked(subject: Subject, settings: BenchSettings) -> list[tuple[str, float]]:
    """The plans to time below 1.0, (kind, fraction); at 1.0 there is only the dense model."""
    below = [f for f in settings.fractions if f < 1.0]
    return [(kind, f) for kind in settings.plans for f in below if kind != "policy" or subject.learned]


def _measure(
    subject: Subject, settings: BenchSettings, device: torch.device, leave_out: Say, say: Say
) -> list[dict[str, Any]]:
    if not subject.learned and "policy" in settings.plans:
        leave_out(f"{subject.name}: plans of a trained policy; give the folder of a dht train as --model")
    if subject.model.config.source == "dht":
        leave_out(f"{subject.name}: transformers has no counterpart of a preset; our own dense path is the denominator")
    on_gpu = device.type == "cuda"
    batches = settings.batch or ((128, 512) if on_gpu else (1, 32, 128))
    sizes = {"inference": batches, "training": settings.training_batch or (batches if on_gpu else (32,))}
    dtypes = settings.dtype or (("bfloat16",) if on_gpu else ("float32", "bfloat16"))
    rows = []
    for tokens in settings.tokens:
        policies: dict[bool, dict[float, Policy]] = {}
        for what in (kind for kind in settings.what if kind in sizes):
            for dtype in dtypes:
                for batch in sizes[what]:
                    say(f"{subject.name}: {what}, {dtype}, {batch} x {tokens}")
                    cell = {"model": subject.name, "what": what, "dtype": dtype, "batch": batch, "tokens": tokens}
                    # The dozen rows timed at batch 1 are too few to be like the others: they have their own price.
                    if (alone := batch == 1) not in policies:
                        policies[alone] = _policies(subject, settings, 1 if alone else 32, tokens, leave_out)
                    rows += _cell(subject, settings, cell, policies[alone], leave_out)
    return rows


def _policies(
    subject: Subject, settings: BenchSettings, batch: int, tokens: int | str, leave_out: Say
) -> dict[float, Policy]:
    """The trained policy at each fraction, priced on the rows of this batch size and length."""
    policies: dict[float, Policy] = {}
    sample = [on_device(b, subject.model.device) for b in subject.rows.batches(batch, tokens)]
    for kind, fraction in _asked(subject, settings):
        if kind == "policy":
            try:
                policies[fraction] = priced(subject.model, fraction, sample)
            except DHTError as error:
                leave_out(f"{subject.name}, tokens {tokens}: {error}")
    return policies


def _cell(
    subject: Subject, settings: BenchSettings, cell: dict[str, Any], policies: dict[float, Policy], leave_out: Say
) -> list[dict[str, Any]]:
    """All rows of one combination of what, dtype, batch and tokens: their contenders take turns."""
    model, batch, repeats = subject.model, cell["batch"], settings.repeats
    dtype = getattr(torch, cell["dtype"])
    batches = [on_device(b, model.device) for b in subject.rows.batches(batch, cell["tokens"])]
    plain = plain_of(model)
    trains = cell["what"] == "training"
    cast = None if trains else dtype
    if cast and model.device.type == "cuda":  # the weights themselves, as models are served there: no casts on the way
        model, cast = copy.deepcopy(model).to(dtype), torch.float32
        plain = plain and plain.to(dtype)
    if trains:
        contenders, make = training(model, plain, batches, dtype)
    else:
        contenders, forward = inference(model, plain, batches)

        def make(policy_at: PolicyAt, fraction: float = 1.0) -> Any:
            return forward(policy_at)

    for kind, fraction in _asked(subject, settings):
        policy_at: PolicyAt
        if kind == "policy":
            if fraction not in policies:
                continue
            # A training step moves the policy: each cell starts from the priced one.
            policy_at = _always(copy.deepcopy(policies[fraction]) if trains else policies[fraction])
        else:
            try:
                policy_at = planned(kind, fraction, model, batches, repeats + 2, settings.seed)
            except DHTError as error:
                leave_out(f"{subject.name}: {error}")
                continue
        name = f"{kind} {fraction:g}"
        contenders.append(Contender(name, make(policy_at, fraction), kind, fraction, learned=kind == "policy"))
    sizes = [b["input_ids"].numel() for b in batches]
    times = take_turns(contenders, sizes, repeats, model.device, inference_dtype=cast)
    rows = rows_of(contenders, times, batch, cell)
    return rows if 1.0 in settings.fractions else rows[1:]


def _always(policy: Policy) -> PolicyAt:
    return lambda index, turn: policy


def brief(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """The rows as one line of JSON holds them: model, what, dtype, batch, tokens, plan and the three figures."""
    keys = ("model", "what", "dtype", "batch", "tokens", "plan", "fraction")
    figures = ("theoretical", "measured", "realised")
    return [[*(row[key] for key in keys), *(round(row[key], 4) for key in figures)] for row in rows]
