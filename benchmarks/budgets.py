"""Dense, tree and integrated runs of a data set over seeds, with rivals on the same checkpoints, as one JSON file.

    python benchmarks/budgets.py --data DIR --work runs/sst2 --json benchmarks/results/sst2.json

Every cell is one `dht` command; a finished cell is not run again, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from dht._files import write_json

# Two-sided 95% quantiles of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
CELLS = {
    "dense": ["--dense"],
    "tree .26": ["--budget", "0.26"],
    "tree .50": ["--budget", "0.5"],
    "integrated .26": ["--budget", "0.26", "--search", "integrated"],
}
KEPT = (
    "accuracy", "macro_f1", "flops_fraction", "time_fraction", "policy_time_fraction", "mean_layers", "mean_heads",
    "arm_entropy", "full_depth_accuracy", "train_flops_fraction", "train_time_fraction", "train_seconds",
    "dense_train_seconds", "seconds", "dense_seconds",
)  # fmt: skip


def run(*arguments: object) -> None:
    """One `dht` command; its own messages go to stderr."""
    subprocess.run([sys.executable, "-m", "dht.cli", *map(str, arguments)], check=True, stdout=sys.stderr)


def cell(
    data: str, model: str, folder: Path, name: str, seed: int, options: list[str], rivals: list[str]
) -> dict[str, dict]:
    """Reports of a trained run and, for the tree, of the rivals on its checkpoint."""
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    if not (out / "report.json").is_file():
        again = ["--overwrite"] if out.exists() else []
        run("train", "--data", data, "--model", model, "--out", out, "--seed", seed, *options, *again)
    reports = {name: json.loads((out / "report.json").read_text())}
    if name == "tree .26":
        for rival in rivals:
            target = out / f"{rival}.json"
            if not target.is_file():
                run("evaluate", out, "--data", data, "--policy", rival, "--json", target)
            reports[f"{rival} .26, same weights"] = json.loads(target.read_text())
    return reports


def summary(reports: list[dict]) -> dict[str, dict]:
    """Mean, half width of the 95% interval and the values of every kept field."""
    fields = {}
    for field in KEPT:
        values = [report[field] for report in reports if report.get(field) is not None]
        if values:
            half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            fields[field] = {"mean": statistics.fmean(values), "ci95": half, "values": values}
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cells", default=",".join(CELLS), help="comma-separated names of cells")
    parser.add_argument("--rivals", default="random,confidence", help="policies to run on the weights of `tree .26`")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=Path, required=True, help="the result")
    asked = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    rivals = [name for name in asked.rivals.split(",") if name]
    found: dict[str, list[dict]] = {}
    for seed in seeds:
        for name in asked.cells.split(","):
            for key, report in cell(asked.data, asked.model, asked.work, name, seed, CELLS[name], rivals).items():
                found.setdefault(key, []).append(report)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": " ".join(
            [
                "python benchmarks/budgets.py --data",
                Path(asked.data).name,
                "--model",
                asked.model,
                "--seeds",
                asked.seeds,
            ]
        ),
        "setting": {
            "data": Path(asked.data).name,
            "model": asked.model,
            "seeds": seeds,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit.stdout.strip() or None,
        },
        "results": {name: summary(reports) for name, reports in found.items()},
    }
    write_json(asked.json, result)
    for name, fields in result["results"].items():
        accuracy = fields["accuracy"]
        print(f"{name:32} accuracy {accuracy['mean']:.4f} ± {accuracy['ci95'] or 0:.4f}", file=sys.stderr)
    print(json.dumps({name: fields["accuracy"]["mean"] for name, fields in result["results"].items()}))


if __name__ == "__main__":
    main()
