"""Damage to saved runs and checkpoints: every file is refused by name, or what loads is what was saved."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from builders import dynamic_model
from damage import damage, damage_checkpoint, damage_run, same
from dht import train
from dht.checkpoints import complete_checkpoints, load_state, newest_whole, save_state
from dht.errors import CheckpointError, DHTError
from dht.load import load_run
from dht.manifest import MANIFEST, verify, write_manifest
from killing import small_settings


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished run and the checkpoints of its training."""
    settings = small_settings(tmp_path_factory.mktemp("saved"), epochs=1)
    fitted = train.fit(settings)
    checkpoints = shutil.copytree(settings.out / "checkpoints", settings.out.parent / "checkpoints")
    train.save_run(settings.out, fitted.model, fitted.tokenizer, fitted.report)
    return settings, settings.out, checkpoints


SILENT = ("report.json", "run.json")
"""Files of a run that say nothing of its model."""


def test_120_damaged_runs_are_refused_by_name_or_load_the_same(saved):
    seen = damage_run(saved[1], 120, seed=0)
    assert {outcome for (_, outcome) in seen} == {"refused", "same"}
    assert {file for (file, outcome) in seen if outcome == "same"} == set(SILENT)
    assert not {file for (file, outcome) in seen if outcome == "refused"} & set(SILENT)
    load_run(saved[1])


def test_80_damaged_checkpoints_are_refused_by_name(saved):
    seen = damage_checkpoint(saved[2], 80, seed=1)
    assert {outcome for (_, outcome) in seen} == {"refused"}
    assert sum(seen.values()) == 80
    assert newest_whole(saved[2])[1] == []


def test_a_damaged_checkpoint_is_said_and_the_one_before_resumed(saved, tmp_path):
    _, folder, checkpoints = saved
    out = tmp_path / "out"
    shutil.copytree(checkpoints, out / "checkpoints")
    older, newer = complete_checkpoints(out / "checkpoints")
    damage(newer / "optimizer.safetensors", random.Random(0))
    news: list[str] = []
    trainers = []

    def make(*given):
        trainers.append(train.dynamic_trainer(*given))
        with pytest.raises(CheckpointError, match="cannot load optimizer.safetensors: .*restore it from a copy$"):
            trainers[0].train(resume_from_checkpoint=str(broken))
        return trainers[0]

    broken = shutil.copytree(newer, tmp_path / "broken")
    fitted = train.fit(small_settings(tmp_path / "x", epochs=1, out=out), resume=True, say=news.append, make=make)
    assert f"{newer}: cannot load optimizer.safetensors: " in news[0]
    assert f"resuming from {older}" in news
    assert same(load_run(folder)[0], fitted.model)

    for path in complete_checkpoints(out / "checkpoints"):
        damage(path / "model.safetensors", random.Random(0))
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*cannot load model.safetensors.*start anew"):
        train.fit(small_settings(tmp_path / "y", epochs=1, out=out), resume=True)


def test_nothing_is_unpickled_and_a_checkpoint_holds_no_pickle(saved, tmp_path, monkeypatch):
    _, folder, checkpoints = saved
    for path in checkpoints.rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors"), path

    def refused(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr("pickle.load", refused)
    monkeypatch.setattr("pickle.loads", refused)
    load_run(folder)
    AutoModelForSequenceClassification.from_pretrained(folder)
    shutil.copytree(checkpoints, tmp_path / "out" / "checkpoints")
    train.fit(small_settings(tmp_path / "x", epochs=1, out=tmp_path / "out"), resume=True)


def test_a_source_that_is_a_pickle_is_refused(saved, tmp_path):
    settings = saved[0]
    encoder = shutil.copytree(settings.model, tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()
    torch.save({}, encoder / "pytorch_model.bin")
    with pytest.raises(DHTError, match="cannot load .*model.safetensors"):
        train.fit(small_settings(tmp_path / "x", model=str(encoder)))


def test_manifests_speak_of_the_file_or_of_themselves(tmp_path):
    model = dynamic_model()
    model.save_pretrained(tmp_path)
    assert not verify(tmp_path), "a folder that is edited at will"
    write_manifest(tmp_path)
    assert verify(tmp_path)
    weights, listed = tmp_path / "model.safetensors", tmp_path / MANIFEST
    held, text = weights.read_bytes(), listed.read_text()
    weights.write_bytes(held[:-1] + b"x")
    with pytest.raises(
        CheckpointError, match=r"cannot load model.safetensors: its SHA-256 is not what manifest.json s"
    ):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    weights.write_bytes(held[:100])
    with pytest.raises(CheckpointError, match=rf"model.safetensors: 100 bytes are not {len(held)}, what manifest.json"):
        verify(tmp_path)
    weights.unlink()
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: No such file or directory; the file is damaged: rest"
    ):
        verify(tmp_path)
    weights.write_bytes(held)
    listed.write_text(text.replace("model.safetensors", "nodel.safetensors"))
    with pytest.raises(CheckpointError, match=r"manifest.json: the list of checksums is damaged"):
        verify(tmp_path)
    model.save_pretrained(tmp_path)
    assert not listed.exists(), "it spoke of what was replaced"
    assert same(model, type(model).from_pretrained(tmp_path))


def test_a_damaged_checkpoint_is_not_loaded_as_a_model(saved, tmp_path):
    folder = shutil.copytree(complete_checkpoints(saved[2])[-1], tmp_path / "checkpoint")
    AutoModelForSequenceClassification.from_pretrained(folder)
    damage(folder / "model.safetensors", random.Random(0))
    with pytest.raises(CheckpointError, match="cannot load model.safetensors: .*complete.json says"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_broken_policy_without_checksums_is_refused(tmp_path, saved):
    folder = shutil.copytree(saved[1], tmp_path / "run")
    model, _ = load_run(folder)
    model.policy.numbers.gram[1, 0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="numbers.gram of the policy is not finite; the checkpoint is corrupt"):
        load_run(folder)
    model.policy.numbers.gram[1] = -torch.eye(len(model.policy.numbers.gram[1])) * 9
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="arm 1: the precision matrix is not finite or not positive definite"):
        load_run(folder)


def test_states_come_back_to_the_last_bit(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).T}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "name": None, "fused": True}],
        "random": ("MT19937", np.arange(4, dtype=np.uint32), -1, float("inf")),
    }
    save_state(tmp_path / "s.safetensors", state)
    back = load_state(tmp_path / "s.safetensors")
    assert torch.equal(back["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert (back["groups"], back["random"][0], back["random"][2:]) == (state["groups"], "MT19937", (-1, float("inf")))
    assert back["random"][1].dtype == np.uint32
    np.testing.assert_array_equal(back["random"][1], state["random"][1])
    save_state(tmp_path / "empty.safetensors", {})
    assert load_state(tmp_path / "empty.safetensors") == {}
    with pytest.raises(
        CheckpointError, match="cannot put a object into a checkpoint; allowed: tensors, numbers, strin"
    ):
        save_state(tmp_path / "s.safetensors", {"x": object()})


def test_the_manifest_of_a_run_lists_model_and_tokenizer(saved):
    listed = json.loads((saved[1] / MANIFEST).read_text())["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(listed)


def test_predictions_of_a_model_with_broken_weights_are_refused(saved):
    from dht.predict import predict

    model, tokenizer = load_run(saved[1])
    rows = list(predict(model, tokenizer, ["", "x", "\ud800 lone", "\0"]))
    assert len(rows) == 4
    with pytest.raises(DHTError, match="text 2: the text is None, a NoneType; allowed: a string"):
        list(predict(model, tokenizer, ["a", None]))
    with torch.no_grad():
        model.encoder.embeddings.words.weight.fill_(float("nan"))
    with pytest.raises(
        DHTError, match="text 1: the model's answer is not a number; its weights are broken, train anew"
    ):
        list(predict(model, tokenizer, ["fine"]))
