"""A fixed plan as one static ONNX graph."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import atomic_file
from ..compare.shapes import Sizes
from ..errors import DHTError
from ..hf.modeling import DHTForSequenceClassification
from ..policy.baselines import StaticPolicy
from .graphs import PlanGraph
from .onnx_file import TOLERANCE, first_line, latency_ms, open_onnx, sample_rows, write_onnx

CHECKED_ROWS = 32


def plan_of(model: DHTForSequenceClassification, plan: str) -> StaticPolicy:
    """The plan called `plan`: "LxK" (L layers with their K best head units) or the best shape below a budget.

    Raises:
        DHTError: neither, or outside the model.
    """
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shape = re.fullmatch(r"(\d{1,4})x(\d{1,4})", plan)
    if shape and 1 <= int(shape[1]) <= layers and 1 <= int(shape[2]) <= heads:
        depth, width = int(shape[1]), int(shape[2])
    elif re.fullmatch(r"0?\.\d+|1(\.0*)?", plan) and float(plan) > 0:
        cost = model.encoder.cost
        ((depth, width),) = Sizes(
            layers, heads, cost.token_fixed / (cost.token_fixed + heads * cost.token_unit)
        ).shapes(float(plan), 1)
    else:
        raise DHTError(
            f"--plan: got {plan!r}; allowed: LxK with L in 1..{layers} and K in 1..{heads}, e.g. {layers}x{heads}, "
            "or a budget in (0, 1]"
        )
    return StaticPolicy(depth, width, model.policy.ranking())


def export_plan(model: DHTForSequenceClassification, plan: StaticPolicy, types: bool, out: Path) -> dict[str, Any]:
    """Writes the graph, compares it with torch row by row, and returns what was measured.

    Args:
        model: on the CPU.
        types: True if the graph takes `token_type_ids`.
        out: the .onnx file.

    Returns:
        layers, units, rows_checked, max_difference (of logits), and latencies in ms of one row and of 32, of 32 tokens,
        on onnxruntime and on torch.

    Raises:
        DHTError: the graph does not agree with torch, or cannot be written.
    """
    units = plan.sets & (torch.arange(len(plan.sets)) < plan.layers)[:, None]
    rows = sample_rows(model, types, CHECKED_ROWS, 32)
    with atomic_file(out) as temporary:
        write_onnx(PlanGraph(model.encoder, units), rows, ["logits"], temporary)
        session = open_onnx(temporary)
        difference = max(_difference(model, plan, session, part) for part in (rows, _first(rows, 1), _first(rows, 5)))
        if not difference <= TOLERANCE:
            raise DHTError(
                f"{out}: onnxruntime and torch disagree by {difference:.2g} in the logits, more than {TOLERANCE:g}; "
                "nothing was written: report this with the versions that dht doctor prints"
            )
        report: dict[str, Any] = {
            "layers": plan.layers, "units": int(units[0].sum()), "rows_checked": CHECKED_ROWS + 6,
            "max_difference": difference,
        }  # fmt: skip
        full = {name: part[:1].repeat(CHECKED_ROWS, 1) for name, part in rows.items()}
        for name, part in (("one_row", _first(full, 1)), (f"{CHECKED_ROWS}_rows", full)):
            fed = _arrays(part)
            with torch.inference_mode():
                report[f"{name}_ms"] = {
                    "onnxruntime": latency_ms(lambda fed=fed: session.run(None, fed)),  # type: ignore[misc]
                    "torch": latency_ms(lambda part=part: model(**part, policy=plan)),  # type: ignore[misc]
                }
    return report


def _difference(
    model: DHTForSequenceClassification, plan: StaticPolicy, session: Any, rows: dict[str, Tensor]
) -> float:
    with torch.inference_mode():
        expected = model(**rows, policy=plan).logits
    try:
        (got,) = session.run(None, _arrays(rows))
    except Exception as error:  # onnxruntime has classes of its own
        raise DHTError(f"export to ONNX: onnxruntime cannot run the graph ({first_line(error)})") from error
    apart = (torch.from_numpy(got) - expected).abs()
    return float((apart[rows["attention_mask"].bool()] if model.tags else apart).max())


def _arrays(rows: dict[str, Tensor]) -> dict[str, Any]:
    return {name: part.numpy() for name, part in rows.items()}


def _first(rows: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: part[:count] for name, part in rows.items()}
