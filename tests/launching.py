"""Programs that run in processes of their own, alone or several together, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    # --cpu starts one process only; --multi_gpu starts several, which use gloo where there is no GPU.
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1",
    ],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
}  # fmt: skip


def launch(launcher: str, *program: str | Path) -> str:
    """Runs a program in two processes and returns what they printed; both must end well."""
    return alone("-m", *LAUNCHERS[launcher], *program)


def alone(*arguments: str | Path) -> str:
    """What a fresh interpreter printed; it must end well."""
    here = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | here, capture_output=True, text=True, timeout=150
    )
    assert not done.returncode, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stderr + done.stdout
