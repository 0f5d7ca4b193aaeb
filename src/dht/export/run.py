"""`dht export`: a run folder in, files for another runtime out, checked against the model before they are in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError, DHTError
from ..load import load_run

FORMATS = ("transformers", "onnx", "onnx-chain")


def export(
    folder: Path, format: str, out: Path, *, plan: str | None = None, max_length: int = 128, overwrite: bool = False
) -> dict[str, Any]:
    """Writes the run in `folder` as `format` to `out`, and returns what was written and measured.

    Args:
        format: "transformers" (the dense model in its own family, a folder), "onnx" (a fixed plan in one file), or
            "onnx-chain" (the learned policy with one graph a layer and width, a folder, for `dht.onnx.ChainRunner`).
        plan: of format "onnx": "LxK", or a budget for the best shape below it; None = the budget trained for.
        max_length: of format "onnx-chain": tokens a text is cut to.
        overwrite: replace what is at `out`.

    Raises:
        DHTError: a bad option, a run that cannot be read, a model that has no such form, or a place in the way.
    """
    problems = []
    if format not in FORMATS:
        problems.append(f"--format: got {format!r}, allowed: {', '.join(FORMATS)}")
    elif plan is not None and format != "onnx":
        problems.append(f"--plan: only --format onnx takes a fixed plan, got --format {format}; leave --plan out")
    if max_length < 3:
        problems.append(f"--max-length: got {max_length}, allowed: 3 or more")
    if problems:
        raise ConfigError(problems)
    if out.exists() and not overwrite:
        raise DHTError(f"--out: {out} is already there; give another place, or --overwrite")
    if out.is_dir() and format == "onnx":
        raise DHTError(f"--out: {out} is a folder; --format onnx writes one file, e.g. {out / 'model.onnx'}")
    if out.is_file() and format != "onnx":
        raise DHTError(f"--out: {out} is a file; --format {format} writes a folder")
    if out.is_dir() and out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise DHTError(f"--out: {out} holds the run itself; give another place")
    model, tokenizer = load_run(folder, "cpu")
    types = "token_type_ids" in tokenizer.model_input_names and model.config.type_vocab_size > 1
    report: dict[str, Any] = {"format": format, "out": str(out)}
    if format == "transformers":
        from .dense import export_dense

        report |= export_dense(model, tokenizer, types, out)
    elif format == "onnx":
        from .static import export_plan, plan_of

        report |= export_plan(model, plan_of(model, plan or f"{model.config.budget:g}"), types, out)
    else:
        from .chain import export_chain

        report |= export_chain(model, tokenizer, types, max_length, out)
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    return report | {"megabytes": round(sum(path.stat().st_size for path in files) / 1e6, 3)}


def told(report: dict[str, Any]) -> str:
    """The report in one line: what was written, how near it is to torch, how fast."""
    parts = [f"{report['out']}: {report['format']}, {report['megabytes']:g} MB"]
    if "units" in report:
        parts.append(f"{report['layers']} layers with {report['units']} head units")
    if "graphs" in report:
        parts.append(f"{report['graphs']} graphs, {report['rows_alike']} of {report['rows_checked']} rows as in torch")
    if report.get("head") is False:
        parts.append(
            "the encoder alone: the last exit reads all tokens, the family's own head does not, so its classifier has "
            "to be trained"
        )
    if "max_difference" in report:
        parts.append(f"outputs within {report['max_difference']:.1g} of torch")
    for rows, name in (("1 row", "one_row_ms"), ("32 rows", "32_rows_ms")):
        if name in report:
            ours, torch = report[name]["onnxruntime"], report[name]["torch"]
            parts.append(f"{rows}: {ours:.2f} ms in onnxruntime, {torch:.2f} ms in torch")
    return "; ".join(parts)
