"""`dht bench`: rows appear, their arithmetic holds, plans cost what was asked for, and no number without parity."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
import torch

import dht.bench.bandits as bandits
import dht.bench.growth as growth
import dht.bench.inputs as inputs
import dht.bench.parity as parity
import dht.bench.whole as whole
from builders import batch, dynamic_model
from dht._files import write_json
from dht.bench.contend import planned
from dht.bench.header import commit
from dht.bench.inputs import Rows
from dht.bench.memory import peak_bytes
from dht.bench.parity import check_parity
from dht.bench.plans import REACHED, PreparedPlan, plan_of, shape_for
from dht.bench.run import bench, brief
from dht.bench.settings import parse, short_name
from dht.bench.speed import Call, Contender, Times, rows_of, take_turns
from dht.cost import CostModel
from dht.errors import ConfigError, DHTError
from dht.load import build
from dht.model.block import Block
from dht.model.execute import execute
from dht.plan import Account, Trace
from dht.policy.baselines import DensePolicy, FixedPlan
from dht.report.growth import growth_chart
from dht.report.speed import print_speed
from test_cli import invoke, refused
from test_train import encoder, sentences, settings  # noqa: F401

MINILM = CostModel(width=384, heads=12, ffn=1536, layers=6, classes=2, coupled=True)
BERT = CostModel(width=768, heads=12, ffn=3072, layers=12, classes=2, coupled=True)


@pytest.fixture(scope="module")
def run_folder(settings, tmp_path_factory):  # noqa: F811
    """A run that was never trained: its policy decides by its prior, which is all that timing needs."""
    folder = tmp_path_factory.mktemp("runs") / "untrained"
    torch.manual_seed(0)
    model, tokenizer = build(settings, ["negative", "positive"])
    with torch.no_grad():
        for exit_ in model.encoder.exits:
            exit_.classifier.weight.mul_(20.0)  # rows that differ in confidence leave at different layers
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "run.json", {"data": settings.data})
    return folder


@pytest.fixture(scope="module")
def result(run_folder, tmp_path_factory):
    """A small table of a run, as the command makes it: its output and the full JSON."""
    target = tmp_path_factory.mktemp("bench") / "deep" / "table.json"
    call = ["bench", "--model", run_folder, "--batch", "1,4", "--training-batch", 4]
    call += ["--tokens", "9,mix", "--fractions", "1.0,.5", "--dtype", "float32,bfloat16", "--json", target]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "TIMED_ROWS", 4)
        patch.setattr(inputs, "SINGLE_ROWS", 2)
        done = invoke(*call)
    assert done.exit_code == 0, done.output
    return done, json.loads(target.read_text())


def test_every_row_asked_for_is_there(result):
    rows = result[1]["rows"]
    found = {(r["what"], r["dtype"], r["batch"], r["tokens"], r["plan"]) for r in rows}
    assert len(found) == len(rows)
    for tokens in (9, "mix"):
        for dtype in ("float32", "bfloat16"):
            for plan in ("dense", "depth", "heads", "both", "worst"):
                assert ("inference", dtype, 1, tokens, plan) in found
                assert ("inference", dtype, 4, tokens, plan) in found
                assert ("training", dtype, 4, tokens, plan) in found
    assert any(plan == "policy" and what == "inference" for what, _, _, _, plan in found)
    assert any(plan == "policy" and what == "training" for what, _, _, _, plan in found)
    assert not any(what == "training" and size == 1 for what, _, size, _, _ in found)


def test_the_arithmetic_of_a_row(result):
    for row in result[1]["rows"]:
        fastest = min(row["transformers_seconds"], row["own_dense_seconds"])
        assert row["measured"] == pytest.approx(row["seconds"] / fastest)
        assert row["realised"] == pytest.approx(row["theoretical"] / row["measured"])
        assert row["own_over_transformers"] == pytest.approx(row["own_dense_seconds"] / row["transformers_seconds"])
        assert row["examples_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert (row["policy_share"] is None) == (row["plan"] != "policy")
        if row["plan"] == "dense":
            assert row["theoretical"] == pytest.approx(1.0)
        if row["plan"] == "policy":
            assert 0 < row["policy_share"] < 1
        assert row["peak_mb"] > 0


def test_the_last_line_is_json_and_the_table_is_for_people(result):
    done, full = result
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["rows"] == brief(full["rows"])
    header = line["header"]
    assert header["torch"] == torch.__version__
    assert header["seed"] == 0
    assert header["threads"] == torch.get_num_threads()
    assert {"hardware", "transformers", "commit", "device", "settings"} <= set(header)
    assert "/" not in "".join(header["settings"]["models"]), "a result tells nothing of the machine's folders"
    assert "realised" not in done.stdout
    assert "inference, float32" in done.stderr
    table = [line for line in done.stderr.splitlines() if not line.startswith(("dht:", "left out:"))]
    assert max(map(len, table[1:])) <= 120
    assert set(full["parity"]) == {short_name(header["settings"]["models"][0])}
    assert all(0 <= value < 1e-3 for value in full["parity"][header["settings"]["models"][0]].values())


def test_models_of_other_tasks_are_timed(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(inputs, "TIMED_ROWS", 4)
    label = {"embedding": None, "regression": 0.5, "multi_label_classification": ["a", "b"]}
    for task, given in label.items():
        folder = tmp_path / task
        folder.mkdir()
        rows = [
            {"text": f"text number {i}", "label": [["a"], given][i % 2] if "multi" in task else given} for i in range(8)
        ]
        (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        names = {"embedding": ["embedding"], "regression": ["value"]}.get(task, ["a", "b"])
        head = {"head": "embedding"} if task == "embedding" else {"problem_type": task}
        for part in build(settings, names, head):
            part.save_pretrained(folder)
        asked = parse(
            data=str(folder), models=str(folder), batch="4", training_batch="4", tokens="9,mix", fractions="1.0,.5",
            dtype="float32", plans="both", what="inference,training",
        )  # fmt: skip
        found = bench(asked)["rows"]
        assert {(row["what"], row["plan"]) for row in found} == {
            (what, plan) for what in ("inference", "training") for plan in ("dense", "both")
        }


def test_what_cannot_be_measured_is_left_out_and_said(settings):  # noqa: F811
    news = []
    asked = parse(
        data=settings.data, models="preset:tiny", tokens="5", batch="2", what="inference", dtype="float32",
        fractions=".12", plans="depth,both,policy",
    )  # fmt: skip
    made = bench(asked, news.append)
    text = "\n".join(made["left_out"])
    assert "no CUDA device" in text
    assert "plans of a trained policy; give the folder of a dht train as --model" in text
    assert "depth at 0.12: the nearest that 4 layers x 4 units give is 0.2" in text
    assert "transformers has no counterpart of a preset" in text
    assert [row["plan"] for row in made["rows"]] == ["both"]
    assert made["rows"][0]["transformers_seconds"] is None
    assert made["rows"][0]["own_over_transformers"] is None
    print_speed(made, pytest.importorskip("rich.console").Console(stderr=True))


@pytest.mark.parametrize("kind", ["depth", "heads", "both", "worst"])
@pytest.mark.parametrize("fraction", [0.5, 0.26, 0.12])
@pytest.mark.parametrize("cost", [MINILM, BERT], ids=["minilm", "bert"])
def test_shapes_hit_the_fraction(kind, fraction, cost):
    if kind == "depth" and fraction == 0.12 and cost is MINILM:
        with pytest.raises(DHTError, match="depth at 0.12: the nearest that 6 layers x 12 units give is 0.17"):
            shape_for(kind, fraction, cost, 32)
        return
    shape = shape_for(kind, fraction, cost, 32)
    lengths, rows = torch.full((60,), 32), range(60)
    units = plan_of(shape, rows, cost.heads, torch.Generator().manual_seed(0), worst=kind == "worst").units
    spent = sum(cost.layer(lengths, layer.sum(-1), 32) * layer.any(-1) for layer in units.unbind(1))
    reached = float((spent + cost.exit(lengths)).sum() / cost.dense(lengths).sum())
    assert abs(reached - fraction) <= REACHED
    if kind == "depth":
        assert (units.sum(-1)[units.any(-1)] == cost.heads).all()
    if kind in ("heads", "worst"):
        assert units.any(-1).all()


def test_a_layer_with_a_dense_ffn_limits_what_heads_can_save():
    cost = CostModel(width=384, heads=12, ffn=1536, layers=6, classes=2, coupled=False)
    with pytest.raises(DHTError, match="heads at 0.26"):
        shape_for("heads", 0.26, cost, 32)
    assert shape_for("both", 0.5, cost, 32).depth < 6


def test_worst_plans_give_every_row_a_set_of_its_own():
    units = plan_of(shape_for("worst", 0.26, MINILM, 32), range(32), 12, torch.Generator().manual_seed(0), worst=True)
    for layer in range(6):
        assert len(units.units[:, layer].unique(dim=0)) == 32
    model = dynamic_model()
    batches = [batch()]
    at = planned("worst", 0.5, model, batches, 3, seed=0)
    assert not torch.equal(at(0, 0).plan.units, at(0, 1).plan.units), "no turn may find the slices of the last one"
    same = planned("heads", 0.5, model, batches, 3, seed=0)
    assert same(0, 0) is same(0, 1)


def test_a_prepared_plan_runs_as_the_plan_itself():
    model = dynamic_model()
    asked = {name: value for name, value in batch().items() if name != "labels"}
    plan = planned("worst", 0.5, model, [batch()], 1, seed=1)(0, 0).plan
    with torch.inference_mode():
        prepared = execute(model.encoder, PreparedPlan(plan), **asked)
        fixed = execute(model.encoder, FixedPlan(plan, reads_exits=False), **asked)
    assert torch.equal(prepared.units, fixed.units)
    torch.testing.assert_close(prepared.logits, fixed.logits)


@pytest.mark.parametrize("gradients", [False, True])
def test_parity_holds_for_every_family(gradients):
    for family in ("bert", "mpnet", "dht"):
        model = dynamic_model(family)
        rows = batch(pad=model.config.pad_token_id)
        policies = {"dense": DensePolicy(5), "worst": planned("worst", 0.5, model, [rows], 1, seed=0)(0, 0)}
        worst = check_parity(model, rows, policies, gradients=gradients)
        assert set(worst) == set(policies)
        assert max(worst.values()) < parity.GRADIENTS
        assert all(parameter.grad is None for parameter in model.parameters())


def test_no_number_while_the_executor_disagrees(settings, monkeypatch, capsys):  # noqa: F811
    right = Block._widen

    def wrong(self, source, units, slices):
        made = right(self, source, units, slices)
        return made if units is None else made * 1.01

    call = ["bench", "--data", settings.data, "--model", settings.model, "--tokens", 5, "--batch", 2]
    call += ["--what", "inference", "--fractions", ".5", "--dtype", "float32", "--plans", "heads"]
    monkeypatch.setattr(Block, "_widen", wrong)
    monkeypatch.setattr("sys.argv", ["dht", *map(str, call)])
    from dht.cli import main

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == "", "not one figure"
    last = said.err.splitlines()[-1]
    assert last.startswith("dht: error: bench: the fast executor disagrees with the reference on heads 0.5: logits by")
    assert "nothing is timed until they agree" in last


def test_wrong_gradients_are_refused_too(monkeypatch):
    model, rows = dynamic_model(), batch()
    right = parity.exit_loss
    monkeypatch.setattr(parity, "exit_loss", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    with pytest.raises(DHTError, match="dense: gradient of"):
        check_parity(model, rows, {"dense": DensePolicy(5)}, gradients=True)
    with pytest.raises(DHTError, match=r"disagrees with the reference on x by nan"):
        parity._compare("x", torch.ones(2), torch.tensor([1.0, torch.nan]), 1e-4)


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    order = []

    def contender(name):
        def run(index, turn):
            order.append((name, index, turn))
            account = Account(None, torch.ones(2))
            account.flops = torch.ones(2, dtype=torch.float64)
            account.dense_flops = 2 * account.flops
            return Call(Trace(account), policy_seconds=0.5)

        return Contender(name, run)

    times = take_turns([contender("dense"), contender("b")], [3, 9], 5, torch.device("cpu"), inference_dtype=None)
    assert [name for name, index, turn in order if (index, turn) == (0, 0)] == ["dense", "b"]
    assert [name for name, index, turn in order if (index, turn) == (0, 1)] == ["b", "dense"]
    assert order[-1] == ("b", 1, 6), "memory is taken on the largest batch, in a call of its own"
    assert len(times["b"].calls) == 10
    assert len(times["b"].batch_seconds) == 2
    assert (times["b"].flops, times["b"].dense_flops, times["b"].policy_seconds) == (20.0, 40.0, 1.0)


def test_the_faster_dense_model_is_the_denominator():
    times = {
        "transformers": Times([2.0], [2.0], 0.0, 0.0, 0.0, 4_000_000),
        "dense": Times([4.0], [4.0], 0.0, 1.0, 1.0, 0),
        "x": Times([1.0], [0.5, 1.0, 3.0], 0.25, 3.0, 12.0, 2_000_000),
    }
    contenders = [Contender(name, lambda index, turn: Call()) for name in times]
    contenders[2].learned = True
    dense, row = rows_of(contenders, times, 8, {"what": "inference"})
    assert (row["theoretical"], row["measured"], row["realised"]) == (0.25, 0.5, 0.5)
    assert (row["policy_share"], row["peak_mb"], row["examples_per_second"]) == (0.25, 2.0, 8.0)
    assert (row["p50_ms"], row["p95_ms"], row["p50_fraction"]) == (1000.0, 3000.0, 0.5)
    assert dense["measured"] == dense["own_over_transformers"] == 2.0


def test_rows_have_the_lengths_asked_for(minilm_path):
    from transformers import AutoTokenizer

    from dht.data import Split, TextData

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    data = TextData("two", None, None, Split(["a fine film", "dull"], [1, 0]), ["no", "yes"])
    rows = Rows(tokenizer, data, 128, seed=0)
    for size, tokens, batches in ((1, 9, 12), (4, 9, 16), (100, 9, 1)):
        made = rows.batches(size, tokens)
        assert len(made) == batches
        assert all(b["input_ids"].shape == (size, tokens) and b["attention_mask"].all() for b in made)
        assert (made[0]["input_ids"][:, 0] == tokenizer.cls_token_id).all()
        assert (made[0]["input_ids"][:, -1] == tokenizer.sep_token_id).all()
    assert rows.batches(4, "mix")[0]["attention_mask"].sum(-1).unique().tolist() == [3, 5]
    assert rows.odd()["input_ids"].shape == (7, 13)


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return second + 1

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_bad_options_are_told_at_once(settings, monkeypatch, capsys):  # noqa: F811
    call = ["bench", "--batch", "0,x", "--tokens", "2,long", "--fractions", "1.5,half", "--repeats", 3]
    call += ["--dtype", "int8", "--what", "nothing", "--plans", "best", "--device", "tpu"]
    line = refused(monkeypatch, capsys, *call)
    for text in (
        "--batch: got 0, allowed: 1 or more", "--batch: got 'x', allowed: whole numbers", "--tokens: got 2",
        "--tokens: got 'long', allowed: whole numbers or mix", "--fractions: got 1.5", "--fractions: got 'half'",
        "--repeats: got 3, allowed: 5 or more", "--dtype: got int8", "--what: got nothing", "--plans: got best",
        "--device: got tpu",
    ):  # fmt: skip
        assert text in line
    with pytest.raises(ConfigError, match="--tokens: got an empty list"):
        parse(tokens="").check()
    small = ["bench", "--data", settings.data, "--batch", 1, "--what", "inference"]
    assert "no size 'random:huge'; there are: random:bert-base" in refused(
        monkeypatch, capsys, *small, "--model", "random:huge"
    )
    assert "no preset 'preset:huge'" in refused(monkeypatch, capsys, *small, "--model", "preset:huge")
    assert "none" in refused(monkeypatch, capsys, "bench", "--data", "./none/here")


def test_rows_longer_than_the_model_takes(settings, tmp_path, monkeypatch, capsys):  # noqa: F811
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    line = refused(monkeypatch, capsys, "bench", "--data", settings.data, "--model", tmp_path, "--tokens", "41")
    assert "--tokens: got 41" in line
    assert "takes at most 40" in line


def test_bandits_alone_against_the_libraries(monkeypatch, tmp_path):
    monkeypatch.setattr(bandits, "BATCHES", 8)
    target = tmp_path / "bandits.json"
    done = invoke("bench", "--what", "bandits", "--json", target)
    assert done.exit_code == 0, done.output
    result = json.loads(target.read_text())
    found = result["bandits"]
    assert json.loads(done.stdout.splitlines()[-1])["bandits"]["times_as_fast"] == found["times_as_fast"]
    assert result["rows"] == []
    assert found["left_out"] in ([], ["vowpalwabbit"])
    assert len(result["left_out"]) == len(found["left_out"])
    ours, theirs = found["results"]["dht UCB"], found["results"]["mabwiser LinUCB"]
    assert found["times_as_fast"]["mabwiser LinUCB"] == ours["rows_per_second"] / theirs["rows_per_second"]
    for name, each in found["results"].items():
        assert len(each["runs"]) == 5
        assert each["last_regret"] < each["regret"] < 1.05 * found["random_regret"], f"{name} learns"
    assert abs(ours["regret"] - theirs["regret"]) < 0.1 * theirs["regret"], "they do the same"
    assert "mabwiser LinUCB" in done.stderr


def test_a_whole_training_against_transformers(settings, run_folder, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.setattr(whole, "WARM", 2)
    monkeypatch.setattr(whole, "TIMED", 3)
    target = tmp_path / "whole.json"
    call = ["bench", "--what", "whole", "--data", settings.data, "--model", settings.model]
    done = invoke(*call, "--fractions", "1,.5", "--json", target)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(target.read_text())["whole"]
    assert row["budget"] == 0.5
    assert row["dense_steps"] >= row["steps"] > 0
    for dense in ("transformers", "own_dense"):
        assert row[f"of_{dense}"] == row["train_seconds"] / row[f"{dense}_seconds"] > 0
    assert "a whole training" in done.stderr
    assert "none below 1" in refused(monkeypatch, capsys, *call, "--fractions", "1")
    for name in ("preset:tiny", "random:bert-base", run_folder):
        call[-1] = name
        assert f"--what whole: got {name}, allowed: a pretrained encoder" in refused(monkeypatch, capsys, *call)


def test_growth_table_and_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "Encoder", lambda **size: _Small(**size))
    monkeypatch.setattr(growth, "EXECUTOR_SWEEPS", {"layers": (2, 3), "tokens": (4, 8)})
    monkeypatch.setattr(growth, "BANDIT_SWEEPS", {"arms": (2, 4), "seen": (0, 1_500)})
    picture, target = tmp_path / "growth.svg", tmp_path / "growth.json"
    done = invoke("bench", "--growth", picture, "--json", target)
    assert done.exit_code == 0, done.output
    points = json.loads(target.read_text())["points"]
    assert json.loads(done.stdout.splitlines()[-1])["points"] == points
    assert len(points) == 8
    seen = [point for point in points if point["size"] == "seen"]
    assert seen[0]["state_bytes"] == seen[1]["state_bytes"], "memory does not grow with what was seen"
    assert all(point["learn"] > 0 and point["decide"] > 0 for point in points if point["part"] == "bandit")
    assert all(point["dense"] > 0 and point["plan"] > 0 for point in points if point["part"] == "executor")
    svg = picture.read_text()
    root = ET.fromstring(svg)
    marks = [e for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("class") == "mark" and len(e)]
    assert len(marks) == 16
    assert "href" not in svg
    assert "url(" not in svg
    assert growth_chart({"points": points}) == svg


def _Small(**size):
    return growth_encoder(**{"layers": 2, "heads": 4, "width": 16, "batch": 2, "tokens": 4} | size)


growth_encoder = growth.Encoder


def test_the_commit_is_that_of_the_source(monkeypatch):
    import dht.bench.header as header

    found = commit()
    assert found is None or len(found.removesuffix("-dirty")) >= 9
    monkeypatch.setattr(header.subprocess, "run", _no_git)
    assert commit() is None


def _no_git(*args, **kwargs):
    raise FileNotFoundError("git")
