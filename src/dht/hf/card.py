"""The model card of a run: what the model is, what was measured, how to load it and move its budget."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from .._files import write_text
from .modeling import DHTForSequenceClassification

CARD = "README.md"

FIGURES = (
    ("accuracy", "accuracy", ".4f"),
    ("macro_f1", "macro F1", ".4f"),
    ("entity_f1", "F1 of entities", ".4f"),
    ("full_depth_accuracy", "accuracy of the same weights, everything run", ".4f"),
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

TEMPLATE = """\
---
{{ data }}
---

# {{ name }}

A {{ what }} that decides for every input how many of its {{ config.num_hidden_layers }} layers and which of its
{{ config.num_attention_heads }} head units a layer run. Contextual bandits decide ({{ config.search }} search); what an
input does not need is not executed. Labels: {{ labels }}.

{% if base %}Started from `{{ base }}`. {% endif -%}
{% if fitted %}Exits and policy fitted to the untouched weights{% else %}Trained{% endif -%}
{% if source %} on `{{ source }}`{% endif %} for a budget of {{ "%g" % config.budget }} of the dense model's FLOPs.

## Measured

{% if count %}{{ count }} examples{% if source %} of `{{ source }}`{% endif %} ({{ split }})
{%- else %}Nothing was measured on held-out examples{% endif %}{% if machine %}; {{ machine }}{% endif %}.

| figure | value |
|---|---|
{% for what, value in figures -%}
| {{ what }} | {{ value }} |
{% endfor %}
The dense model is the same architecture without exits, on the same tokens and batches, in the same process; seconds
depend on the machine. One seed: no claim about other data, languages or seeds.

## Use

```sh
pip install dht-transformer
```

```python
import dht.hf  # registers the architecture
from transformers import pipeline

{{ use }} = pipeline("{{ task }}", model="{{ where }}")
{{ use }}("one text or a list of them")
```

No code comes with the weights and none is run from this repository: the architecture is that of the installed package.

## The budget dial

One set of weights serves every budget; the price of compute that meets it was measured on held-out rows{{ dial }}.

```python
{{ use }}.model.policy.set_budget({{ "%g" % cheaper }})  # fraction of the dense model's FLOPs, on average
```

`model(**inputs).trace` says what ran for every input: layers, head units, FLOPs.

## Intended use and limits

{{ doing }} texts like those it was trained on, where the cost of an answer matters. It has the errors and biases of its
data and of the weights it started from: check it on your own texts, at the budget you will run, before you rely on it.
Inputs that the policy finds easy get less computation: look at the errors among them too. The measured fraction is a
mean over such data, no bound for a single input, and texts of another kind may cost more or less.
"""


def card(model: DHTForSequenceClassification, report: Mapping[str, Any], name: str) -> str:
    """The text of the card: YAML for the Hub, then the page. Of a file or folder of this machine only the name is told.

    Args:
        report: what `dht train` measured (`report.json`); fields that are missing are left out.
        name: of the model, as its title.
    """
    config, policy = model.config, model.policy
    source, base = _told(str(report.get("data", ""))), _told(str(report.get("model", "")))
    split, known = str(report.get("split", "test")), source or "unknown"
    task = "token-classification" if model.tags else "text-classification"
    results = [
        EvalResult(
            task_type=task, dataset_type=known, dataset_name=known, dataset_split=split,
            metric_type=metric, metric_value=float(report[field]),
        )
        for field, metric in (("accuracy", "accuracy"), ("macro_f1", "f1"))
        if _is_number(report.get(field))
    ]  # fmt: skip
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["dht", "early-exit", "adaptive-computation", "contextual-bandit"],
        base_model=base if _on_hub(base) else None,
        datasets=[source] if _on_hub(source) else None,
        metrics=["accuracy", "f1"] if results else None,
        model_name=name,
        eval_results=results or None,
    )
    fractions = policy.curve_fraction.tolist()
    measured = min(fractions) < max(fractions)
    machine = [f"batch size {report['batch_size']}"] if "batch_size" in report else []
    machine += [str(report["dtype"])] if "dtype" in report else []
    machine += [f"{report['threads']} thread(s)"] if "threads" in report else []
    machine += [f"torch {report['torch']}"] if "torch" in report else []
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(TEMPLATE).render(
        data=data.to_yaml().strip(),
        task=task,
        what="tagger of words" if model.tags else "text classifier",
        use="tag" if model.tags else "classify",
        doing="Tagging the words of" if model.tags else "Classifying",
        name=name,
        where=f"OWNER/{name}",
        config=config,
        labels=", ".join(f"`{label}`" for label in config.label_names.values()),
        base=base,
        fitted="fit_rows" in report,
        source=source,
        split=split,
        count=report.get("num_examples"),
        machine=", ".join(machine),
        figures=[(what, format(report[field], kind)) for field, what, kind in FIGURES if _is_number(report.get(field))],
        dial=f": fractions from {min(fractions):.2f} to {max(fractions):.2f}" if measured else "",
        cheaper=round(max(config.budget / 2, min(fractions)), 2),
    )  # fmt: skip


def write_card(folder: Path, model: DHTForSequenceClassification, report: Mapping[str, Any]) -> None:
    """Writes the card into a run's folder, which names the model."""
    write_text(folder / CARD, card(model, report, folder.resolve().name or "model"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _told(name: str) -> str:
    """The name of data or a model, without the folders that lead to it on this machine."""
    return name if not name or _on_hub(name) else Path(name).name


def _on_hub(name: str) -> bool:
    """Whether the Hub could know the name: `owner/name`, and no file of this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists()
