"""A comparison as a whole: what is run, what is never run twice, what is refused, and a small one to the end."""

from __future__ import annotations

import json
import math
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import dht.compare.cells as cells
import dht.compare.run as running
import dht.compare.trainings as trainings
from builders import batch, dynamic_model
from dht._files import write_json
from dht.cli import app
from dht.compare.ablations import ABLATIONS, install, shuffle_importance, variant
from dht.compare.methods import DEFAULT, METHODS
from dht.compare.regret import cumulative, probe_record
from dht.compare.settings import CompareSettings
from dht.compare.shapes import Sizes, sizes_of
from dht.compare.trainings import Training, record_of, weights_of
from dht.config import TrainSettings
from dht.errors import ConfigError, DHTError
from dht.hf.configuration import DHTConfig

SIZES = Sizes(6, 12)
GOOD, BAD = ["good", "great", "lovely", "fine", "superb", "warm"], ["bad", "dull", "awful", "poor", "cold", "boring"]
FILL = ["the", "film", "a", "story", "with", "plot", "and", "some", "scene", "of", "actor", "music"]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Sentences whose class a word gives away."""
    folder, draw = tmp_path_factory.mktemp("sentences"), random.Random(0)
    for split, count in (("train", 96), ("validation", 32), ("test", 32)):
        lines = []
        for index in range(count):
            words = [draw.choice(GOOD if index % 2 else BAD), *draw.choices(FILL, k=draw.randint(2, 9))]
            draw.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": ("neg", "pos")[index % 2]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def settings(tmp_path):
    return CompareSettings(
        data="vader", model="preset:tiny", out=tmp_path / "comparison", methods=("dense", "dht", "dense-decay"),
        budgets=(0.5, 0.26), seeds=(0, 1), device="cpu",
    )  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """Jobs that leave the files that real ones leave, at once; returns the list of what was run."""
    ran: list[str] = []

    def run_job(settings, sizes, job):
        ran.append(job.item.key)
        if isinstance(job.item, Training):
            write_json(record_of(settings, job.item), {"train_flops_fraction": 0.5, "train_seconds": 1.0})
            write_json(weights_of(settings, job.item) / "config.json", {})
        else:
            row = {"method": job.item.method, "budget": job.item.budget, "seed": job.item.seed, "accuracy": 0.5}
            row |= dict.fromkeys(("flops_fraction", "train_time_fraction", "train_flops_fraction"), 0.5)
            row |= {"versions": {}}
            write_json(running.cell_file(settings, job.item), row)
        return job.item.key

    def seconds_of(cell, bench, serve):
        ran.append(f"seconds of {cell.key}")
        return {"time_fraction": 0.5, "timing": {"contended": False, "threads": 1}}

    monkeypatch.setattr(running, "run_job", run_job)
    monkeypatch.setattr(running, "seconds_of", seconds_of)
    return ran


def test_every_rival_of_the_protocol_is_there():
    inference = {"static", "static-cut", "fixed", "random", "hash", "length", "shuffled", "confidence", "patience",
                 "confidence-pruned", "patience-pruned", "epsilon-greedy", "cascade", "oracle"}  # fmt: skip
    training = {"dense-decay", "smaller-dense", "layer-dropout", "progressive"}
    assert {"dense", "dht"} | inference | training <= set(DEFAULT)
    assert METHODS["oracle"].group == "bound"
    assert {name for name in METHODS if METHODS[name].group == "training"} >= training


def test_a_training_is_shared_and_comes_before_what_needs_it(settings):
    settings = replace(settings, methods=DEFAULT, seeds=(0,))
    jobs = running.jobs_of(settings, SIZES)
    keys = [job.key for job in jobs]
    assert len(keys) == len(set(keys))
    assert keys.count("Training:dht-0.26-s0") == keys.count("Training:dense-s0") == 1
    place = {key: index for index, key in enumerate(keys)}
    for job in jobs:
        assert all(place[before] < place[job.key] for before in job.after)
    needed = {job.key: job.after for job in jobs}
    assert {"Training:dht-0.26-s0", "Training:layer-dropout-0.26-flops-s0"} <= needed[
        "Training:layer-dropout-0.26-seconds-s0"
    ]


@pytest.mark.parametrize(("spent", "drops"), [(0.26, False), (0.6, False), (0.9, True)])
def test_a_rival_of_few_passes_trains_without_dropout_too(settings, monkeypatch, spent, drops):
    monkeypatch.setattr(trainings, "read_record", lambda *_: {"train_flops_fraction": spent})
    monkeypatch.setattr(trainings, "dense_trainer", lambda *_: SimpleNamespace(drops=True))
    rival = Training("dense-decay", 0, 0.26, match="flops")
    recipe = trainings._recipe(replace(settings, epochs=3.0), rival, SIZES)
    assert recipe.share == spent
    assert recipe.make().drops is drops


def test_a_kill_loses_only_what_was_in_progress(settings, fake, monkeypatch):
    whole = running.run_job

    def killed(given, sizes, job):
        if len(fake) == 5:
            raise KeyboardInterrupt
        return whole(given, sizes, job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "run_job", killed)
        running.run_missing(settings)
    assert len(fake) == 5
    before = [cell for cell in running.cells_of(settings) if running.cell_file(settings, cell).is_file()]
    running.run_missing(settings)
    cells = [cell.key for cell in running.cells_of(settings)]
    assert [key for key in cells if fake.count(key) != 1] == [], "every cell was run once"
    assert before
    count = len(fake)
    running.run_missing(settings)
    assert len(fake) == count, "nothing is left to run"
    lost = running.cell_file(settings, running.cells_of(settings)[3])
    lost.unlink()
    running.run_missing(settings)
    assert fake[count:].count(lost.stem) == 1
    assert sum(key in cells for key in fake[count:]) == 1, "only the missing cell"


def test_side_by_side_keeps_the_order_and_runs_the_same_jobs(settings, fake, monkeypatch):
    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, mp_context, initializer, initargs):
            super().__init__(workers)

    monkeypatch.setattr(running, "ProcessPoolExecutor", Pool)
    said = []
    running.run_missing(replace(settings, jobs=3), lambda what, done, total: said.append((what, done / total)))
    jobs = running.jobs_of(replace(settings, out=settings.out / "empty"), SIZES)
    run, timed = fake[: len(jobs)], fake[len(jobs) :]
    assert sorted(run) == sorted(job.item.key for job in jobs)
    assert timed == [f"seconds of {cell.key}" for cell in running.cells_of(settings)], "in turn, after all else"
    place = {key: index for index, key in enumerate(fake)}
    for job in jobs:
        assert all(place[key.split(":", 1)[1]] < place[job.item.key] for key in job.after)
    assert said[-1][1] == pytest.approx(1.0)
    assert not running.missing_cells(settings)


def test_seconds_taken_in_a_crowd_are_marked(monkeypatch):
    monkeypatch.setattr(cells.os, "cpu_count", lambda: 2)
    for load, crowded in ((1.2, False), (3.1, True)):
        monkeypatch.setattr(cells.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert cells.conditions()["contended"] is crowded


def test_seconds_are_measured_anew_where_they_are_missing(settings, fake):
    running.run_missing(settings)
    count, cell = len(fake), running.cells_of(settings)[0]
    running.seconds_file(settings, cell).unlink()
    row = next(row for row in running.gather(settings)["rows"] if row["method"] == cell.method)
    assert "time_fraction" not in row
    running.run_missing(settings)
    assert fake[count:] == ["dense-s0", f"seconds of {cell.key}"], "the weights were dropped; the row is kept"
    assert all(row["time_fraction"] == 0.5 for row in running.gather(settings)["rows"])


def test_more_seeds_and_methods_extend_a_comparison(settings, fake):
    running.run_missing(replace(settings, seeds=(0,), methods=("dense",)))
    count = len(fake)
    running.run_missing(settings)
    assert "dense@1-s0" not in fake[count:]
    assert "dense-s0" not in fake[count:], "the record is enough: no cell needs those weights"


def test_without_dense_rows_one_dense_training_tells_the_seconds(settings, fake):
    running.run_missing(replace(settings, methods=("dht",)))
    assert [key for key in fake if key.startswith("dense-s")] == ["dense-s0"]


def test_weights_that_no_cell_needs_are_removed(settings, fake):
    running.run_missing(settings)
    assert not list((settings.out / "models").glob("*"))
    kept = replace(settings, out=settings.out.with_name("kept"), keep_models=True)
    running.run_missing(kept)
    assert len(list((kept.out / "models").glob("*"))) == 10  # dense, and dht and dense-decay at two budgets, two seeds


def test_other_settings_in_the_same_folder_are_refused(settings, fake, tmp_path):
    running.run_missing(settings)
    with pytest.raises(DHTError, match=r"other settings \(epochs 3.0 there, 1.0 asked\); give another folder"):
        running.run_missing(replace(settings, epochs=1.0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(DHTError, match="already holds files that are no comparison"):
        running.run_missing(replace(settings, out=tmp_path / "full"))
    with pytest.raises(DHTError, match="is a file; give a folder"):
        running.run_missing(replace(settings, out=tmp_path / "full" / "x"))
    (settings.out / "settings.json").write_text("{")
    with pytest.raises(DHTError, match="not readable"):
        running.run_missing(settings)


def test_all_bad_settings_at_once(settings):
    bad = replace(settings, methods=("dht", "best"), ablations=("none-such",), budgets=(0.5, 2.0), seeds=(), jobs=0)
    with pytest.raises(ConfigError) as caught:
        bad.check()
    for part in (
        "--methods: got 'best', allowed: dense, dht,",
        "--ablations: got 'none-such', allowed: context-",
        "--budgets: got 0.5, 2.0, allowed: numbers in (0, 1]",
        "--seeds: got none",
        "--jobs: got 0",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="'epsilon-greedy', 'context-hidden' change tree search; leave them out"):
        replace(settings, search="integrated", methods=("epsilon-greedy",), ablations=("context-hidden",)).check()
    with pytest.raises(ConfigError, match="--epochs: got 0, allowed: a number above 0"):
        replace(settings, epochs=0).check()


def test_static_shapes_are_near_the_budget_and_not_above_it():
    for budget in (0.5, 0.26, 0.15, 0.1):
        shapes = SIZES.shapes(budget, 3)
        assert len(set(shapes)) == 3
        assert all(0.75 * budget <= SIZES.cost(*shape) <= budget for shape in shapes)
    assert SIZES.shapes(0.001, 3) == [(1, 1)]
    assert sizes_of("preset:tiny", "coupled") == Sizes(4, 4, 0.0)
    assert sizes_of("preset:tiny", "dense").cost(4, 1) == pytest.approx(2 / 3 + 1 / 3 / 4)
    for name, text in (("preset:huge", "no preset 'preset:huge'"), ("./none/there/x", "no folder")):
        with pytest.raises(DHTError, match=text):
            sizes_of(name, "coupled")


@pytest.mark.parametrize("name", ["epsilon-greedy", *ABLATIONS])
def test_an_ablation_turns_something_that_exists(name):
    switch = variant(name)
    assert switch.line
    assert set(switch.settings) <= {field.name for field in fields(TrainSettings)}
    config = DHTConfig()
    assert all(hasattr(config, option) for option in switch.options)
    turned = {**switch.settings, **switch.options}
    assert all(
        (getattr(config, k, None), getattr(TrainSettings("", "", Path()), k, None)) != (v, v) for k, v in turned.items()
    )
    assert turned or switch.policy or switch.feedback == "train"
    model = dynamic_model(**dict(switch.options))
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    install(model, name)
    assert all(torch.equal(value, before[key]) for key, value in model.policy.state_dict().items())
    inputs = batch()
    labels = inputs.pop("labels")
    for mode in ("explore", "probe", "exploit"):
        trace = model(**inputs, mode=mode).trace
        model.policy.observe(trace, (trace.exit_table()[0].argmax(-1) == labels[:, None]).double())
        model.policy.finish_step()


def test_contexts_see_what_their_names_say():
    inputs = batch()
    inputs.pop("labels")
    seen = {}
    for name in ("context-embedding", "context-hidden", "context-shuffled"):
        model = dynamic_model()
        install(model, name)
        seen[name] = model(**inputs, mode="probe").trace.context
    exits = slice(2, 8)
    assert torch.equal(seen["context-embedding"][:, 2], seen["context-embedding"][:, 0])
    assert not seen["context-hidden"][:, :, exits].any()
    assert not torch.allclose(seen["context-hidden"][:, 2], seen["context-hidden"][:, 0])
    plain = dynamic_model()(**inputs, mode="probe").trace.context
    assert not torch.allclose(seen["context-shuffled"][:, 0], plain[:, 0])
    torch.testing.assert_close(seen["context-shuffled"][:, 0].sort(0).values, plain[:, 0].sort(0).values)


def test_random_heads_are_another_order():
    model = dynamic_model()
    before = model.policy.ranking()
    shuffle_importance(model.policy)
    assert not torch.equal(model.policy.ranking(), before)
    assert model.policy.ranking().sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_regret_is_zero_for_the_best_depth_and_positive_for_worse_ones():
    model = dynamic_model()
    inputs = batch()
    labels = inputs.pop("labels")
    trace = model(**inputs, mode="probe").trace
    record = probe_record(trace, labels, 3, 0.1)
    assert len(record["fixed"]) == 3
    assert record["oracle"] >= max(record["policy"], *record["fixed"]) - 1e-12
    for layer, (_, decision) in enumerate(trace.decisions):
        decision.wants_stop = torch.full_like(decision.wants_stop, layer == 1)
    assert probe_record(trace, labels, 3, 0.1)["policy"] == pytest.approx(record["fixed"][0])
    curve = cumulative([record, record])
    assert curve["oracle"][1] == pytest.approx(2 * curve["oracle"][0])
    assert cumulative([]) == {}


def test_the_command_end_to_end(sentences, tmp_path):
    out = tmp_path / "comparison"
    call = ["compare", "--data", sentences, "--model", "preset:tiny", "--out", out, "--methods", "dht,shuffled",
            "--budgets", 0.5, "--seeds", "0,1", "--epochs", 1, "--batch-size", 16, "--max-length", 16,
            "--device", "cpu", "--lr", 1e-3, "--timed-batches", 1, "--repeats", 1, "--limit", "80,32,24"]  # fmt: skip
    result = CliRunner().invoke(app, [str(part) for part in call])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["cells"], last["missing"]) == (4, 0)
    assert "dht@0.5-s1" in result.stderr
    assert "left" in result.stderr
    whole = json.loads((out / "compare.json").read_text())
    assert [(row["method"], row["seed"]) for row in whole["rows"]] == [
        ("dht", 0), ("shuffled", 0), ("dht", 1), ("shuffled", 1)
    ]  # fmt: skip
    for row in whole["rows"]:
        assert math.isfinite(row["accuracy"] + row["macro_f1"] + row["time_fraction"] + row["train_time_fraction"])
        assert row["arm_entropy"] >= 0
        assert row["flops_fraction_p95"] >= row["flops_fraction"] * 0.5
        assert row["settings"]["epochs"] == 1
        assert (row["settings"]["limit"], row["num_examples"]) == ([80, 32, 24], 24)
        assert row["settings"]["data"] == sentences.name, "no path of this machine in the result"
        assert set(row["timing"]) == {"threads", "load", "cores", "contended", "batches", "repeats"}
        assert 0 < row["latency_p50"] <= row["latency_p95"]
        assert row["latency_fraction"] == row["latency_p50"] / row["dense_latency_p50"]
        assert row["throughput"] > 0
        assert row["time_fraction_128"] == pytest.approx(row["dense_throughput_128"] / row["throughput_128"])
        assert 0 < row["peak_bytes"] < 1.1 * row["dense_peak_bytes"]
        assert {"torch", "transformers", "commit"} <= set(row["versions"])
        assert row["choice"]["met_on_validation"] == pytest.approx(0.5, abs=0.1)
    assert whole["regret"]["0.5-s0"]["step"]
    page = (out / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "Not measured" not in page
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?https?:""", page)
    assert str(tmp_path) not in (out / "compare.json").read_text() + page
    before = (out / "cells" / "dht@0.5-s0.json").stat().st_mtime_ns
    again = CliRunner().invoke(app, [str(part) for part in [*call, "--seeds", "0"]])
    assert again.exit_code == 0
    assert (out / "cells" / "dht@0.5-s0.json").stat().st_mtime_ns == before
