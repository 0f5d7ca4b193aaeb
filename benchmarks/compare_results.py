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
            if entry["method"] == "lexical":  # a part of our model: what its own fit takes rounds to nothing
                cells[-2:] = ["–", "–"]
            label = _label(entry, result["methods"])
            label = f"**{label}**" if entry["method"] == "dht" else label
            lines.append(f"| {label} | {len(entry['seeds'])} | " + " | ".join(cells) + " |")
    lines += ["", "| claim | budget | verdict |", "|---|---|---|"]
    lines += [f"| {v['claim']} | {v['budget']:g} | {v['sentence']} |" for v in result["verdicts"]]
    return "\n".join(lines)


OVERVIEW = {
    "dense": "dense",
    "dht": "**dht**",
    "lexical": "words alone",
    "fixed": "best fixed arm",
    "random": "blind dealing",
    "static": "static sub-network",
    "dense-decay": "dense, our training FLOPs",
}
"""Columns of the overview."""


def overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The markdown of all comparisons at a glance: accuracy (seeds), and the verdict on deciding per sample."""
    lines = [
        f"| data, model | budget | {' | '.join(OVERVIEW.values())} | per sample |",
        "|---" * (len(OVERVIEW) + 3) + "|",
    ]
    for result in results.values():
        entries = {(entry["method"], entry["budget"]): entry for entry in result["summary"]}
        words = {v["budget"]: v for v in result["verdicts"] if v["claim"] == "per-sample"}
        for budget in sorted(words, reverse=True):
            cells = [_accuracy(entries.get((method, 1.0 if method == "dense" else budget))) for method in OVERVIEW]
            verdict = words[budget]
            said = verdict["word"] if verdict["word"] == verdict["tendency"] else f"tends: {verdict['tendency']}"
            settings = result["settings"]
            lines.append(f"| {settings['data']}, {settings['model']} | {budget:g} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def _accuracy(entry: Mapping[str, Any] | None) -> str:
    return f"{100 * entry['accuracy']:.1f} ({len(entry['seeds'])})" if entry else "–"


def main() -> None:
    """Takes in what is given, then rewrites every block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a finished comparison to take in")
    parser.add_argument("--name", help="what to call it; default: its data set")
    asked = parser.parse_args()
    if asked.folder:
        take_in(asked.folder, asked.name)
    text = PAGE.read_text(encoding="utf-8")
    files = sorted(RESULTS.glob("compare_*.json"))
    results = {file.stem.removeprefix("compare_"): json.loads(file.read_text(encoding="utf-8")) for file in files}
    made = {"overview": overview(results)} | {name: block(result) for name, result in results.items()}
    for name, lines in made.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if start not in text:
            raise SystemExit(f"{PAGE}: no place for {name}; put {start} and {end} where it belongs")
        text = re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{lines}\n{end}", text, flags=re.S)  # noqa: B023
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
