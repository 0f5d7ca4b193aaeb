"""Checkpoints of a training: safetensors and JSON only, sealed with checksums once whole, and checked before use."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import CheckpointError
from .manifest import COMPLETE, verify, write_manifest


class Seal(TrainerCallback):
    """Seals a checkpoint once every rank has written its part, so that a half-written one is never resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if args.should_save and folder.is_dir():
            write_manifest(folder, ("*",), COMPLETE)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose every byte is as it was written, oldest first."""
    found = []
    for path in _by_step(folder):
        with contextlib.suppress(CheckpointError):
            if verify(path, COMPLETE):
                found.append(path)
    return found


def newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """The last checkpoint that is whole, and what is wrong with the sealed ones after it.

    Raises:
        CheckpointError: there is none; a damaged file is named.
    """
    problems: list[str] = []
    for path in reversed(_by_step(folder)):
        try:
            if verify(path, COMPLETE):
                return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    damage = f" ({problems[0]})" if problems else ""
    raise CheckpointError(f"--resume: no complete checkpoint in {folder}{damage}; leave --resume out to start anew")


def remove_incomplete(folder: Path) -> None:
    """Removes checkpoints that nobody can resume from: half-written or damaged ones."""
    for path in set(_by_step(folder)) - set(complete_checkpoints(folder)):
        shutil.rmtree(path, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def save_state(path: str | Path, state: Any) -> None:
    """Writes nested dicts, lists and tuples of tensors, arrays, numbers and strings as one safetensors file.

    The nesting goes into the file's header as JSON, with a tensor's name where it stood.

    Raises:
        CheckpointError: the state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    outline = json.dumps(_outline(state, tensors))
    save_file(tensors, path, metadata={"format": "pt", "outline": outline})


def load_state(path: str | Path, device: str = "cpu") -> Any:
    """What `save_state` wrote, to the last bit; nothing is unpickled."""
    with safe_open(path, "pt", device=device) as file:
        return _restored(json.loads(file.metadata()["outline"]), file)


def _outline(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value in JSON's types; what JSON cannot tell apart is marked, tensors are put into `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_outline(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_outline(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_outline(key, tensors), _outline(item, tensors)] for key, item in value.items()]}
    if isinstance(value, np.ndarray):
        return {"array": [str(value.dtype), value.tolist()]}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    raise CheckpointError(f"cannot put a {type(value).__name__} into a checkpoint; allowed: tensors, numbers, strings")


def _restored(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return file.get_tensor(held)
    if kind == "array":
        return np.array(held[1], dtype=held[0])
    if kind == "tuple":
        return tuple(_restored(item, file) for item in held)
    return {_restored(key, file): _restored(item, file) for key, item in held}
