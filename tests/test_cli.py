"""The commands as a user types them, in processes of their own where start-up or exit codes matter."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dht.cli import app, main
from dht.errors import DHTError
from test_train import encoder, finished, sentences, settings  # noqa: F401

DHT = [sys.executable, "-m", "dht.cli"]


def invoke(*arguments, text=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one line that a bad call prints, with exit status 2 asserted."""
    monkeypatch.setattr(sys, "argv", ["dht", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("dht: error: ")
    assert err.count("\n") == 1
    return err


def test_help_is_light_and_names_every_command():
    code = "import sys, dht.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = subprocess.run([*DHT, "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("demo", "train", "fit", "evaluate", "predict", "compare", "bench"):
        assert command in shown
        described = invoke(command, "--help")
        assert described.exit_code == 0
    assert invoke("--version").output.startswith("dht 0.")


@pytest.mark.parametrize("command", [("fit", "x", "--data", "y"), ("evaluate", "x"), ("demo",)])
def test_commands_of_one_process_say_so(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refused(monkeypatch, capsys, *command) == (
        f"dht: error: dht {command[0]} was started in 2 processes (WORLD_SIZE), but runs in one; start it without "
        "torchrun or accelerate launch (dht train takes several)\n"
    )
    assert invoke("doctor", "--json").exit_code == 0


def test_evaluate_writes_json(finished, settings, tmp_path):  # noqa: F811
    target = tmp_path / "deep" / "r.json"
    result = invoke("evaluate", finished[0], "--data", settings.data, "--json", target, "--max-length", 48)
    assert result.exit_code == 0, result.output
    report = json.loads(target.read_text())
    assert report["accuracy"] == finished[1]["accuracy"]
    assert report["policy"] == "learned"
    named = json.loads(invoke("evaluate", finished[0], "--max-length", 48).stdout.splitlines()[-1])
    assert named["accuracy"] == report["accuracy"], "without --data: the data of the run"


@pytest.mark.parametrize("policy", ["dense", "static:2x2", "random", "hash", "length", "confidence", "patience"])
def test_evaluate_runs_every_rival(finished, settings, policy):  # noqa: F811
    result = invoke("evaluate", finished[0], "--data", settings.data, "--policy", policy, "--budget", 0.5)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["policy"] == policy
    assert report["budget"] == 0.5
    if policy == "dense":
        assert report["flops_fraction"] == 1.0


def test_budget_moves_the_compute_without_retraining(finished, settings):  # noqa: F811
    spent = []
    for budget in (0.2, 0.9):
        result = invoke("evaluate", finished[0], "--data", settings.data, "--budget", budget, "--split", "validation")
        spent.append(json.loads(result.stdout.splitlines()[-1])["flops_fraction"])
    assert spent[0] < spent[1]


def test_predict_lines_and_json(finished):  # noqa: F811
    lines = ["what a lovely film", json.dumps({"text": "dreadful, dull and far too long"}), "ok"]
    result = invoke("predict", finished[0], "-", text="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert set(row) == {"label", "score", "layers", "heads", "flops_fraction"}
        assert row["label"] in ("negative", "positive")
        assert 0.5 <= row["score"] <= 1
        assert len(row["heads"]) == row["layers"]


def test_predict_file_in_batches_of_one_equals_batches(finished, tmp_path):  # noqa: F811
    file = tmp_path / "texts.txt"
    file.write_text("fine\n" + "a very long sentence that goes on and on " * 20 + "\nmeh\n", encoding="utf-8")
    one = invoke("predict", finished[0], file, "--batch-size", 1).stdout.splitlines()
    many = invoke("predict", finished[0], file).stdout.splitlines()
    for a, b in zip(map(json.loads, one), map(json.loads, many), strict=True):
        assert (a["label"], a["layers"], a["heads"]) == (b["label"], b["layers"], b["heads"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_train_command(settings, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    call = [
        "train",
        "--data",
        settings.data,
        "--model",
        settings.model,
        "--out",
        out,
        "--epochs",
        0.2,
        "--max-length",
        32,
    ]
    result = invoke(*call, "--batch-size", 16, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "samples by layers run" in result.output
    assert json.loads((out / "report.json").read_text())["budget"] == 0.26


def test_interruption_says_how_to_resume(settings, tmp_path, monkeypatch):  # noqa: F811
    import dht.train as training
    from test_train import _Stop

    make = training.dynamic_trainer

    def stopping(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.add_callback(_Stop(3))
        return trainer

    monkeypatch.setattr(training, "dynamic_trainer", stopping)
    call = ["train", "--data", settings.data, "--model", settings.model, "--batch-size", 16, "--max-length", 32]
    result = invoke(*call, "--out", tmp_path / "a", "--save-every", 2)
    assert result.exit_code == 130
    assert "checkpoint-2 is whole: go on with the same command and --resume" in result.output
    result = invoke(*call, "--out", tmp_path / "b")
    assert "interrupted before the first checkpoint" in result.output


def test_bad_calls_are_one_line_and_exit_2(finished, settings, tmp_path, monkeypatch, capsys):  # noqa: F811
    run, data = finished[0], settings.data
    cases = [
        (
            ("train", "--data", data, "--out", tmp_path / "x", "--budget", "1.5"),
            "--budget: got 1.5, allowed: a number in (0, 1]",
        ),
        (("train", "--data", tmp_path / "none", "--out", tmp_path / "x"), "none"),
        (("train", "--data", data, "--out", tmp_path / "x", "--model", "./none/here"), "no folder './none/here'"),
        (("evaluate", run, "--data", data, "--policy", "best"), "--policy: got 'best'"),
        (("evaluate", run, "--data", data, "--split", "dev"), "--split: got 'dev', allowed: train, validation, test"),
        (("evaluate", run, "--data", data, "--budget", "0"), "--budget: got 0.0"),
        (("evaluate", tmp_path / "none", "--data", data), "no such folder"),
        (("evaluate", tmp_path / "none"), "no run.json that names the data; give --data"),
        (("predict", run, tmp_path / "none.txt"), "none.txt"),
        (("predict", run, "--budget", "2"), "--budget: got 2.0"),
        (("compare", "--methods", "best", "--out", tmp_path / "x"), "--methods: got 'best', allowed: dense, dht, "),
        (("compare", "--seeds", "a", "--out", tmp_path / "x"), "--seeds: got 'a', give whole numbers with commas"),
        (("compare", "--budgets", "x", "--out", tmp_path / "x"), "--budgets: got 'x', give numbers with commas"),
        (("demo", "--budget", "-1", "--out", tmp_path / "x"), "--budget: got -1.0"),
    ]
    for arguments, text in cases:
        assert text in refused(monkeypatch, capsys, *arguments)


def test_cuda_without_a_gpu(monkeypatch):
    from dht import load

    monkeypatch.setattr(load.torch.cuda, "is_available", lambda: False)
    with pytest.raises(DHTError, match="torch sees no CUDA device here; use --device cpu"):
        load.device_of("cuda")


def test_demo_end_to_end(settings, tmp_path):  # noqa: F811
    out = tmp_path / "demo"
    result = invoke("demo", "--data", settings.data, "--model", settings.model, "--out", out, "--epochs", 0.5)
    assert result.exit_code == 0, result.output
    assert "dense" in result.stdout
    page = (out / "page.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?https?:""", page), (
        "the page loads nothing (texts may hold links)"
    )
    report = json.loads((out / "report.json").read_text())
    assert report["train_time_fraction"] == report["train_seconds"] / report["dense_train_seconds"]
    assert {point["kind"] for point in json.loads((out / "points.json").read_text())} >= {"dense", "learned", "static"}
