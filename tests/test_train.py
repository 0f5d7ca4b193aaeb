"""Training end to end on a small encoder and real sentences: budget, report, resume, interruption."""

from __future__ import annotations

import json
import random
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, TrainerCallback

import dht.train as training
from dht.config import TrainSettings
from dht.data import load_data
from dht.errors import CheckpointError, ConfigError, DHTError
from dht.load import all_told_of, load_run
from launching import launch

FIELDS = {
    "accuracy", "macro_f1", "num_examples", "budget", "policy", "search", "seed", "flops_fraction", "time_fraction",
    "seconds", "dense_seconds", "policy_time_fraction", "mean_layers", "mean_heads", "layers_histogram", "head_usage",
    "train_flops_fraction", "train_time_fraction", "train_seconds", "dense_train_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, minilm_path):
    """A tiny BERT with the real tokenizer, saved as any checkpoint is."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory, vader_path):
    """A small seeded cut of the real sentences."""
    folder = tmp_path_factory.mktemp("sentences")
    data = load_data(str(vader_path))
    for split, count in (("train", 400), ("validation", 120), ("test", 100)):
        rows = getattr(data, split)
        chosen = random.Random(0).sample(range(len(rows)), count)
        lines = [json.dumps({"text": rows.texts[i], "label": data.label_names[rows.labels[i]]}) for i in chosen]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(encoder, sentences):
    return TrainSettings(
        data=str(sentences), model=str(encoder), out=None, budget=0.4, epochs=2, batch_size=16, lr=1e-3, max_length=48,
        device="cpu", save_every=5, train_budget=10.0, crop=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    news = []
    return out, training.train(replace(settings, out=out), say=news.append), news


def test_the_report_has_every_field(finished):
    out, report, _ = finished
    assert set(report) >= FIELDS
    assert json.loads((out / "report.json").read_text()) == report
    assert report["num_examples"] == 100 == sum(report["layers_histogram"])
    assert len(report["layers_histogram"]) == 4
    assert (len(report["head_usage"]), len(report["head_usage"][0])) == (3, 4)
    assert report["policy"] == "learned"
    assert 0 < report["policy_time_fraction"] < 1


def test_the_budget_is_met_and_training_counts_everything(finished):
    _, report, _ = finished
    # The exit heads and the policy weigh heavily at this size (D = 32), the validation rows are few.
    assert report["flops_fraction"] == pytest.approx(0.4, abs=0.12)
    history = json.loads((finished[0] / "history.json").read_text())
    stepped = sum(line["fraction"] for line in history) / len(history)
    assert report["train_flops_fraction"] > stepped, "calibration and feedback are charged too"


def test_the_run_folder_serves(finished):
    out, _, _ = finished
    assert not (out / "checkpoints").exists()
    model, tokenizer = load_run(out)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert tokenizer("fine").input_ids
    assert float(model.policy.price) > 0
    assert model.config.budget == 0.4


class _Seen(TrainerCallback):
    """Notes rows and dropout of the steps."""

    def __init__(self):
        self.dropout, self.rows = set(), set()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        blocks, exits = model.encoder.blocks, model.encoder.exits
        self.dropout |= {model.encoder.embeddings.dropout.p, blocks[0].dropout, blocks[2].attention_dropout}
        self.dropout |= {exits[1].dropout.p}
        self.rows.add(args.per_device_train_batch_size)


@pytest.mark.parametrize(("epochs", "budget", "dropout", "rows"), [(2, 10.0, {0.1}, {16}), (3, 0.26, {0.0}, {8})])
def test_short_trainings_take_small_steps_without_dropout(settings, tmp_path, epochs, budget, dropout, rows):
    seen = _Seen()

    def make(*args):
        trainer = training.dynamic_trainer(*args)
        trainer.add_callback(seen)
        return trainer

    short = replace(settings, out=tmp_path / "run", epochs=epochs, train_budget=budget)
    fitted = training.fit(short, make=make)
    assert (seen.dropout, seen.rows) == (dropout, rows)
    assert fitted.dense_steps == pytest.approx(epochs * 25, rel=0.02), "those of the dense model, of 16 rows"
    assert fitted.model.encoder.blocks[1].dropout == 0.1, "as it is configured, afterwards"


@pytest.mark.parametrize("crop", [16, 0])
def test_long_texts_are_cut_in_the_first_steps_only(crop, settings, finished, tmp_path):
    longest = []

    def make(*args):
        trainer = training.dynamic_trainer(*args)
        words = trainer.model.encoder.embeddings
        words.register_forward_pre_hook(lambda m, given: longest.append(given[0].shape[1]) if m.training else None)
        return trainer

    news = []
    fitted = training.fit(replace(settings, out=tmp_path / "run", crop=crop), make=make, say=news.append)
    assert any("training texts have more than 16 tokens" in line for line in news) == bool(crop)
    assert len(longest) == fitted.steps == 50
    cropped = 35 if crop else 0
    assert max(longest[cropped:]) > 16
    if crop:
        assert max(longest[:cropped]) == 16
        assert fitted.report["train_flops_fraction"] == pytest.approx(finished[1]["train_flops_fraction"])
    else:
        assert fitted.report["train_flops_fraction"] > 1.1 * finished[1]["train_flops_fraction"]


def test_one_long_text_among_short_ones_buys_next_to_nothing(settings, tmp_path, monkeypatch):
    data, kept = load_data(str(settings.data)), []
    texts = ["a short one that says next to nothing at all"] * 399 + ["long " * 60]

    def divide(*args, crop, **kwargs):
        kept.append(crop)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "divide", divide)
    with pytest.raises(KeyboardInterrupt):
        training.fit(
            replace(settings, out=tmp_path / "run"), data=replace(data, train=replace(data.train, texts=texts))
        )
    assert 0.9 < kept[0] < 1.0, "attention is padded to the rows of a batch, not to the longest of all"


@pytest.mark.parametrize("task", ["pairs", "embedding"])
def test_what_needs_all_its_words_is_never_cut(task, settings, tmp_path):
    data = load_data(str(settings.data))
    seen = []

    def make(told, *args):
        seen.append(told.crop)
        raise KeyboardInterrupt

    if task == "pairs":
        train, validation = (replace(split, pairs=split.texts) for split in (data.train, data.validation))
        data = replace(data, train=train, validation=validation)
    else:
        data = replace(data, task="embedding")
    with pytest.raises(KeyboardInterrupt):
        training.fit(replace(settings, out=tmp_path / "run", task="auto"), make=make, data=data)
    assert seen == [0]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["crop"] == 16, "what was asked for is what is told"


class _Stop(TrainerCallback):
    """Raises in the middle of training, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_interrupted_and_resumed_equals_uninterrupted(settings, finished, tmp_path, monkeypatch):
    make = training.dynamic_trainer

    def stopping(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.add_callback(_Stop(17))
        return trainer

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "dynamic_trainer", stopping)
        training.train(replace(settings, out=out))
    saved = training.complete_checkpoints(out / "checkpoints")
    assert [path.name for path in saved] == ["checkpoint-10", "checkpoint-15"]
    with pytest.raises(CheckpointError, match="no config.json, so no finished run; the run was interrupted"):
        load_run(out)
    # A checkpoint that was cut short is not resumed from.
    broken = out / "checkpoints" / "checkpoint-20"
    shutil.copytree(saved[-1], broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert training.complete_checkpoints(out / "checkpoints") == saved

    report = training.train(replace(settings, out=out), resume=True)
    whole, again = load_run(finished[0])[0], load_run(out)[0]
    for (name, ours), theirs in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert report["accuracy"] == finished[1]["accuracy"]
    assert report["train_flops_fraction"] == pytest.approx(finished[1]["train_flops_fraction"])


class _FullDisk(TrainerCallback):
    """From step 7 on the system refuses to write files above a megabyte."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(settings, finished, tmp_path, monkeypatch):
    make, limits = training.dynamic_trainer, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.add_callback(_FullDisk())
        return trainer

    out = tmp_path / "run"
    try:
        with monkeypatch.context() as patch, pytest.raises(DHTError) as caught:
            patch.setattr(training, "dynamic_trainer", filling)
            training.train(replace(settings, out=out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in str(caught.value)
    assert "checkpoint-5 is whole: then go on with the same command and --resume" in str(caught.value)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-5"]
    report = training.train(replace(settings, out=out), resume=True)
    assert report["accuracy"] == finished[1]["accuracy"]


@pytest.mark.parametrize(
    "change", [{"search": "integrated"}, {"ffn": "dense"}, {"dtype": "bfloat16"}, {"accumulate": 2}]
)
def test_every_variant_trains(settings, tmp_path, change):
    report = training.train(replace(settings, out=tmp_path / "run", epochs=0.5, **change))
    for name, value in change.items():
        if name in report:
            assert report[name] == value
    assert 0 < report["flops_fraction"] < 1.2


def test_a_preset_trains_from_scratch(settings, tmp_path):
    report = training.train(replace(settings, out=tmp_path / "run", epochs=0.3, model="preset:tiny"))
    assert len(report["layers_histogram"]) == 5
    with pytest.raises(DHTError, match="no preset 'preset:huge'; there are: preset:tiny, preset:small"):
        training.train(replace(settings, out=tmp_path / "other", model="preset:huge"))


def test_dense_training_is_the_plain_model(settings, tmp_path):
    report = training.train(replace(settings, out=tmp_path / "run", epochs=0.5, dense=True, train_budget=None))
    assert report["policy"] == "dense"
    assert report["train_flops_fraction"] == report["flops_fraction"] == 1.0
    assert report["mean_layers"] == 3
    assert report["dense_train_seconds"] == report["train_seconds"]


def test_a_folder_with_a_run_is_not_overwritten_unasked(settings, finished):
    before = (finished[0] / "report.json").read_bytes()
    with pytest.raises(DHTError, match="already holds files; give another folder, --resume to go on, or --overwrite"):
        training.train(replace(settings, out=finished[0]))
    assert (finished[0] / "report.json").read_bytes() == before


def test_several_processes_train_one_run(settings, tmp_path):
    out = tmp_path / "run"
    said = launch(
        "accelerate", "-m", "dht", "train", "--data", settings.data, "--model", settings.model, "--out", out,
        "--budget", "0.4", "--epochs", "0.5", "--batch-size", "16", "--lr", "1e-3", "--max-length", "48",
        "--device", "cpu", "--save-every", "5",
    )  # fmt: skip
    assert said.count("timing dense training steps") == 1, "one process speaks"
    report = json.loads((out / "report.json").read_text())
    assert set(report) >= FIELDS
    assert report["train_flops_fraction"] > 0
    assert load_run(out)[0].config.budget == 0.4
    assert not (out / "checkpoints").exists()
    assert "| accuracy |" in (out / "README.md").read_text()


def test_a_run_is_resumed_with_its_own_settings(settings, tmp_path, monkeypatch):
    make = training.dynamic_trainer

    def stopping(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.add_callback(_Stop(12))
        return trainer

    small = replace(settings, out=tmp_path / "run", epochs=1, limit=(220, 40, 40))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "dynamic_trainer", stopping)
        training.train(small)
    told = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        training.train(replace(small, lr=0.5, seed=1), resume=True)
    assert str(caught.value) == (
        "2 problems: (1) --seed: got 1, but the run was started with 0 (2) --lr: got 0.5, but the run was started with "
        "0.001; --resume goes on with the settings of the run: give the same, or start anew in another --out"
    )
    assert (tmp_path / "run" / "run.json").read_bytes() == told, "nothing was written"
    same_folder = str(small.data) + "/."
    assert training.train(replace(small, save_every=4, data=same_folder), resume=True)["resumed"]


@pytest.mark.parametrize("content", ["[1]", "{", "{}"])
def test_settings_that_a_run_does_not_tell_are_not_compared(content, settings, tmp_path):
    (tmp_path / "run.json").write_text(content)
    replace(settings, out=tmp_path).check_resumed(all_told_of(tmp_path))


def test_resume_without_a_checkpoint(settings, tmp_path):
    with pytest.raises(CheckpointError, match="--resume: no complete checkpoint in"):
        training.train(replace(settings, out=tmp_path / "none"), resume=True)


def test_out_is_a_file(settings, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DHTError, match="is a file; give a folder"):
        training.train(replace(settings, out=tmp_path / "file"))


def test_all_bad_settings_at_once(settings, tmp_path):
    bad = replace(settings, out=tmp_path, budget=0, search="both", epochs=-1, batch_size=0, device="tpu", dtype="int4")
    bad = replace(bad, limit=(5, 0, 5))
    with pytest.raises(ConfigError) as caught:
        training.train(bad)
    for part in (
        "--budget: got 0, allowed: a number in (0, 1]",
        "--search: got 'both', allowed: tree, integrated",
        "--epochs: got -1",
        "--batch-size: got 0",
        "--device: got 'tpu', allowed: auto, cpu, cuda",
        "--dtype: got 'int4', allowed: float32, bfloat16",
        "--limit: got (5, 0, 5), allowed: three whole numbers above 0: rows of train, validation and test",
    ):
        assert part in str(caught.value)


def test_corrupt_runs_are_refused(finished, tmp_path):
    def copy(name):
        return shutil.copytree(finished[0], tmp_path / name)

    cases = {
        "truncated": ("model.safetensors", lambda b: b[: len(b) // 2], "cannot load model.safetensors"),
        "garbled": ("config.json", lambda b: b[:40], "not readable as JSON"),
        "foreign": ("config.json", lambda b: b.replace(b'"dht"', b'"bert"'), "not a dht model"),
        "newer": (
            "config.json",
            lambda b: b.replace(b'"format_version": 4', b'"format_version": 7'),
            "install a newer dht",
        ),
    }
    for name, (file, change, text) in cases.items():
        folder = copy(name)
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        with pytest.raises(CheckpointError, match=text):
            load_run(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_run(tmp_path / "nothing")


def test_the_training_budget_is_met_or_it_is_said(settings, tmp_path):
    news = []
    fitted = training.fit(replace(settings, out=tmp_path / "met", train_budget=0.6, crop=0), say=news.append)
    assert fitted.report["train_flops_fraction"] == pytest.approx(0.6, abs=0.06)
    assert fitted.steps < fitted.dense_steps == 50
    assert not any("not 0.6" in line for line in news)
    fitted = training.fit(replace(settings, out=tmp_path / "little", train_budget=0.1, crop=0), say=news.append)
    assert fitted.steps * 8 == 120, "of 800 rows some 15% are trained on all the same, eight at a time"
    assert any("of dense training, not 0.1: on so few rows" in line for line in news)


@pytest.mark.parametrize(("options", "imitates"), [({}, True), ({"wide_from": 0}, False), ({"widths": [4]}, False)])
def test_only_narrow_layers_imitate(options, imitates, settings, tmp_path, monkeypatch):
    asked = []

    def noting(model, batches, sets):
        asked.append(sets.sum(-1).tolist())
        return 0.0

    monkeypatch.setattr(training, "imitate", noting)
    training.fit(replace(settings, out=tmp_path / "run", epochs=0.1), options=options)
    assert asked == ([[3, 3, 0]] if imitates else [])


def test_a_training_budget_is_not_for_the_dense_model():
    with pytest.raises(
        ConfigError, match=r"--train-budget: got 0\.5, but dense training takes all of --epochs; leave it"
    ):
        TrainSettings("d", "m", "o", dense=True, train_budget=0.5).check()
