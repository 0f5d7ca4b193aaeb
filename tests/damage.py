"""Flipped bytes and truncations of saved files, and what came of each."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import torch

from dht.checkpoints import complete_checkpoints, newest_whole
from dht.errors import CheckpointError
from dht.load import load_run


def damage(path: Path, draw: random.Random) -> bytes:
    """Changes a byte or cuts the file short, and returns what it held."""
    held = path.read_bytes()
    if draw.random() < 0.5:
        where = draw.randrange(len(held))
        path.write_bytes(held[:where] + bytes([held[where] ^ draw.randrange(1, 256)]) + held[where + 1 :])
    else:
        path.write_bytes(held[: draw.randrange(len(held))])
    return held


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    """Whether the state is the same to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def damage_run(folder: Path, count: int, seed: int) -> Counter[tuple[str, str]]:
    """(File, outcome) of `count` damages, one at a time: "refused", "same", or "lost: ..." for anything else."""
    draw, seen = random.Random(seed), Counter[tuple[str, str]]()
    whole, tokenizer = load_run(folder)
    ids = tokenizer("a fine film").input_ids
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for i in range(count):
        path = files[i % len(files)]
        held = damage(path, draw)
        try:
            model, words = load_run(folder)
            outcome = "same" if same(whole, model) and words("a fine film").input_ids == ids else "lost: other model"
        except CheckpointError as error:
            outcome = "refused" if path.name in str(error) else f"lost: no file named: {error}"
        except Exception as error:
            outcome = f"lost: {error!r}"
        finally:
            path.write_bytes(held)
        seen[path.name, outcome] += 1
    return seen


def damage_checkpoint(folder: Path, count: int, seed: int) -> Counter[tuple[str, str]]:
    """The same for the last checkpoint in `folder`, which holds two: the one before is to be resumed from."""
    draw, seen = random.Random(seed), Counter[tuple[str, str]]()
    older, newer = complete_checkpoints(folder)
    files = sorted(newer.iterdir())
    for i in range(count):
        path = files[i % len(files)]
        held = damage(path, draw)
        try:
            start, problems = newest_whole(folder)
            named = start == older and path.name in problems[0]
            outcome = "refused" if named else f"lost: resumed from {start.name}"
        except Exception as error:
            outcome = f"lost: {error!r}"
        finally:
            path.write_bytes(held)
        seen[path.name, outcome] += 1
    return seen
