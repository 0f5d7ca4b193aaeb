"""What `dht.quantize` costs and saves on a trained run: accuracy, agreement, memory and seconds, in turn with float.

    python benchmarks/int8.py runs/mine --data vader --rows 1500

The last line is JSON. One thread unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import torch

import dht
from dht.data import load_data
from dht.load import by_length, load_run, tokenise
from dht.measure import run_policy
from dht.model.quantize import INPUT_AXIS, Int8Weight
from dht.policy.baselines import DensePolicy


def block_bytes(model: dht.DHTForSequenceClassification) -> int:
    """Bytes of the blocks' weights, which is what is rounded."""
    weights = [getattr(block, name) for block in model.encoder.blocks for name in INPUT_AXIS]
    parts = [part for w in weights for part in ((w.values, w.scale) if isinstance(w, Int8Weight) else (w,))]
    return sum(part.numel() * part.element_size() for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--data", default="vader")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_run(args.run, "cpu")
    rounded = dht.quantize(copy.deepcopy(model))
    rows = tokenise(tokenizer, load_data(args.data).test, 128)[: args.rows]
    batches, _ = by_length(tokenizer, rows, 32)
    result: dict[str, object] = {
        "run": args.run, "rows": len(rows), "threads": args.threads, "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(), "float_block_bytes": block_bytes(model),
        "int8_block_bytes": block_bytes(rounded),
    }  # fmt: skip
    for name, policy in (("learned", None), ("dense", DensePolicy(model.config.num_attention_heads))):
        plain, small = (run_policy(each, batches, policy) for each in (model, rounded))
        taken: dict[str, list[float]] = {"float": [], "int8": []}
        for _ in range(args.repeats):
            for kind, each in (("float", model), ("int8", rounded)):
                begun = time.perf_counter()
                run_policy(each, batches[:: max(1, len(batches) // 8)], policy)
                taken[kind].append(time.perf_counter() - begun)
        seconds = {kind: statistics.median(times) for kind, times in taken.items()}
        figures = {
            "float_accuracy": plain.accuracy, "int8_accuracy": small.accuracy,
            "agreement": float((plain.predictions == small.predictions).double().mean()),
            "float_flops_fraction": plain.flops_fraction, "int8_flops_fraction": small.flops_fraction,
            "time_fraction": seconds["int8"] / seconds["float"],
        }  # fmt: skip
        print(name, ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
        result[name] = figures
    print(json.dumps(result))


if __name__ == "__main__":
    main()
