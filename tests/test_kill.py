"""A run that is killed at any moment ends, once resumed, bit for bit as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from dht import train
from dht.checkpoints import complete_checkpoints
from dht.errors import DHTError
from killing import Killer, small_settings, while_writing


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return Killer(small_settings(folder), folder / "runs")


def test_killed_in_training_ends_the_same(killer):
    outcome = killer.kill("training", lambda folder, since: (folder / "checkpoint-8").is_dir())
    assert outcome.differs == []
    assert outcome.resumed_from > 0


def test_killed_in_the_second_epoch_ends_the_same(killer):
    outcome = killer.kill("second", lambda folder, since: (folder / "checkpoint-28").is_dir())
    assert outcome.differs == []
    assert 20 < outcome.resumed_from < 40


def test_a_run_that_ends_within_an_epoch_ends_the_same(tmp_path):
    short = Killer(small_settings(tmp_path, train_budget=1.1), tmp_path / "runs")
    assert 40 < len(short.whole["data order"]) < 48, "the budget is spent within the second epoch, of 40 steps each"
    outcome = short.kill("short", lambda folder, since: (folder / "checkpoint-36").is_dir())
    assert outcome.differs == []
    assert 26 < outcome.resumed_from < 43


def test_killed_while_a_checkpoint_is_written_ends_the_same(killer):
    outcome = killer.kill("writing", while_writing(3, delay=0.003))
    assert outcome.differs == []
    assert outcome.moment == "writing"
    assert 4 <= outcome.resumed_from < 40


def test_the_same_seed_is_the_same_run_and_another_seed_is_not(killer, tmp_path):
    again, other = (Killer(small_settings(tmp_path / name, seed=seed), tmp_path / "runs" / name) for name, seed in RUNS)
    assert again.whole == killer.whole
    assert not {*other.whole["data order"]} & {*killer.whole["data order"]}
    assert other.whole["weights"] != killer.whole["weights"]


RUNS = (("again", 0), ("other", 1))


@pytest.fixture
def read_only():
    """A way to make a folder read-only, also for root, whom permission bits do not stop; undone at the end."""
    closed = []

    def close(folder):
        folder.chmod(0o555)
        closed.append(folder)
        if os.access(folder, os.W_OK) and shutil.which("chattr"):
            subprocess.run(["chattr", "+i", folder], capture_output=True, check=False)
        try:
            (folder / "probe").touch()
        except OSError:
            return
        pytest.skip("runs as root on a file system without immutable folders")

    yield close
    for folder in closed:
        if shutil.which("chattr"):
            subprocess.run(["chattr", "-i", folder], capture_output=True, check=False)
        folder.chmod(0o755)


def test_a_folder_that_turns_read_only_is_one_line_and_keeps_the_last_checkpoint(read_only, tmp_path):
    settings = small_settings(tmp_path / "x", out=tmp_path / "out")

    def make(*given):
        trainer = train.dynamic_trainer(*given)
        step = trainer.training_step

        def closing(*args, **kwargs):
            if trainer.state.global_step == 6:
                read_only(settings.out / "checkpoints")
            return step(*args, **kwargs)

        trainer.training_step = closing
        return trainer

    with pytest.raises(DHTError, match="permission denied; choose a folder .*checkpoint-4 is whole: then go on with"):
        train.fit(settings, make=make)
    assert [path.name for path in complete_checkpoints(settings.out / "checkpoints")] == ["checkpoint-4"]


def test_a_read_only_folder_is_one_line(read_only, tmp_path):
    settings = small_settings(tmp_path / "x", out=tmp_path / "closed" / "out")
    (tmp_path / "closed").mkdir()
    read_only(tmp_path / "closed")
    with pytest.raises(DHTError, match="--out: cannot make .*; choose another folder"):
        train.fit(settings)
