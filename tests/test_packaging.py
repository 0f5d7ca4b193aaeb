"""The wheel: what is in it, and that it runs where nothing but the core dependencies is installed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dht._extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDS_EXTRA = {
    "dht.sklearn": "sklearn", "dht.onnx": "onnx", "dht.export.chain": "onnx", "dht.sentence": "sentence",
}  # fmt: skip
"""Modules that are no use without an extra; all others import with the core dependencies alone."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def core_only(wheel, tmp_path_factory):
    """A folder with the wheel and links to the core dependencies, and theirs: all that an empty environment gets."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    seen: set[str] = set()
    waiting = [Requirement(line) for line in PROJECT["dependencies"]]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), f"{name} {found.version}"
        for file in found.files or ():
            top = file.parts[0]
            place = Path(str(found.locate_file(top)))
            if top not in ("..", "__pycache__") and place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed)
    return folder


def run(core_only, *arguments, **environment):
    """Python without any site-packages but `core_only`."""
    kept = {name: os.environ[name] for name in ("HOME", "DHT_CACHE", "OMP_NUM_THREADS") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-S", *arguments], capture_output=True, text=True, cwd=core_only,
        env=kept | {"PYTHONPATH": str(core_only), "PATH": "", "COLUMNS": "160"} | environment,
    )  # fmt: skip


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "dht").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {"dht/py.typed", "dht/report/base.css", "dht/report/page.html.j2"} <= names


def test_its_metadata_names_licence_command_and_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert "dht = dht.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    for extra, packages in EXTRAS.items():
        assert f"Provides-Extra: {extra}" in metadata
        told = {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]}
        assert told == set(packages), "what dht doctor and the error messages say is what the extra installs"


def test_every_module_imports_with_the_core_dependencies_alone(wheel, core_only):
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith(".py")
    )
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: print(name, '|', type(error).__name__, '|', error)\n"
    )
    done = run(core_only, "-c", code, *modules)
    assert done.returncode == 0, done.stderr
    failed = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    triton = failed.pop("dht.model.fused_kernel", "No module named 'triton'")  # torch for CUDA brings it along
    assert "No module named 'triton'" in triton
    assert set(failed) == set(NEEDS_EXTRA), failed
    for name, extra in NEEDS_EXTRA.items():
        assert failed[name].startswith("MissingExtraError | ")
        assert failed[name].endswith(f'is not installed; run pip install "dht-transformer[{extra}]"')


def test_the_command_runs_with_the_core_dependencies_alone(core_only, tmp_path):
    shown = run(core_only, "-m", "dht.cli", "--help")
    assert shown.returncode == 0, shown.stderr
    for command in ("train", "predict", "export", "doctor"):
        assert command in shown.stdout
    found = run(core_only, "-m", "dht.cli", "doctor")
    assert found.returncode == 0, found.stderr
    assert 'onnxruntime missing  (pip install "dht-transformer[onnx]")' in found.stdout
    refused = run(core_only, "-m", "dht.cli", "train", "--data", "nobody/nothing", "--out", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert 'or run pip install "dht-transformer[data]"' in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell):
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'dht'; from dht.cli import main; main()", "--show-completion",
         shell],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert script.returncode == 0, script.stderr
    assert "_DHT_COMPLETE" in script.stdout


def test_completion_is_light_and_knows_the_commands():
    asked = os.environ | {"COMP_WORDS": "dht ex", "COMP_CWORD": "1", "_DHT_COMPLETE": "complete_bash"}
    code = (
        "import sys; sys.argv[:] = ['dht']\n"
        "from dht.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    answered = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=asked)
    assert answered.stdout.split() == ["export"], answered.stderr


REMOVED = {
    "asynchat", "asyncore", "distutils", "imp", "smtpd",  # 3.12
    "aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "lib2to3", "mailcap", "msilib", "nis", "nntplib",
    "ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib",  # 3.13
}  # fmt: skip


def test_no_module_uses_what_newer_pythons_have_dropped():
    assert [f"Programming Language :: Python :: 3.{minor}" in PROJECT["classifiers"] for minor in (11, 12, 13)] == [
        True
    ] * 3
    for path in (ROOT / "src").rglob("*.py"):
        used = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert not used & (REMOVED | {"pkg_resources"}), path
