"""`dht doctor`: what it finds here, and what it warns of elsewhere."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dht import doctor
from dht.cli import app
from dht.errors import ConfigError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    (tmp_path / "models" / "small-1.0").mkdir(parents=True)
    (tmp_path / "models" / "small-1.0" / "weights").write_bytes(b"x" * 2_500_000)
    (tmp_path / "models" / ".fetch-small").mkdir()
    monkeypatch.setenv("DHT_CACHE", str(tmp_path))
    for name in doctor.DEBUG_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_it_prints_for_people_and_as_json(cache):
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    for part in (
        "versions",
        f"torch {torch.__version__}",
        "extra onnx",
        "threads",
        str(cache.name),
        "small-1.0: 2.5 MB",
    ):
        assert part in shown.stdout.replace("\n", ""), part
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["extras"]["sklearn"]["scikit-learn"]
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["cache"]["contents"] == {"models/small-1.0": 2_500_000}
    assert found["cache"]["folder"] == str(cache)
    assert found["cache"]["writable"]
    assert 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["cores"]
    assert found["devices"][0] == {"name": "cpu"}
    assert isinstance(found["warnings"], list)


def test_flags_and_quota_are_read_from_the_system(monkeypatch):
    flags = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.split(":")[1].split())
    if not flags:
        pytest.skip("no flags in /proc/cpuinfo here")
    assert doctor._cpu()["avx2"] == ("avx2" in flags)
    assert doctor._cpu()["amx_bf16"] == ("amx_bf16" in flags)
    monkeypatch.setattr(Path, "read_text", lambda self, **k: "150000 100000")
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(8)))
    assert doctor._usable_cores(16) == 2
    monkeypatch.setattr(Path, "read_text", lambda self, **k: "max 100000")
    assert doctor._usable_cores(16) == 8


def healthy() -> dict:
    return {
        "cpu": {
            "machine": "x86_64", "cores": 8, "usable_cores": 8, "avx2": True, "avx512": True, "avx512_bf16": True,
            "amx_bf16": True, "amx_int8": True,
        },
        "devices": [{"name": "cpu"}],
        "threads": {"torch": 8, "interop": 8, "OMP_NUM_THREADS": None, "MKL_NUM_THREADS": None},
        "torch": {"vectors": "AVX512", "mkl": True, "onednn": True, "openblas": False, "cuda": None},
        "cache": {"folder": "/c", "contents": {}, "free_gb": 50.0, "writable": True},
        "debug_variables": {},
        "dtype": "bfloat16",
    }  # fmt: skip


CASES = {
    "one thread": (
        {"threads": {"torch": 1, "OMP_NUM_THREADS": "1"}},
        "torch uses 1 thread on 8 cores (OMP_NUM_THREADS=1); unset it, or set OMP_NUM_THREADS=8",
    ),
    "one thread without a variable": (
        {"threads": {"torch": 1}},
        "torch uses 1 thread on 8 cores (something set it so)",
    ),
    "too many threads": ({"threads": {"torch": 16}}, "torch uses 16 threads on 8 usable cores"),
    "no mkl": ({"torch": {"mkl": False}}, "built without MKL"),
    "no onednn": ({"torch": {"onednn": False}}, "built without oneDNN"),
    "no bfloat16": ({"cpu": {"amx_bf16": False, "avx512_bf16": False}}, "this CPU has no bfloat16 instructions"),
    "an old gpu": (
        {"devices": [{"name": "cpu"}, {"name": "cuda:0", "model": "old", "gb": 8.0, "bfloat16": False}]},
        "a GPU here has no bfloat16 units",
    ),
    "no avx2": ({"cpu": {"avx2": False}}, "shows no AVX2"),
    "debug": (
        {"debug_variables": {"CUDA_LAUNCH_BLOCKING": "1"}},
        "CUDA_LAUNCH_BLOCKING=1 is set: every kernel waits for the one before; unset it",
    ),
    "read-only cache": ({"cache": {"writable": False}}, "the cache folder /c cannot be written; set DHT_CACHE"),
    "full disk": ({"cache": {"free_gb": 0.3}}, "0.3 GB are free at /c"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_warning_has_its_cause(case):
    changes, text = CASES[case]
    found = healthy()
    for part, values in changes.items():
        found[part] = values if isinstance(values, list) else found[part] | values
    warned = doctor.warnings_of(found)
    assert len(warned) == 1
    assert text in warned[0]


def test_nothing_to_warn_of():
    found = healthy()
    assert doctor.warnings_of(found) == []
    found["torch"] |= {"mkl": False, "openblas": True}
    assert doctor.warnings_of(found) == [], "OpenBLAS does as well"
    other = copy.deepcopy(found) | {"dtype": "float32"}
    other["cpu"] |= {"amx_bf16": False, "avx512_bf16": False}
    assert doctor.warnings_of(other) == []


def test_debug_variables_that_are_off_do_not_count(cache, monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "OFF")
    monkeypatch.setenv("MKL_VERBOSE", "2")
    found = doctor.examine()
    assert found["debug_variables"] == {"MKL_VERBOSE": "2"}
    assert any("MKL_VERBOSE=2 is set: every matrix product is logged" in line for line in found["warnings"])


def test_a_cache_that_does_not_exist_yet(cache, monkeypatch):
    monkeypatch.setenv("DHT_CACHE", str(cache / "not" / "yet"))
    found = doctor.examine()["cache"]
    assert found["contents"] == {}
    assert found["writable"]


def test_a_wrong_dtype_is_one_line():
    with pytest.raises(ConfigError, match="--dtype: got 'int4', allowed: float32, bfloat16"):
        doctor.examine("int4")


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("onnx", "onnxruntime") else "1.0")
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "160"}).stdout.replace("\n", "")
    assert 'onnx missing, onnxscript 1.0, onnxruntime missing  (pip install "dht-transformer[onnx]")' in shown


def test_the_exit_status_is_0_with_warnings(cache):
    done = subprocess.run(
        [sys.executable, "-m", "dht.cli", "doctor"], capture_output=True, text=True,
        env={"MKL_VERBOSE": "1", "DHT_CACHE": str(cache), "PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning: MKL_VERBOSE=1 is set" in done.stdout
