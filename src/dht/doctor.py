"""`dht doctor`: what is installed, what the machine offers, and what will make dht slow."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from ._extras import EXTRAS
from .assets import cache_folder
from .config import DTYPES
from .errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

CORE = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "typer")
NEEDED_GB = 2.0
"""Free disk below which fetching a model and training it may not fit."""

INSTRUCTIONS = {
    "avx2": "avx2",
    "avx512": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
}
"""What decides how fast a CPU is here -> its name in /proc/cpuinfo."""

DEBUG_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before",
    "TORCH_DISTRIBUTED_DEBUG": "every collective is checked",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is a system call",
    "TORCH_COMPILE_DEBUG": "compilation writes traces",
    "TORCH_LOGS": "torch writes logs",
    "TORCH_SHOW_CPP_STACKTRACES": "torch keeps stack traces",
    "NCCL_DEBUG": "collectives are logged",
    "ONEDNN_VERBOSE": "every CPU kernel is logged",
    "DNNL_VERBOSE": "every CPU kernel is logged",
    "MKL_VERBOSE": "every matrix product is logged",
    "ATEN_CPU_CAPABILITY": "torch uses older vector instructions",
    "ONEDNN_MAX_CPU_ISA": "CPU kernels use older vector instructions",
    "DNNL_MAX_CPU_ISA": "CPU kernels use older vector instructions",
    "PYTHONDEVMODE": "python runs its debug checks",
    "PYTHONTRACEMALLOC": "python traces every allocation",
}
"""Environment variable -> what it does while it is set."""


def examine(dtype: str = "float32") -> dict[str, Any]:
    """Everything `dht doctor` tells, as plain JSON values; the last entry is `warnings`, a list of sentences.

    Args:
        dtype: "float32" or "bfloat16", the precision that is to be used.

    Raises:
        ConfigError: another dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: got {dtype!r}, allowed: {', '.join(DTYPES)}")
    import torch

    found: dict[str, Any] = {
        "versions": {"dht": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in CORE}
        | {"torch": str(torch.__version__)},  # with the build, such as +cpu
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "system": platform.platform(),
        "cpu": _cpu(),
        "devices": _devices(),
        "threads": _threads(),
        "torch": _torch_build(),
        "cache": _cache(),
        "debug_variables": {name: os.environ[name] for name in DEBUG_VARIABLES if _set(os.environ, name)},
        "dtype": dtype,
    }
    found["warnings"] = warnings_of(found)
    return found


def warnings_of(found: Mapping[str, Any]) -> list[str]:
    """What will make dht slow, or stop it, given what `examine` found: one sentence each, with what to do."""
    cpu, threads, build, cache = found["cpu"], found["threads"], found["torch"], found["cache"]
    gpu = any(device["name"] != "cpu" for device in found["devices"])
    warned = []
    if threads["torch"] == 1 and cpu["usable_cores"] >= 4:
        variable = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if threads[name] == "1"), None)
        cause = f"{variable}=1" if variable else "something set it so"
        warned.append(
            f"torch uses 1 thread on {cpu['usable_cores']} cores ({cause}); unset it, or set "
            f"OMP_NUM_THREADS={cpu['usable_cores']}"
        )
    if threads["torch"] > cpu["usable_cores"]:
        warned.append(
            f"torch uses {threads['torch']} threads on {cpu['usable_cores']} usable cores, which wait for each other; "
            f"set OMP_NUM_THREADS={cpu['usable_cores']}"
        )
    if not build["mkl"] and not build["openblas"] and cpu["machine"] in ("x86_64", "AMD64"):
        warned.append("torch was built without MKL: matrix products are slow; install torch from PyPI")
    if not build["onednn"]:
        warned.append("torch was built without oneDNN: bfloat16 and int8 are slow; install torch from PyPI")
    if found["dtype"] == "bfloat16" and not gpu and not (cpu["amx_bf16"] or cpu["avx512_bf16"]):
        warned.append("bfloat16 was asked for, but this CPU has no bfloat16 instructions: it is emulated; use float32")
    bf16_gpu = all(device.get("bfloat16", True) for device in found["devices"])
    if found["dtype"] == "bfloat16" and not bf16_gpu:
        warned.append("bfloat16 was asked for, but a GPU here has no bfloat16 units: it is emulated; use float32")
    if cpu["machine"] in ("x86_64", "AMD64") and not cpu["avx2"]:
        warned.append("this CPU (or its virtual machine) shows no AVX2: torch runs several times slower than usual")
    warned += [
        f"{name}={value} is set: {DEBUG_VARIABLES[name]}; unset it" for name, value in found["debug_variables"].items()
    ]
    if not cache["writable"]:
        warned.append(f"the cache folder {cache['folder']} cannot be written; set DHT_CACHE to one that can")
    if cache["free_gb"] < NEEDED_GB:
        warned.append(
            f"{cache['free_gb']:.1f} GB are free at {cache['folder']}; a model and its checkpoints may need more; free "
            "some space or set DHT_CACHE"
        )
    return warned


def print_findings(found: Mapping[str, Any], console: Console) -> None:
    """The findings for people: a few lines each, warnings last."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(title: str, *lines: str) -> None:
        for number, line in enumerate(lines):
            table.add_row("" if number else title, escape(line))

    add("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items()))
    for extra, packages in found["extras"].items():
        told = ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
        fix = "" if all(packages.values()) else f'  (pip install "dht-transformer[{extra}]")'
        add(f"extra {extra}", told + fix)
    cpu, threads, build, cache = found["cpu"], found["threads"], found["torch"], found["cache"]
    add("system", found["system"])
    has = [name for name in INSTRUCTIONS if cpu[name]]
    cores = f"{cpu['usable_cores']} of {cpu['cores']} cores usable"
    add("cpu", f"{cpu['model']}: {cores}", f"has {', '.join(has) or 'no vector instructions that matter'}")
    add("devices", *(_device_line(device) for device in found["devices"]))
    kept = [f"{name}={value}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if (value := threads[name])]
    add("threads", f"torch {threads['torch']}, between operations {threads['interop']}", *kept)
    add("torch", ", ".join(f"{name} {'yes' if value is True else value or 'no'}" for name, value in build.items()))
    sizes = [f"{name}: {size / 1e6:.1f} MB" for name, size in cache["contents"].items()]
    add("cache", f"{cache['folder']} ({cache['free_gb']:.1f} GB free)", *(sizes or ["empty"]))
    console.print(table)
    for line in found["warnings"]:
        console.print(f"[bold]warning[/bold]: {escape(line)}", soft_wrap=True)
    if not found["warnings"]:
        console.print("nothing found that would make dht slow")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _set(environment: Mapping[str, str], name: str) -> bool:
    """True if the variable is set to something that is not "off"."""
    return environment.get(name, "").strip().lower() not in ("", "0", "off", "false", "none")


def _cpu() -> dict[str, Any]:
    """Model name, cores, and the instructions that decide how fast bfloat16 and int8 are."""
    model, flags = platform.processor() or platform.machine(), set()
    table = Path("/proc/cpuinfo")
    for line in table.read_text(encoding="utf-8", errors="replace").splitlines() if table.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    cores = os.cpu_count() or 1
    return {
        "model": model,
        "machine": platform.machine(),
        "cores": cores,
        "usable_cores": _usable_cores(cores),
        **{name: flag in flags for name, flag in INSTRUCTIONS.items()},
    }


def _usable_cores(cores: int) -> int:
    """Cores that this process may run on: its affinity, and the share that its container is given."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(usable, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return usable


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [{"name": "cpu"}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "model": facts.name,
                "gb": round(facts.total_memory / 1e9, 1),
                "bfloat16": facts.major >= 8,
            }
        )
    return devices


def _device_line(device: Mapping[str, Any]) -> str:
    if "model" not in device:
        return str(device["name"])
    native = "native bfloat16" if device["bfloat16"] else "no bfloat16"
    return f"{device['name']}: {device['model']}, {device['gb']} GB, {native}"


def _threads() -> dict[str, Any]:
    import torch

    return {
        "torch": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
    }


def _torch_build() -> dict[str, Any]:
    import torch

    return {
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "openblas": "OPENBLAS" in torch.__config__.show().upper(),
        "cuda": torch.version.cuda,
    }


def _cache() -> dict[str, Any]:
    """The cache folder, the bytes of each thing in it, and the free space of its disk."""
    folder = cache_folder()
    contents: dict[str, int] = {}
    for kind in ("models", "data"):
        for entry in sorted(folder.glob(f"{kind}/*")):
            if entry.is_dir() and not entry.name.startswith("."):
                contents[f"{kind}/{entry.name}"] = sum(f.stat().st_size for f in entry.rglob("*") if f.is_file())
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return {
        "folder": str(folder),
        "contents": contents,
        "free_gb": round(shutil.disk_usage(there).free / 1e9, 1),
        "writable": there.is_dir() and os.access(there, os.W_OK),
    }
