"""The README's results, drawn from committed JSON.

`python benchmarks/readme_table.py` rewrites the block between the markers.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "benchmarks" / "results" / "sst2.json"
START, END = "<!-- results:start -->", "<!-- results:end -->"
COLUMNS = (
    ("test accuracy", "accuracy", 100),
    ("FLOPs", "flops_fraction", 1),
    ("seconds", "time_fraction", 1),
    ("training FLOPs", "train_flops_fraction", 1),
    ("training seconds", "train_time_fraction", 1),
)


def block(result: dict) -> str:
    """The markdown between the markers."""
    setting = result["setting"]
    lines = [
        f"`{setting['data']}` sentences, `{setting['model']}`, 3 epochs, batch 32, float32, {setting['threads']}"
        f" thread(s), torch {setting['torch']}. Seeds {setting['seeds'][0]} to {setting['seeds'][-1]}: mean ±"
        " half width of the 95% interval (no ± where there is one seed). FLOPs and seconds are fractions of dense.",
        "",
        "| | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for name, fields in result["results"].items():
        cells = [_cell(fields.get(field), scale) for _, field, scale in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Measured with `{result['command']}`."])


def _cell(field: dict | None, scale: int) -> str:
    if field is None:
        return "–"
    digits = 1 if scale == 100 else 2
    half = f" ± {scale * field['ci95']:.{digits}f}" if field["ci95"] is not None else ""
    return f"{scale * field['mean']:.{digits}f}{half}"


def main() -> None:
    """Rewrites the block."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, tail = text.split(START)[0], text.split(END)[1]
    made = block(json.loads(SOURCE.read_text(encoding="utf-8")))
    readme.write_text(f"{head}{START}\n{made}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
