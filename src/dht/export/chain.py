"""The learned policy as a chain of ONNX graphs, one a layer and width, with its linear algebra outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._files import atomic_dir, write_json
from ..errors import DHTError
from ..hf.modeling import DHTForSequenceClassification
from ..model.lexical import PAIR
from ..onnx import CHAIN_FILE, CHAIN_VERSION, POLICY_FILE, ChainRunner
from ..policy.integrated import IntegratedPolicy
from ..policy.learned import LearnedPolicy
from ..policy.tree import CLOSED, TreePolicy
from ..task import SingleLabel
from .graphs import EmbeddingsGraph, LayerGraph
from .onnx_file import TOLERANCE, latency_ms, sample_rows, write_onnx

CHECKED_ROWS = 128
AGREEING = 0.99
"""Share of rows that must take the same layers; the rest may be ties that rounding breaks the other way."""


def export_chain(
    model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, types: bool, max_length: int, out: Path
) -> dict[str, Any]:
    """Writes the graphs, the policy and the tokenizer, compares the chain with torch, and returns what was measured.

    Args:
        model: on the CPU.
        types: True if the embeddings take `token_type_ids`.
        max_length: tokens a text is cut to.
        out: the folder.

    Returns:
        graphs, rows_checked, rows_alike (same layers and head units), max_difference (of their logits), and the
        latencies of one row in ms on onnxruntime and on torch.

    Raises:
        DHTError: the model is for another task than single labels or chooses among several head sets a width, the
            chain does not agree with torch, or the folder cannot be written.
    """
    policy, config = model.policy, model.config
    if not isinstance(model.task, SingleLabel):
        raise DHTError(
            f"--format onnx-chain: the model is for {model.task.name}, and the chain reads exits of single labels; "
            "export a plan with --format onnx"
        )
    if policy.max_sets != 1:
        raise DHTError(
            f"--format onnx-chain: the model chooses among head_sets={policy.max_sets} sets for every width, and the "
            "chain holds one; train with head_sets=1, or export a plan with --format onnx"
        )
    rows = sample_rows(model, types, CHECKED_ROWS, min(32, max_length))
    with atomic_dir(out) as folder:
        write_onnx(EmbeddingsGraph(model.encoder), rows, ["states"], folder / "embeddings.onnx")
        with torch.no_grad():
            states = EmbeddingsGraph(model.encoder)(**rows)
        files: list[list[str | None]] = []
        for layer in range(policy.layers):
            names: list[str | None] = [None] * len(policy.widths)
            for i in policy.offered(layer):
                width = policy.widths[i]
                name = f"layer_{layer + 1}_heads_{width}.onnx"
                graph = LayerGraph(model.encoder, layer + 1, policy.head_sets[layer, i, 0])
                inputs = {"states": states, "attention_mask": rows["attention_mask"]}
                write_onnx(graph, inputs, ["next_states", "logits"], folder / name)
                names[i] = name
            files.append(names)
        tokenizer.save_pretrained(folder)
        arrays = _policy_arrays(policy)
        if model.encoder.lexical is not None:
            arrays |= {f"lexical_{name}": x.float().numpy().copy() for name, x in model.encoder.lexical.named_buffers()}
        save_file(arrays, folder / POLICY_FILE)
        facts = {
            "version": CHAIN_VERSION, "search": policy.name, "budget": config.budget, "layers": files,
            "widths": policy.widths, "heads": policy.heads,
            "label_names": [config.label_names[index] for index in range(len(config.label_names))],
            "inputs": list(rows), "pad_token_id": config.pad_token_id or 0, "max_length": max_length,
            "exit_memory": config.exit_memory, "exit_mixture": config.exit_mixture,
            "lexical_pairs": config.lexical_pairs, "pair_factors": PAIR,
        }  # fmt: skip
        write_json(folder / CHAIN_FILE, facts)
        report = _checked(model, ChainRunner(folder, threads=torch.get_num_threads()), rows, out)
    return {"graphs": 1 + sum(name is not None for names in files for name in names), **report}


def _checked(
    model: DHTForSequenceClassification, runner: ChainRunner, rows: dict[str, Tensor], out: Path
) -> dict[str, Any]:
    def torch_run(part: dict[str, Tensor]) -> Any:
        with torch.inference_mode():
            return model(**part).trace

    arrays = {name: part.numpy() for name, part in rows.items()}
    model.policy.set_budget(model.config.budget)
    trace, result = torch_run(rows), runner.run(arrays)
    alike = (trace.units.sum(-1).numpy() == result.heads).all(-1)
    difference = float(np.abs(trace.logits.numpy() - result.logits)[alike].max(initial=0.0))
    if alike.mean() < AGREEING or not difference <= TOLERANCE:
        raise DHTError(
            f"{out}: of {len(alike)} rows {int(alike.sum())} take the same layers in onnxruntime as in torch, and "
            f"their logits differ by up to {difference:.2g}; nothing was written: report this with the versions that "
            "dht doctor prints"
        )
    one = {name: part[:1] for name, part in rows.items()}
    fed = {name: part[:1] for name, part in arrays.items()}
    return {
        "rows_checked": len(alike), "rows_alike": int(alike.sum()), "max_difference": difference,
        "one_row_ms": {"onnxruntime": latency_ms(lambda: runner.run(fed)), "torch": latency_ms(lambda: torch_run(one))},
    }  # fmt: skip


def _policy_arrays(policy: LearnedPolicy) -> dict[str, Any]:
    """The policy as arrays: quality and cost of every arm are context @ weights; their difference is priced later."""
    arrays = {
        "projection": policy.projection.float(),
        "curve_price": policy.curve_price,
        "curve_fraction": policy.curve_fraction,
        "mean_tokens": policy.mean_tokens,
    }
    if isinstance(policy, TreePolicy):
        for layer in range(policy.layers):
            worth, cost = policy._greedy_weights(layer).tensor_split(2, 1)
            if not layer and not policy.leaves_at_once:
                worth, cost = worth[:, 1:], cost[:, 1:]
            arrays |= {f"quality_{layer}": worth, f"cost_{layer}": cost}
    else:
        assert isinstance(policy, IntegratedPolicy)
        arrays |= {"quality_0": _grid(policy, 0), "cost_0": _grid(policy, 1)}
    return {name: value.detach().cpu().contiguous().numpy().copy() for name, value in arrays.items()}


def _grid(policy: IntegratedPolicy, target: int) -> Tensor:
    """float64 [F, N * K], weights of every (depth, width) arm: a width's features fold into two of the context's."""
    theta = policy.numbers.mean()[..., target]  # [N, F + 3]
    share = policy._shares(theta.device)
    weights = theta[:, : policy.num_features, None].repeat(1, 1, len(share))
    linear, square, sure = theta[:, policy.num_features :, None].unbind(1)
    weights[:, 0] += linear * share + square * share.square()
    weights[:, 2] += sure * share
    closed = policy.closed(0)
    weights[..., closed] = 0.0
    weights[:, 0, closed] = 0.0 if target else CLOSED
    return weights.permute(1, 0, 2).flatten(1)
