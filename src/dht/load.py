"""From names to objects: encoder and tokenizer, tokenised batches, saved runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hub_logging

from . import assets
from ._labels import IGNORED
from .config import TrainSettings
from .data import Split
from .errors import CheckpointError, ConfigError, DHTError
from .hf.configuration import FORMAT_VERSION, DHTConfig
from .hf.convert import convert, load_source
from .hf.modeling import DHTForSequenceClassification, model_class
from .manifest import verify
from .task import Regression
from .words import encode_tagged

RUN_FILE = "run.json"
"""In a run folder: the settings that the training was told."""

PRESETS: dict[str, dict[str, Any]] = {
    "preset:tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    "preset:small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
"""From-scratch pre-norm encoders with random weights; they use the tokenizer of `minilm`."""


# Loading takes a fraction of a second; its bars would stand between an error and the line that says it.
hub_logging.disable_progress_bar()


def device_of(name: str) -> torch.device:
    """The device called `name` ("auto" = a GPU if there is one).

    Raises:
        DHTError: cuda was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DHTError("--device: got 'cuda', but torch sees no CUDA device here; use --device cpu")
    return torch.device(name)


EXIT_MEMORY = 0.5
"""Of classifiers with tree search (decision 11)."""


def _classifies(options: Mapping[str, Any]) -> bool:
    return options.get("head") not in ("embedding", "token") and options.get("problem_type") != Regression.name


def build(
    settings: TrainSettings, label_names: list[str], extra: Mapping[str, Any] | None = None
) -> tuple[DHTForSequenceClassification, PreTrainedTokenizerBase]:
    """A dynamic model ready for training, and its tokenizer.

    Args:
        extra: further fields of `DHTConfig`.

    Raises:
        DHTError: the model cannot be found, loaded or converted.
    """
    options: dict[str, Any] = {
        "search": settings.search,
        "ffn": settings.ffn,
        "budget": settings.budget,
        "policy_seed": settings.seed,
        "exit_memory": EXIT_MEMORY if settings.search == "tree" and _classifies(extra or {}) else 0.0,
        **(extra or {}),
    }
    tokenizer: PreTrainedTokenizerBase
    if settings.model in PRESETS:
        tokenizer = AutoTokenizer.from_pretrained(assets.model_path("minilm"))
        options |= {"vocab_size": len(tokenizer), "norm": "pre", "type_vocab_size": 0, "num_labels": len(label_names)}
        config = DHTConfig(**options, **PRESETS[settings.model])
        model = model_class(config.head)(config)
    elif settings.model.startswith("preset:"):
        raise DHTError(f"--model: no preset {settings.model!r}; there are: {', '.join(PRESETS)}")
    else:
        path = model_folder(settings.model)
        source = load_source(path, len(label_names), options.get("head", "classifier"))
        model = convert(source, len(label_names), **options)
        tokenizer = _tokenizer(path)
    model.config.id2label = dict(enumerate(label_names))
    model.config.label2id = {name: i for i, name in enumerate(label_names)}
    return model, tokenizer


def load_classifier(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fine-tuned sequence classifier and its tokenizer: a plain one (folder or Hub id), or a finished run's.

    Raises:
        DHTError: it cannot be found or loaded, or has no classification head.
    """
    path = model_folder(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise DHTError(f"model: cannot load {name!r}: {str(error).splitlines()[0]}") from error
    if config.model_type == DHTConfig.model_type:
        return load_run(path, "cpu")
    classes = config.architectures or []
    if not any("SequenceClassification" in found for found in classes):
        raise DHTError(
            f"model: {name!r} ({', '.join(classes) or 'of no known class'}) has no sequence classification head to"
            f" keep; fine-tune one first, or train a dynamic model from this encoder: dht train --model {name}"
        )
    return load_source(path, config.num_labels), _tokenizer(path)


def model_folder(name: str) -> str:
    """Where `from_pretrained` finds the model: the asset's folder, or the name itself (folder or Hub id)."""
    if name in assets.MODELS:
        return str(assets.model_path(name))
    if (os.sep in name or name.startswith(".")) and name.count("/") != 1 and not Path(name).exists():
        raise DHTError(f"--model: no folder {name!r}; give a folder, a Hub id or one of: {', '.join(assets.MODELS)}")
    return name


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises plain exceptions for broken files
        reason = str(error).strip() or type(error).__name__
        raise DHTError(f"model: cannot load a tokenizer from {path!r}: {reason.splitlines()[0]}") from error


def tokenise(tokenizer: PreTrainedTokenizerBase, split: Split, max_length: int) -> list[dict[str, Any]]:
    """One dict a row: what `encode` makes of it, and `labels`; of rows of words see `encode_tagged`."""
    if split.words is not None:
        return encode_tagged(tokenizer, split.words, split.labels, max_length)
    rows = encode(tokenizer, split.texts, split.pairs, max_length)
    return [row | {"labels": label} for row, label in zip(rows, split.labels, strict=True)]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> list[dict[str, Any]]:
    """One dict a row without padding: `input_ids` and, for pairs in families that tell them apart, `token_type_ids`.

    Args:
        texts: the texts, or the first ones of pairs.
        pairs: the second ones; None = single texts.
        max_length: tokens a row is cut to, of pairs the longer text first.
    """
    if not texts:
        return []
    if pairs is None:
        ids = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
        return [{"input_ids": row} for row in ids]
    made = tokenizer(list(texts), list(pairs), truncation=True, max_length=max_length, return_attention_mask=False)
    names = [name for name in ("input_ids", "token_type_ids") if name in made]
    return [dict(zip(names, row, strict=True)) for row in zip(*(made[name] for name in names), strict=True)]


def collate(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A padded batch: `input_ids`, `attention_mask` and, where the rows have them, `token_type_ids` and `labels`.

    The rows' `tags` become labels [B, T], -100 where they are padded.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), longest), tokenizer.pad_token_id or 0),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
    }
    for i, row in enumerate(rows):
        batch["input_ids"][i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        batch["attention_mask"][i, : len(row["input_ids"])] = 1
    if any("token_type_ids" in row for row in rows):
        batch["token_type_ids"] = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            types = row.get("token_type_ids", [])  # single texts among pairs are of type 0
            batch["token_type_ids"][i, : len(types)] = torch.tensor(types, dtype=torch.long)
    if "tags" in rows[0]:
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for i, row in enumerate(rows):
            batch["labels"][i, : len(row["tags"])] = torch.tensor(row["tags"])
    if "labels" in rows[0]:
        labels = [row["labels"] for row in rows]
        batch["labels"] = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return batch


def by_length(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch_size: int
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Batches of rows of like length, and which row each batch position is."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [collate(tokenizer, [rows[i] for i in chunk]) for chunk in chunks], order


def load_run(folder: str | Path, device: str = "auto") -> tuple[DHTForSequenceClassification, PreTrainedTokenizerBase]:
    """A trained model and its tokenizer.

    Raises:
        CheckpointError: nothing there, half-written, corrupt, or written by a newer dht.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the --out folder of a finished dht train")
    if not config_file.is_file():
        hint = "the run was interrupted: go on with dht train --resume" if (folder / "checkpoints").is_dir() else ""
        raise CheckpointError(
            f"{folder}: no config.json, so no finished run; {hint or 'give the --out folder of dht train'}"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{config_file}: not readable as JSON ({error}); the checkpoint is corrupt") from error
    if not isinstance(config, dict) or config.get("model_type") != "dht":
        raise CheckpointError(f"{config_file}: not a dht model; give the --out folder of dht train")
    version = config.get("format_version", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{config_file}: format {version}, this dht reads up to {FORMAT_VERSION}; install a newer dht"
        )
    verify(folder)
    try:
        model, report = model_class(config.get("head", "classifier")).from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )
        model.policy.check_sound()
    except Exception as error:  # without checksums the files may say anything, and any library may stumble over it
        raise CheckpointError(
            f"{folder}: cannot load model.safetensors: {error or type(error).__name__}; the checkpoint is corrupt"
        ) from error
    lost = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lost:
        raise CheckpointError(
            f"{folder / 'model.safetensors'}: {len(lost)} tensors missing or misshapen, e.g. {lost[0]}"
        )
    return model.to(device_of(device)).eval(), _tokenizer(str(folder))


def told_of(folder: str | Path, name: str) -> Any:
    """A setting that the run in `folder` was told.

    Raises:
        CheckpointError: its `run.json` cannot be read or does not say.
    """
    path = Path(folder) / RUN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: does not say the run's {name} ({error})") from error


def all_told_of(folder: str | Path) -> dict[str, Any]:
    """All settings that the run in `folder` was told; none if it does not say."""
    try:
        told = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def data_of(folder: str | Path) -> str:
    """The data that the run in `folder` was trained on.

    Raises:
        CheckpointError: the run does not say.
    """
    try:
        return str(told_of(folder, "data"))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: no run.json that names the data; give --data") from error


def teacher_of(folder: str | Path, trained: DHTForSequenceClassification) -> DHTForSequenceClassification:
    """What an embedding run learned from: the encoder that `dht train` started with; without a `run.json`, itself.

    Raises:
        DHTError: that encoder cannot be loaded any more.
    """
    if not (Path(folder) / RUN_FILE).is_file():
        return trained
    teacher = convert(load_source(model_folder(str(told_of(folder, "model"))), 1), 1, head="embedding")
    cast(nn.Module, teacher).to(trained.device).eval()
    return teacher


def check_budget(budget: float) -> float:
    """`budget` itself.

    Raises:
        ConfigError: outside (0, 1].
    """
    if not 0.0 < budget <= 1.0:
        raise ConfigError(f"--budget: got {budget}, allowed: a number in (0, 1]")
    return budget


Line = TypeVar("Line")


def lines_in_batches(lines: Iterable[Line], size: int) -> Iterable[list[Line]]:
    """Consecutive lists of at most `size` lines."""
    held: list[Line] = []
    for line in lines:
        held.append(line)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
