"""The tools of `transformers` on a saved model: Auto classes, pipelines, `Trainer`, and what a push uploads."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from sklearn.metrics import accuracy_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from builders import batch, plain_model
from dht.hf.card import CARD, card, write_card
from dht.hf.convert import convert

REPORT = {
    "accuracy": 0.8765, "macro_f1": 0.8712, "full_depth_accuracy": 0.881, "num_examples": 321, "split": "test",
    "flops_fraction": 0.271, "time_fraction": 0.333, "policy_time_fraction": 0.051, "mean_layers": 2.4,
    "mean_heads": 7.5, "train_flops_fraction": 0.44, "train_time_fraction": float("nan"), "batch_size": 32,
    "dtype": "float32", "threads": 1, "torch": "2.13", "data": "owner/reviews", "model": "owner/encoder",
}  # fmt: skip


def test_auto_classes_load_a_saved_model(run, model, tokenizer, texts):
    assert AutoConfig.from_pretrained(run).model_type == "dht"
    loaded, again = AutoModelForSequenceClassification.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    inputs = again(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model(**inputs), loaded.eval()(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert len(set(ours.trace.layers.tolist())) > 1, "rows leave at different layers"


def test_pipelines_in_batches_and_one_by_one(run, model, tokenizer, texts):
    classify = pipeline("text-classification", model=str(run), device="cpu")
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    expected = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]
    for batch_size in (1, 7):
        answers = classify(texts, batch_size=batch_size)
        assert [answer["label"] for answer in answers] == expected
        scores = logits.softmax(-1).amax(-1).tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(scores, abs=1e-5)
    assert len(classify(texts[0], top_k=None)) == 3


class _Seen(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def _arguments(out, **options):
    return TrainingArguments(
        output_dir=str(out), use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, learning_rate=0.01,
        per_device_train_batch_size=8, **{"report_to": [], "save_strategy": "no"} | options,
    )  # fmt: skip


def test_plain_trainer_with_callbacks_and_tensorboard(model, rows, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason='curves need the extra "tensorboard"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    seen = _Seen()
    trainer = Trainer(
        model,
        _arguments(
            tmp_path, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch", report_to="tensorboard",
            logging_steps=1, load_best_model_at_end=True, metric_for_best_model="accuracy",
        ),
        train_dataset=rows, eval_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": accuracy_score(p.label_ids, p.predictions.argmax(-1))},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), seen],
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    assert seen.steps >= 6
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"]
    assert trainer.predict(rows).predictions.shape == (len(rows), 3)
    curves = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert {"train/loss", "train/learning_rate", "eval/accuracy"} <= set(curves.Tags()["scalars"])
    assert len(curves.Scalars("train/loss")) == seen.steps


def test_accumulated_batches_weigh_as_one(model, rows, tokenizer, tmp_path):
    """Two half batches make the step of a whole one: the loss is a mean, whatever `Trainer` accumulates."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.dropout = module.attention_dropout = 0.0
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends = []
    for size, accumulate in ((8, 1), (4, 2)):
        model.load_state_dict(start)
        options = {"optim": "sgd", "max_steps": 3, "gradient_accumulation_steps": accumulate}
        arguments = _arguments(tmp_path, train_sampling_strategy="sequential", lr_scheduler_type="constant", **options)
        arguments.per_device_train_batch_size = size
        Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer)).train()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    moved = 0
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-6, rtol=1e-4)
        moved += not torch.equal(value, start[name])
    assert moved > 20


def test_a_push_uploads_what_loads_back(run, model, monkeypatch, tmp_path):
    write_card(run, model, REPORT)
    hub = tmp_path / "hub"

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            target = hub / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    for module in ("transformers.utils.hub", "transformers.modeling_utils", "transformers.tokenization_utils_base"):
        for name, double in (("create_commit", create_commit), ("create_repo", create_repo)):
            bound = lambda *args, double=double, **kwargs: double(None, *args, **kwargs)  # noqa: E731
            monkeypatch.setattr(f"{module}.{name}", bound, raising=False)
    AutoModelForSequenceClassification.from_pretrained(run).push_to_hub("me/mine")
    AutoTokenizer.from_pretrained(run).push_to_hub("me/mine")
    pushed = {path.name for path in (hub / "me/mine").iterdir()}
    assert pushed >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert not [name for name in pushed if name.endswith((".py", ".bin", ".pt", ".pkl"))]
    back = AutoModelForSequenceClassification.from_pretrained(hub / "me/mine").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(**batch()).logits, model(**batch()).logits)
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, back.policy.state_dict()[name]), name


def test_the_card_holds_the_measured_figures(run, model):
    write_card(run, model, REPORT)
    loaded = ModelCard.load(run / CARD)
    assert not (run / f".{CARD}").exists()
    assert loaded.data.library_name == "transformers"
    assert loaded.data.pipeline_tag == "text-classification"
    assert (loaded.data.base_model, loaded.data.datasets) == ("owner/encoder", ["owner/reviews"])
    measured = {result.metric_type: result.metric_value for result in loaded.data.eval_results}
    assert measured == {"accuracy": 0.8765, "f1": 0.8712}
    for text in (
        "| accuracy | 0.8765 |",
        "| FLOPs, fraction of the dense model | 0.271 |",
        "321 examples of `owner/reviews` (test)",
    ):
        assert text in loaded.text
    assert "`bad`, `so so`, `good`" in loaded.text
    assert "training seconds" not in loaded.text, "a figure that was not measured is left out"
    assert "nan" not in loaded.text


def test_local_names_are_no_hub_names(model, tmp_path):
    (tmp_path / "reviews").mkdir()
    (tmp_path / "encoder").mkdir()
    text = card(model, {"data": str(tmp_path / "reviews"), "model": str(tmp_path / "encoder"), "accuracy": 0.9}, "mine")
    assert str(tmp_path) not in text, "where it lies is nobody's business"
    assert "Started from `encoder`. Trained on `reviews`" in text
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.datasets is None
    assert data.eval_results[0].dataset_name == "reviews"
    assert ModelCard(card(model, {"data": "vader", "model": "minilm"}, "mine")).data.eval_results is None


def test_a_card_of_what_was_not_measured(model):
    """As `DHTClassifier.save` knows it."""
    text = card(model, {"train_flops_fraction": 0.5}, "mine")
    assert "Trained for a budget of" in text
    assert "Nothing was measured on held-out examples." in text
    assert "| training FLOPs, fraction of dense training | 0.500 |" in text


def test_the_card_says_how_to_load_it(run, model, tokenizer, monkeypatch):
    """Its code runs, once the name it suggests is a folder."""
    model.policy.fix_curve(torch.tensor([1.0, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64))
    model.save_pretrained(run)
    write_card(run, model, REPORT)
    text = (run / CARD).read_text()
    assert "fractions from 0.20 to 0.80" in text
    folder = run.parent / "OWNER" / "mine"
    shutil.copytree(run, folder)
    monkeypatch.chdir(run.parent)
    space: dict[str, object] = {}
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], space)
    assert float(space["classify"].model.policy.price) != float(model.policy.price)
    assert Path("OWNER/mine").is_dir()


@pytest.mark.parametrize(
    ("settings", "report", "told"),
    [
        (
            {"problem_type": "multi_label_classification"},
            {"micro_f1": 0.8, "subset_accuracy": 0.7, "full_depth_micro_f1": 0.9},
            ["A text classifier with any number of labels", "| micro F1 | 0.8000 |", "Labels: `", "top_k=None"],
        ),
        (
            {"num_labels": 1, "problem_type": "regression", "label_std": 5.0},
            {"accuracy": None, "r2": 0.8, "mae": 0.25, "full_depth_r2": 0.9},
            ["A text regression model that decides", "| R2 | 0.8000 |", "| mean absolute error | 0.25 |"],
        ),
        (
            {"num_labels": 1, "head": "embedding"},
            {"cosine": 0.8, "full_depth_cosine": 0.9},
            ["A sentence embedder that decides", "| cosine to the full model's vectors | 0.8000 |", "Embedder.load("],
        ),
    ],
)
def test_cards_of_other_tasks(settings, report, told, tokenizer, tmp_path, monkeypatch):
    model = convert(plain_model("bert"), **settings)
    folder = tmp_path / "OWNER" / "mine"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, model, REPORT | dict.fromkeys(("accuracy", "macro_f1")) | report)
    text = (folder / CARD).read_text()
    for part in told:
        assert part in text
    assert ("Labels:" in text) == ("num_labels" not in settings)
    data = ModelCard(text).data
    assert data.pipeline_tag == ("sentence-similarity" if "head" in settings else "text-classification")
    assert {0.8} <= {result.metric_value for result in data.eval_results}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: name)
    space: dict[str, object] = {}
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], space)
    if "label_std" in settings:
        expected = model.eval()(**tokenizer("a text", return_tensors="pt")).logits.item()
        assert space["classify"]("a text")[0]["score"] == pytest.approx(expected, abs=1e-4), "a number, not a share"
