"""The tables of docs/results.md, drawn from the committed comparisons (`benchmarks/results/compare_*.json`).

    python benchmarks/compare_results.py                 # rewrites the blocks between the markers
    python benchmarks/compare_results.py runs/compare    # takes a finished comparison in first, page included

A comparison is taken in under the name of its data set; with `--name` under another.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dht._files import write_json, write_text
from dht.report.comparison import COLUMNS, _by_budget, _label, with_interval

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
SHOWN = [(title, field) for title, field in COLUMNS if title not in ("macro F1", "p95 FLOPs")]


def take_in(folder: Path, name: str | None) -> None:
    """Copies `compare.json` and the page of a comparison to where they are committed."""
    result = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    name = name or result["settings"]["data"]
    write_json(RESULTS / f"compare_{name}.json", result)
    page = ROOT / "docs" / "results" / f"{name}.html"
    page.parent.mkdir(exist_ok=True)
    shutil.copyfile(folder / "page.html", page)


def block(result: Mapping[str, Any]) -> str:
    """The markdown of one comparison: a table a budget, then the verdicts."""
    settings = result["settings"]
    limit = "" if not settings.get("limit") else ", at most " + "/".join(map(str, settings["limit"])) + " rows"
    commits = sorted({str(row["versions"]["commit"]) for row in result["rows"]})
    lines = [
        f"`{settings['data']}`{limit}, `{settings['model']}`, {settings['epochs']:g} epochs, batch"
        f" {settings['batch_size']}, {settings['dtype']}, lr {settings['lr']:g}; torch"
        f" {result['rows'][0]['versions']['torch']}, commits {', '.join(commits)}. Mean ± half width of the 95%"
        " interval over seeds, in percent; costs are percentages of dense.",
    ]
    for budget, entries in _by_budget(result["summary"]):
        lines += ["", f"**Budget {budget:g}**", ""]
        lines += [
            "| method | seeds | " + " | ".join(title for title, _ in SHOWN) + " |",
            "|---" * (len(SHOWN) + 2) + "|",
        ]
        for entry in sorted(entries, key=lambda entry: -(entry["accuracy"] or 0)):
            cells = [with_interval(entry, field) for _, field in SHOWN]
            label = _label(entry, result["methods"])
            label = f"**{label}**" if entry["method"] == "dht" else label
            lines.append(f"| {label} | {len(entry['seeds'])} | " + " | ".join(cells) + " |")
    lines += ["", "| claim | budget | verdict |", "|---|---|---|"]
    lines += [f"| {v['claim']} | {v['budget']:g} | {v['sentence']} |" for v in result["verdicts"]]
    return "\n".join(lines)


def main() -> None:
    """Takes in what is given, then rewrites every block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a finished comparison to take in")
    parser.add_argument("--name", help="what to call it; default: its data set")
    asked = parser.parse_args()
    if asked.folder:
        take_in(asked.folder, asked.name)
    text = PAGE.read_text(encoding="utf-8")
    for file in sorted(RESULTS.glob("compare_*.json")):
        name = file.stem.removeprefix("compare_")
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if start not in text:
            raise SystemExit(f"{PAGE}: no place for {name}; put {start} and {end} where it belongs")
        made = block(json.loads(file.read_text(encoding="utf-8")))
        text = re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{made}\n{end}", text, flags=re.S)  # noqa: B023
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
