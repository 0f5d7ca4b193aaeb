"""`dht demo`: the main job on assets that need no hub: dense and dynamic, trained and compared, with a page."""

from __future__ import annotations

import json
import platform
import random
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from ._files import write_json, write_text
from .config import TrainSettings
from .data import load_data
from .load import by_length, load_run, tokenise
from .measure import Outcome, run_policy
from .predict import predict
from .report.page import render_page
from .rivals import rival
from .train import Say, claim_folder, train

BUDGETS = (0.1, 0.15, 0.26, 0.4, 0.6)
PAGE_SAMPLES = 300


def demo(settings: TrainSettings, *, overwrite: bool = False, say: Say = lambda _: None) -> list[dict[str, Any]]:
    """The reports of a dense and a dynamic model, both trained here; their runs and `page.html` are in `settings.out`.

    Args:
        settings: of the dynamic run; the dense one differs only in `dense` and its folder.
        overwrite: replace an earlier demo there.
        say: called with a line of news.
    """
    settings.check()
    for name in ("dense", "dht"):
        claim_folder(settings.out / name, overwrite)
    say("training the dense model (the reference)")
    dense = train(replace(settings, out=settings.out / "dense", dense=True, train_budget=None), overwrite=True, say=say)
    say(f"training the dynamic model at budget {settings.budget:g}")
    report = train(replace(settings, out=settings.out / "dht"), overwrite=True, say=say)
    # The dense model was really trained here, in this process: its seconds replace the estimate.
    for name in ("dense_train_seconds", "train_time_fraction"):
        report[f"step_{name}"] = report[name]
    report["dense_train_seconds"] = dense["train_seconds"]
    report["train_time_fraction"] = report["train_seconds"] / dense["train_seconds"]
    report["dense_accuracy"] = dense["accuracy"]
    write_json(settings.out / "dht" / "report.json", report)
    write_json(settings.out / "report.json", report)
    say("drawing the page")
    write_page(settings, report, dense)
    return [dense | {"name": "dense"}, report | {"name": "dht"}]


def write_page(settings: TrainSettings, report: dict[str, Any], dense: dict[str, Any]) -> Path:
    """Writes `page.html`: pictures, the accuracy-against-compute points and a browsable sample of texts."""
    model, tokenizer = load_run(settings.out / "dht", settings.device)
    data = load_data(
        settings.data, text_column=settings.text_column, label_column=settings.label_column, seed=settings.seed,
        splits=("train", "validation"), optional=("test",),
    )  # fmt: skip
    split = data.test or data.validation
    assert split is not None
    assert data.validation is not None
    batches, _ = by_length(tokenizer, tokenise(tokenizer, split, settings.max_length), settings.batch_size)
    held, _ = by_length(tokenizer, tokenise(tokenizer, data.validation, settings.max_length), settings.batch_size)

    points = [{"name": "dense", "kind": "dense", "flops_fraction": 1.0, "accuracy": dense["accuracy"]}]
    for budget in BUDGETS:
        outcome = run_policy(model, batches, rival("learned", model, budget, held))
        points.append(_point(f"dht {budget:g}", "learned", outcome))
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    halves = (max(1, layers // 2), max(1, heads // 2))
    for name in (f"static:{halves[0]}x{heads}", f"static:{halves[0]}x{halves[1]}", f"static:{layers}x{halves[1]}"):
        outcome = run_policy(model, batches, rival(name, model, settings.budget, held))
        points.append(_point(f"cut to {name.split(':')[1]}", "static", outcome))
    for name in ("random", "confidence"):
        outcome = run_policy(model, batches, rival(name, model, settings.budget, held))
        points.append(_point(name, name, outcome))
    model.policy.set_budget(settings.budget)

    chosen = sorted(random.Random(settings.seed).sample(range(len(split)), min(PAGE_SAMPLES, len(split))))
    texts = split.rows(chosen).inputs
    samples = []
    for i, text, row in zip(chosen, texts, predict(model, tokenizer, texts, details=True), strict=True):
        samples.append(
            {
                "text": text if isinstance(text, str) else " | ".join(text),
                "label": data.label_names[split.labels[i]],
                "prediction": row["label"],
                "score": row["score"],
                "layers": row["layers"],
                "heads": row["units"],
                "flops_fraction": row["flops_fraction"],
                "exits": row["exits"],
            }
        )
    history = json.loads((settings.out / "dht" / "history.json").read_text(encoding="utf-8"))
    name = Path(data.name).name  # of a folder the last part: a page that is passed on need not say where it lay
    meta = {
        "title": f"dht on {name}",
        "model": settings.model,
        "data": f"{name}, {len(split)} texts of the {report['split']} split",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {settings.dtype}",
        "command": "dht demo",
        "created": date.today().isoformat(),
    }
    write_json(settings.out / "points.json", points)
    path = settings.out / "page.html"
    write_text(path, render_page(report, samples, points, history, meta))
    return path


def _point(name: str, kind: str, outcome: Outcome) -> dict[str, Any]:
    return {"name": name, "kind": kind, "flops_fraction": outcome.flops_fraction, "accuracy": outcome.accuracy}
