"""What is timed: an encoder by name, a trained run, or BERT's sizes with random weights; with rows for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from .. import assets
from ..config import TrainSettings
from ..data import SPLITS, TextData, load_data
from ..errors import DHTError
from ..hf.convert import convert
from ..hf.modeling import DHTForSequenceClassification
from ..load import build, data_of, load_run
from ..task import Embedding
from .inputs import Rows
from .settings import MIX, BenchSettings, short_name

SIZES: dict[str, dict[str, Any]] = {
    "random:bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                         "intermediate_size": 3072},
    "random:bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                          "intermediate_size": 4096},
}  # fmt: skip
"""BERT's sizes with random weights: what a forward costs does not depend on what it says."""


@dataclass
class Subject:
    """A model to time, with rows for it; `learned` if it is a trained run, whose policy can be timed."""

    name: str
    model: DHTForSequenceClassification
    rows: Rows
    learned: bool


def load_subject(name: str, settings: BenchSettings, device: torch.device) -> Subject:
    """The model called `name`, on `device`.

    Raises:
        DHTError: nothing loadable of that name, or its positions do not reach `--tokens`.
    """
    learned = (Path(name) / "config.json").is_file() and is_run(Path(name))
    source = settings.data or (data_of(name) if learned else "vader")
    tokenizer: PreTrainedTokenizerBase
    if learned:
        model, tokenizer = load_run(name, str(device))
        labels = [model.config.label_names[i] for i in range(len(model.config.label_names))]
        data = _load(source, settings, labels, model.task.name)
        if isinstance(model.task, Embedding):
            data = _with_directions(data, model.config.hidden_size, settings.seed)
    else:
        data = _load(source, settings, None)
        torch.manual_seed(settings.seed)
        if name in SIZES:
            tokenizer = AutoTokenizer.from_pretrained(assets.model_path("minilm"))
            bert = BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES[name]))
            model = convert(bert, len(data.label_names))
        elif name.startswith("random:"):
            raise DHTError(f"--model: no size {name!r}; there are: {', '.join(SIZES)}")
        else:
            asked = TrainSettings(data=source, model=name, out=Path(), seed=settings.seed)
            model, tokenizer = build(asked, data.label_names)
        cast(nn.Module, model).to(device).eval()
    longest = model.config.max_position_embeddings - model.config.position_offset
    asked_for = max((int(t) for t in settings.tokens if t != MIX), default=0)
    if asked_for > longest:
        raise DHTError(f"--tokens: got {asked_for}, but {name} takes at most {longest}")
    return Subject(short_name(name), model, Rows(tokenizer, data, min(longest, 128), settings.seed), learned)


def _with_directions(data: TextData, width: int, seed: int) -> TextData:
    """The data with random vectors for labels: what a step costs does not depend on what it learns."""
    drawn = torch.Generator().manual_seed(seed)
    splits = {name: getattr(data, name) for name in SPLITS}
    return replace(data, **{
        name: replace(split, labels=list(torch.randn(len(split), width, generator=drawn).unbind()))
        for name, split in splits.items() if split is not None
    })  # fmt: skip


def is_run(folder: Path) -> bool:
    """True if the folder holds a trained run."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "dht")
    except (OSError, ValueError, AttributeError):
        return False


def _load(source: str, settings: BenchSettings, labels: list[str] | None, task: str = "single") -> TextData:
    return load_data(
        source, text_column=settings.text_column, label_column=settings.label_column, seed=settings.seed,
        splits=(), optional=SPLITS, label_names=labels, task=task,
    )  # fmt: skip
