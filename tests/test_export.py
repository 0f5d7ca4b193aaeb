"""Exports held against the model: the dense one in transformers, a plan in one graph, the policy as a chain."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from builders import batch, dynamic_model, plain_model, random_plan
from dht.cli import app
from dht.errors import CheckpointError, ConfigError, DHTError
from dht.export import chain, dense, static
from dht.export.graphs import LayerGraph, Padded, PlanGraph
from dht.export.onnx_file import write_onnx
from dht.export.run import export, told
from dht.hf.convert import convert
from dht.hf.families import FAMILIES
from dht.load import load_run
from dht.model.packed import Packed
from dht.onnx import POLICY_FILE, ChainRunner
from dht.plan import Plan
from dht.policy.baselines import DensePolicy, FixedPlan
from dht.predict import predict
from dht.train import save_run
from test_docs import BLOCKS
from test_train import encoder, finished, sentences, settings  # noqa: F401

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OTHER_TASKS = {
    "multi": {"problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "label_mean": 40.0, "label_std": 5.0},
    "embedding": {"num_labels": 1, "head": "embedding"},
}
TEXTS = ["what a lovely film", "dreadful", "so so, " * 30, "the plot is thin but the songs are great", "no"]


def arrays(rows):
    return {name: part.numpy() for name, part in rows.items() if name != "labels"}


# Graphs as modules


@pytest.mark.parametrize("family", [*FAMILIES, "dht"])
@pytest.mark.parametrize("ffn", ["coupled", "dense"])
def test_a_padded_plan_is_the_executors(family, ffn):
    model = dynamic_model(family, ffn=ffn)
    units = random_plan(1, seed=3).units[0]
    units[0], units[1] = torch.tensor([True, False, True, False, False]), True
    rows = batch(pad=model.config.pad_token_id or 0)
    del rows["labels"]
    with torch.no_grad():
        got = PlanGraph(model.encoder, units)(**rows)
        expected = model(**rows, policy=alike(units, len(got))).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def alike(units, rows):
    """The plan that runs `units` for every row."""
    return FixedPlan(Plan(units[None].expand(rows, -1, -1)), reads_exits=False)


@pytest.mark.parametrize("pooling", ["attention", "mean", "cls"])
def test_every_pooling_with_padding_on_either_side(pooling):
    model = dynamic_model("bert", pooling=pooling)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    states = torch.randn(3, 4, 60)
    rows = Padded(states, mask)
    packed = rows.states[mask.bool()]
    plain = Packed(packed, mask.sum(-1), torch.arange(3))
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.exit(2, rows), model.encoder.exit(2, plain), atol=1e-5, rtol=1e-5)


def test_a_narrow_graph_holds_the_chosen_units_alone():
    model = dynamic_model("bert")
    graph = LayerGraph(model.encoder, 1, torch.tensor([True, False, False, True, False]))
    assert graph.block.qkv_weight.shape[0] == graph.block.up_weight.shape[0] == 2
    assert torch.equal(graph.block.out_weight, model.encoder.blocks[0].out_weight[[0, 3]])
    assert model.encoder.blocks[0].qkv_weight.shape[0] == 5


# Dense


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_classifier_is_plain_transformers(family, encoder, tmp_path):  # noqa: F811
    """A converted classifier keeps its head, which plain transformers then has again."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = convert(plain_model(family, vocab_size=len(tokenizer)), budget=0.5).eval()
    save_run(tmp_path / "run", model, tokenizer, {})
    report = export(tmp_path / "run", "transformers", tmp_path / "dense")
    assert report["head"]
    assert report["max_difference"] < 1e-4
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert plain.config.model_type == family
    rows = AutoTokenizer.from_pretrained(tmp_path / "dense")(
        TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**rows, policy=DensePolicy(5)).logits
        torch.testing.assert_close(plain(**rows).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_exit_that_no_family_has_is_left_out_and_said(finished, tmp_path):  # noqa: F811
    report = export(finished[0], "transformers", tmp_path / "dense")
    assert not report["head"]
    assert "the encoder alone: the last exit reads all tokens" in told(report)
    assert AutoConfig.from_pretrained(tmp_path / "dense").architectures == ["BertModel"]
    model, _ = load_run(finished[0])
    plain = AutoModel.from_pretrained(tmp_path / "dense")
    block = plain.encoder.layer[1].intermediate.dense.weight
    assert torch.equal(block, model.encoder.blocks[1].up_weight.flatten(0, 1))


# A plan in one graph


def test_a_plan_is_one_file_that_agrees_with_torch(finished, tmp_path):  # noqa: F811
    out = tmp_path / "deep" / "plan.onnx"
    call = ["export", str(finished[0]), "--format", "onnx", "--plan", "2x3", "--out", str(out)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["layers"], report["units"]) == (2, 3)
    assert report["max_difference"] < 1e-4
    assert set(report["one_row_ms"]) == set(report["32_rows_ms"]) == {"onnxruntime", "torch"}
    assert min(report["one_row_ms"].values()) > 0
    assert "onnxruntime" in result.stderr
    assert "ms" in result.stderr
    assert [path.name for path in out.parent.iterdir()] == ["plan.onnx"], "one file, weights included"

    model, tokenizer = load_run(finished[0])
    policy = static.plan_of(model, "2x3")
    rows = tokenizer(TEXTS, ["and a second text"] * len(TEXTS), padding=True, truncation=True, return_tensors="pt")
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, arrays(rows))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(**rows, policy=policy).logits, atol=1e-4, rtol=1e-4)


def test_plans_by_shape_and_by_budget(finished):  # noqa: F811
    model, _ = load_run(finished[0])
    for plan, (layers, units) in {"3x4": (3, 4), "1": (3, 4), "1.0": (3, 4), "0.17": (1, 2), ".17": (1, 2)}.items():
        policy = static.plan_of(model, plan)
        assert (policy.layers, int(policy.sets[0].sum())) == (layers, units), plan
    for plan in ("4x1", "1x5", "0x1", "0", "2", "x", "nan", "", "1x2x3"):
        with pytest.raises(
            DHTError, match=r"--plan: got .*; allowed: LxK with L in 1..3 and K in 1..4, e.g. 3x4, or a"
        ):
            static.plan_of(model, plan)


def test_a_graph_that_disagrees_is_not_written(finished, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(static, "TOLERANCE", -1.0)
    with pytest.raises(DHTError, match=r"x.onnx: onnxruntime and torch disagree by .* nothing was written: report"):
        export(finished[0], "onnx", tmp_path / "x.onnx", plan="1x1")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_cannot_be_traced_or_run_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(
        DHTError, match=r"torch .* cannot trace the model \(no such operator\); report this with the ver"
    ):
        write_onnx(torch.nn.Identity(), {"states": torch.ones(2, 3)}, ["out"], tmp_path / "x.onnx")

    class Refusing:
        def run(self, *_):
            raise RuntimeError("bad node\nmore")

    model = dynamic_model()
    with pytest.raises(DHTError, match=r"export to ONNX: onnxruntime cannot run the graph \(bad node\)$"):
        static._difference(model, static.plan_of(model, "1x1"), Refusing(), chain.sample_rows(model, False, 2, 4))


# The policy as a chain


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("chain") / "chain"
    return out, export(finished[0], "onnx-chain", out, max_length=48)


def test_the_chain_answers_as_torch_row_by_row(finished, exported):  # noqa: F811
    out, report = exported
    assert report["rows_alike"] == report["rows_checked"] == 128
    assert report["max_difference"] < 1e-4
    assert report["graphs"] == len(list(out.glob("*.onnx")))
    model, tokenizer = load_run(finished[0])
    runner = ChainRunner(out)
    depths = set()
    for budget in (0.1, 0.4, 0.8, 1.0):
        runner.set_budget(budget)
        model.policy.set_budget(budget)
        assert runner.price == pytest.approx(float(model.policy.price), abs=1e-12)
        ours = list(predict(model, tokenizer, TEXTS, max_length=48))
        theirs = list(runner.predict(TEXTS, batch_size=2))
        for one, other in zip(ours, theirs, strict=True):
            assert {key: one[key] for key in ("label", "layers", "heads")} == {
                key: other[key] for key in ("label", "layers", "heads")
            }
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
            depths.add(one["layers"])
    assert len(depths) > 1, "rows leave at different layers"


class InTorch:
    """A session that runs the module itself: the runner is then tested without the minutes that tracing takes."""

    def __init__(self, module):
        self.module = module

    def run(self, _, fed):
        with torch.no_grad():
            outputs = self.module(**{name: torch.from_numpy(part) for name, part in fed.items()})
        return [part.numpy() for part in (outputs if isinstance(outputs, tuple) else (outputs,))]


@pytest.fixture
def in_torch(monkeypatch):
    modules = {}
    monkeypatch.setattr(chain, "write_onnx", lambda module, *rest: modules.update({rest[-1].name: module.eval()}))
    monkeypatch.setattr(ChainRunner, "_session", lambda self, name: InTorch(modules[name]))


@pytest.mark.parametrize("family", ["bert", "modernbert", "dht"])
@pytest.mark.parametrize("search", ["tree", "integrated"])
def test_chains_decide_as_the_policy_does(family, search, tmp_path, minilm_path, in_torch):
    """Random rewards and random head sets: every arm is taken by some row."""
    model = dynamic_model(family, search=search, wide_from=2, budget=0.5, exit_memory=0.5 * (search == "tree"))
    generator = torch.Generator().manual_seed(1)
    policy = model.policy
    with torch.no_grad():
        sets = torch.stack([torch.randperm(5, generator=generator) < width for width in policy.widths])
        policy.head_sets.copy_(sets[None, :, None].expand_as(policy.head_sets))
    types = family == "bert"
    report = chain.export_chain(model, AutoTokenizer.from_pretrained(minilm_path), types, 32, tmp_path / "c")
    assert report["rows_alike"] == report["rows_checked"]
    assert report["graphs"] == 1 + 3 + 3 + 1
    rows = chain.sample_rows(model, types, 64, 20)
    met, moment = set(), policy.numbers.moment
    for _ in range(8):
        with torch.no_grad():
            moment.copy_(300 * torch.randn(moment.shape, generator=generator, dtype=torch.float64))
            policy.numbers.invalidate()
            policy.price.fill_(torch.rand((), generator=generator))
            trace = model(**rows).trace
        save_file(chain._policy_arrays(policy), tmp_path / "c" / POLICY_FILE)
        runner = ChainRunner(tmp_path / "c")
        runner.price = float(policy.price)
        result = runner.run(arrays(rows))
        assert (result.heads == trace.units.sum(-1).numpy()).all()
        assert (result.layers == trace.layers.numpy()).all()
        np.testing.assert_allclose(result.logits, trace.logits.numpy(), atol=1e-4)
        met |= set(map(tuple, result.heads.tolist()))
    assert len(met) > 4, "plans of many shapes were taken"
    alone = runner.run({name: part[5:6] for name, part in arrays(rows).items()})
    np.testing.assert_allclose(alone.logits[0], result.logits[5], atol=1e-4)
    empty = {name: np.zeros_like(part) for name, part in arrays(rows).items()}
    with pytest.raises(ValueError, match="row 0 of the batch has no real token"):
        runner.run(empty)


def test_a_chain_that_disagrees_is_not_written(tmp_path, minilm_path, in_torch, monkeypatch):
    monkeypatch.setattr(chain, "AGREEING", 2.0)
    with pytest.raises(DHTError, match=r"of 128 rows \d+ take the same layers in onnxruntime as in torch, and their"):
        chain.export_chain(dynamic_model(), AutoTokenizer.from_pretrained(minilm_path), True, 32, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_broken_chains_are_refused(exported, tmp_path):
    out, _ = exported
    with pytest.raises(ConfigError, match=r"budget: got 0, allowed: a number in \(0, 1\]"):
        ChainRunner(out, budget=0)
    with pytest.raises(CheckpointError, match=r"chain.json: cannot be read \(.*\); give a folder of dht export --f"):
        ChainRunner(tmp_path)
    copy = shutil.copytree(out, tmp_path / "copy")
    graph = next(copy.glob("layer_1*.onnx"))
    graph.write_bytes(graph.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"copy: cannot load the chain \(.*\); export it again"):
        ChainRunner(copy)
    facts = json.loads((copy / "chain.json").read_text())
    (copy / "chain.json").write_text(json.dumps(facts | {"version": 99}))
    with pytest.raises(CheckpointError, match=r"chain.json: version 99, this dht reads up to 4"):
        ChainRunner(copy)


def test_the_chain_of_the_docs_runs(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported[0].parent)
    exec(next(block for block in BLOCKS if "ChainRunner" in block), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_serving_a_chain_needs_no_torch(exported):
    code = (
        "import sys; sys.modules['torch'] = None; from dht.onnx import ChainRunner;"
        f"print(next(ChainRunner({str(exported[0])!r}).predict(['a film']))['label'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() in ("negative", "positive"), done.stderr


# Other tasks


@pytest.mark.parametrize("task", ["multi", "regression", "embedding"])
def test_plans_of_other_tasks_are_the_executors_and_go_back_to_transformers(task, minilm_path, tmp_path):
    model = convert(plain_model("bert"), **OTHER_TASKS[task]).eval()
    if task == "embedding":
        with torch.no_grad():
            for head in model.encoder.exits[:-1]:
                head.dense.weight.add_(torch.randn(60, 60) * 0.1)
    rows = batch()
    del rows["labels"]
    units = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    with torch.no_grad():
        got = PlanGraph(model.encoder, units)(**rows)
        expected = model(**rows, policy=alike(units, len(got))).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    report = dense.export_dense(model, AutoTokenizer.from_pretrained(minilm_path), True, tmp_path / "dense")
    assert report["max_difference"] < 1e-4
    assert "head" not in report if task == "embedding" else "head" in report
    assert "classifier" not in told(report | {"out": "x", "format": "transformers", "megabytes": 1}) or "head" in report


@pytest.mark.parametrize("task", ["multi", "regression", "embedding"])
def test_a_chain_reads_single_labels(task, minilm_path, tmp_path):
    model = convert(plain_model("bert"), **OTHER_TASKS[task])
    with pytest.raises(DHTError, match=f"the model is for {model.task.name}, and the chain reads exits of single labe"):
        chain.export_chain(model, AutoTokenizer.from_pretrained(minilm_path), True, 32, tmp_path / "c")


# Bad calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf"}, "--format: got 'gguf', allowed: transformers, onnx, onnx-chain"),
        ({"format": "onnx-chain", "plan": "1x1"}, "--plan: only --format onnx takes a fixed plan"),
        ({"format": "onnx-chain", "max_length": 1}, "--max-length: got 1, allowed: 3 or more"),
        ({"format": "onnx", "out": "folder"}, "is already there; give another place, or --overwrite"),
        ({"format": "onnx", "out": "folder", "overwrite": True}, "is a folder; --format onnx writes one file, e.g."),
        ({"format": "onnx-chain", "out": "file", "overwrite": True}, "is a file; --format onnx-chain writes a folder"),
        ({"format": "transformers", "out": ".", "overwrite": True}, "holds the run itself; give another place"),
    ],
)
def test_bad_calls_are_one_line(finished, tmp_path, options, message):  # noqa: F811
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    out = options.pop("out", "new")
    place = finished[0].parent if out == "." else tmp_path / out
    with pytest.raises(DHTError, match=message):
        export(finished[0], options.pop("format"), place, **options)
    assert finished[0].exists()


def test_several_head_sets_are_refused(tmp_path, minilm_path):
    model = dynamic_model("bert", head_sets=2)
    with pytest.raises(DHTError, match=r"--format onnx-chain: the model chooses among head_sets=2 sets for every wid"):
        chain.export_chain(model, AutoTokenizer.from_pretrained(minilm_path), True, 32, tmp_path / "c")


def test_without_onnx_the_error_says_which_extra(finished, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        DHTError, match=r'needs onnxscript, which is not installed; run pip install "dht-trans.*\[onnx\]"'
    ):
        export(finished[0], "onnx", tmp_path / "x.onnx")
