"""The README's results, drawn from committed JSON.

`python benchmarks/readme_table.py` rewrites the block between the markers.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "benchmarks" / "results" / "compare_sst2.json"
START, END = "<!-- results:start -->", "<!-- results:end -->"
COLUMNS = (
    ("test accuracy", "accuracy", 100),
    ("FLOPs", "flops_fraction", 1),
    ("seconds", "time_fraction", 1),
    ("training FLOPs", "train_flops_fraction", 1),
    ("training seconds", "train_time_fraction", 1),
)
METHODS = {
    "dense": "dense",
    "dht": "**dht**",
    "lexical": "words alone (the exit before layer 1)",
    "random": "blind dealing, same weights",
    "confidence-same": "confidence threshold, same weights",
    "static": "static sub-network, trained alone",
    "confidence-pruned": "pruned multi-exit network, confidence threshold",
}


def block(result: dict) -> str:
    """The markdown between the markers."""
    settings, versions = result["settings"], result["rows"][0]["versions"]
    found = {(entry["method"], entry["budget"]): entry for entry in result["summary"]}
    lines = [
        f"`{settings['data']}` sentences, `{settings['model']}`, dense for {settings['epochs']:g} epochs, batch"
        f" {settings['batch_size']}, {settings['dtype']}, one thread, torch {versions['torch']}. Mean ± half width of"
        " the 95% interval over seeds (their number in brackets); costs are fractions of dense, training as a whole.",
        "",
        "| budget | | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for budget in sorted({budget for _, budget in found}, reverse=True):
        for method, label in METHODS.items():
            if entry := found.get((method, budget)):
                cells = [_cell(entry, field, scale) for _, field, scale in COLUMNS]
                if method == "lexical":  # a part of our model: what its own fit takes rounds to nothing
                    cells[-2:] = ["–", "–"]
                lines.append(f"| {budget:.2f} | {label} ({len(entry['seeds'])}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(entry: dict, field: str, scale: int) -> str:
    mean, half = entry[field], entry[f"{field}_ci"]
    if mean is None:
        return "–"
    digits = 1 if scale == 100 else 2
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * half:.{digits}f}" if half is not None else "")


def main() -> None:
    """Rewrites the block."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, tail = text.split(START)[0], text.split(END)[1]
    made = block(json.loads(SOURCE.read_text(encoding="utf-8")))
    readme.write_text(f"{head}{START}\n{made}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
