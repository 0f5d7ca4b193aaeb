"""The model card of a run: what the model is, what was measured, how to load it and move its budget."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from .._files import write_text
from ..task import Embedding, MultiLabel, Regression, SingleLabel, TokenTags
from .modeling import DHTForSequenceClassification

CARD = "README.md"


class Kind(NamedTuple):
    """What the card of a task says beside its figures.

    Attributes:
        what: the model is.
        tag: the Hub's `pipeline_tag`.
        results: fields of the report -> the Hub's names of these metrics.
        labels, all_labels, embeds: whether there are names of labels, several labels a text, vectors instead.
    """

    what: str
    tag: str
    results: dict[str, str]
    labels: bool = False
    all_labels: bool = False
    embeds: bool = False


KINDS = {
    SingleLabel.name: Kind(
        "A text classifier", "text-classification", {"accuracy": "accuracy", "macro_f1": "f1"}, True,
    ),
    MultiLabel.name: Kind(
        "A text classifier with any number of labels a text", "text-classification",
        {"accuracy": "accuracy", "micro_f1": "f1"}, True, True,
    ),
    Regression.name: Kind(
        "A model that gives a number to a text", "text-classification",
        {"r2": "r_squared", "mae": "mae", "pearson": "pearsonr", "spearman": "spearmanr"},
    ),
    TokenTags.name: Kind(
        "A tagger of words", "token-classification", {"accuracy": "accuracy", "entity_f1": "f1"}, True,
    ),
    Embedding.name: Kind("A text embedder", "feature-extraction", {}, embeds=True),
}  # fmt: skip

FIGURES = (
    ("accuracy", "accuracy", ".4f"),
    ("micro_f1", "micro F1", ".4f"),
    ("macro_f1", "macro F1", ".4f"),
    ("r2", "R2", ".4f"),
    ("mae", "mean absolute error", ".4g"),
    ("pearson", "Pearson's correlation", ".4f"),
    ("spearman", "Spearman's correlation", ".4f"),
    ("cosine", "cosine to the full model's vector", ".4f"),
    ("ranking", "rank correlation of the texts' likeness with the full model's", ".4f"),
    ("entity_f1", "F1 of entities", ".4f"),
    ("full_depth_accuracy", "accuracy of the same weights, everything run", ".4f"),
    ("lexical_accuracy", "accuracy of words alone, no layer run", ".4f"),
    ("full_depth_micro_f1", "micro F1 of the same weights, everything run", ".4f"),
    ("full_depth_r2", "R2 of the same weights, everything run", ".4f"),
    ("full_depth_cosine", "cosine of the same weights, everything run", ".4f"),
    ("agreement", "same answers as with everything run", ".4f"),
    ("flops_fraction", "FLOPs, fraction of the dense model", ".3f"),
    ("time_fraction", "seconds, fraction of the dense model", ".3f"),
    ("policy_time_fraction", "share of those seconds spent deciding", ".3f"),
    ("mean_layers", "mean layers run", ".2f"),
    ("mean_heads", "mean head units run in a layer", ".2f"),
    ("train_flops_fraction", "training FLOPs, fraction of dense training", ".3f"),
    ("train_time_fraction", "training seconds, fraction of dense training", ".3f"),
)
"""Fields of `report.json` that a card shows, what they are, and how they are printed."""


def card(model: DHTForSequenceClassification, report: Mapping[str, Any], name: str) -> str:
    """The text of the card: YAML for the Hub, then the page. Of a file or folder of this machine only the name is told.

    Args:
        report: what `dht train` measured (`report.json`); fields that are missing are left out.
        name: of the model, as its title.
    """
    config, kind = model.config, KINDS[model.task.name]
    source, base = _told(str(report.get("data", ""))), _told(str(report.get("model", "")))
    split = str(report.get("split", "test"))
    fractions = model.policy.curve_fraction.tolist()
    measured = min(fractions) < max(fractions)
    names = config.label_names.values() if kind.labels else ()
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("dht.hf").joinpath("card.md.j2").read_text(encoding="utf-8"))
    return template.render(
        data=_metadata(kind, report, name, source, base, split).to_yaml().strip(),
        name=name,
        where=f"OWNER/{name}",
        kind=kind,
        config=config,
        labels=", ".join(f"`{label}`" for label in names),
        base=base,
        fitted="fit_rows" in report,
        source=source,
        split=split,
        count=report.get("num_examples"),
        machine=_machine(report),
        figures=[(what, format(report[field], form)) for field, what, form in FIGURES if _is_number(report.get(field))],
        dial=f": fractions from {min(fractions):.2f} to {max(fractions):.2f}" if measured else "",
        cheaper=round(max(config.budget / 2, min(fractions)), 2),
    )


def write_card(folder: Path, model: DHTForSequenceClassification, report: Mapping[str, Any]) -> None:
    """Writes the card into a run's folder, which names the model."""
    write_text(folder / CARD, card(model, report, folder.resolve().name or "model"))


def _metadata(kind: Kind, report: Mapping[str, Any], name: str, source: str, base: str, split: str) -> ModelCardData:
    known = source or "unknown"
    measured = {field: metric for field, metric in kind.results.items() if _is_number(report.get(field))}
    results = [
        EvalResult(
            task_type=kind.tag, dataset_type=known, dataset_name=known, dataset_split=split, metric_type=metric,
            metric_value=float(report[field]),
        )
        for field, metric in measured.items()
    ]  # fmt: skip
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=kind.tag,
        tags=["dht", "early-exit", "adaptive-computation", "contextual-bandit"],
        base_model=base if _on_hub(base) else None,
        datasets=[source] if _on_hub(source) else None,
        metrics=list(measured.values()) or None,
        model_name=name,
        eval_results=results or None,
    )


def _machine(report: Mapping[str, Any]) -> str:
    said = [f"batch size {report['batch_size']}"] if "batch_size" in report else []
    said += [str(report["dtype"])] if "dtype" in report else []
    said += [f"{report['threads']} thread(s)"] if "threads" in report else []
    said += [f"torch {report['torch']}"] if "torch" in report else []
    return ", ".join(said)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _told(name: str) -> str:
    """The name of data or a model, without the folders that lead to it on this machine."""
    return name if not name or _on_hub(name) else Path(name).name


def _on_hub(name: str) -> bool:
    """Whether the Hub could know the name: `owner/name`, and no file of this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists()
