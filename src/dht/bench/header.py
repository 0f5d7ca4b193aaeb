"""What a figure cannot be read without: hardware, threads, versions, commit, seed, and every setting."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from .settings import BenchSettings


def header(settings: BenchSettings, device: torch.device) -> dict[str, Any]:
    """What a figure cannot be read without: hardware, threads, versions, commit, seed, and every setting."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "dht": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "seed": settings.seed,
        "settings": settings.as_json(),
    }


def _processor() -> str:
    """The processor's name, with the instruction sets that decide what bfloat16 is worth."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name
    for line in lines:
        key, _, value = line.partition(":")
        name = value.strip() if key.strip() == "model name" else name
        flags = value if key.strip() == "flags" else flags
    known = [
        label
        for flag, label in (("avx512f", "AVX-512"), ("avx512_bf16", "BF16"), ("amx_bf16", "AMX"))
        if flag in flags.split()
    ]
    return f"{name} ({', '.join(known)})" if known else name


def commit() -> str | None:
    """The commit of this package's source, "-dirty" if it was changed since; None when it is not in git."""
    folder = str(Path(__file__).parent)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy inside some other project's repository has nothing to do with that project's commits.
    if git("ls-files", "--error-unmatch", "run.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=9", "--exclude", "*")
