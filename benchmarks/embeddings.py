"""A frozen encoder as an embedder with a budget dial: how near its vectors stay to the full model's, against rivals.

    python benchmarks/embeddings.py --data vader --seeds 0,1 --json benchmarks/results/embeddings.json

Rivals are matched on train sentences. FLOPs are the sum over all sentences as a fraction of the dense sum.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from dht import assets
from dht._files import write_json
from dht.data import load_data
from dht.embed import Embedder, fit_embedder
from dht.load import by_length
from dht.measure import run_policy
from dht.policy.baselines import DensePolicy, StaticPolicy
from dht.predict import encode_mixed
from dht.rivals import rival

RULES = ("learned", "random", "length", "patience")
BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4)
FIT_ROWS, MATCH_ROWS, TEST_ROWS = 4000, 1000, 800


def labelled(embedder: Embedder, texts: list[str], dense: DensePolicy) -> list[dict[str, Tensor]]:
    """Batches whose labels are the full model's vectors."""
    vectors = embedder.encode(texts, policy=dense)
    rows = encode_mixed(embedder.tokenizer, texts, embedder.max_length)
    return by_length(embedder.tokenizer, [r | {"labels": v} for r, v in zip(rows, vectors, strict=True)], 32)[0]


def measure(model: Any, tokenizer: Any, fit: list[str], test: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Figures of every rule at every budget, and of every fixed depth."""
    embedder = fit_embedder(model, tokenizer, fit, budget=0.6, seed=seed)
    heads, layers = embedder.model.config.num_attention_heads, embedder.model.config.num_hidden_layers
    dense = DensePolicy(heads)
    matched, held_out = labelled(embedder, fit[:MATCH_ROWS], dense), labelled(embedder, test, dense)
    policies = {
        f"{rule} {b:g}": lambda r=rule, b=b: rival(r, embedder.model, b, matched) for b in BUDGETS for rule in RULES
    }
    every = torch.arange(heads).repeat(layers, 1)
    policies |= {f"static {depth}": lambda d=depth: StaticPolicy(d, heads, every) for depth in range(1, layers)}
    found = {}
    for name, policy in policies.items():
        outcome = run_policy(embedder.model, held_out, policy())
        figures = {key: float(outcome.metrics[key]) for key in ("cosine", "ranking", "neighbour_agreement")}
        found[name] = {"flops_fraction": outcome.flops_fraction} | figures
        print(
            f"seed {seed}  {name:14}", "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()), flush=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="vader")
    parser.add_argument("--model", default="minilm", help="a model of ours or a folder")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = args.model if Path(args.model).is_dir() else assets.model_path(args.model)
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    data = load_data(args.data, splits=("train", "test"), optional=("validation",))
    draw = random.Random(0)
    fit, test = (
        [split.texts[i] for i in draw.sample(range(len(split.texts)), min(count, len(split.texts)))]
        for split, count in ((data.train, FIT_ROWS), (data.test, TEST_ROWS))
    )
    seeds = [int(seed) for seed in args.seeds.split(",")]
    runs = {seed: measure(model, tokenizer, fit, test, seed) for seed in seeds}
    means = {
        name: {key: statistics.mean(run[name][key] for run in runs.values()) for key in runs[seeds[0]][name]}
        for name in runs[seeds[0]]
    }
    result = {
        "data": data.name, "model": args.model, "seeds": seeds, "fit_rows": len(fit), "test_rows": len(test),
        "torch": torch.__version__, "mean": means, "runs": {str(seed): run for seed, run in runs.items()},
    }  # fmt: skip
    if args.json:
        write_json(args.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
