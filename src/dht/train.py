"""`dht train`: data and encoder in, a run folder out."""

from __future__ import annotations

import copy
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ._files import explained, write_json
from .adamw import optimizer_of, update
from .calibrate import calibrate
from .checkpoints import complete_checkpoints, newest_whole, remove_incomplete
from .config import FASTEST, TrainSettings
from .crop import Crop
from .data import TextData, balanced_weights, load_data
from .distributed import join, rank, ranks, wait
from .embed import with_embeddings
from .errors import DHTError
from .guarded import GuardedTrainer
from .hf.card import CARD, write_card
from .hf.convert import FAMILIES, export
from .hf.modeling import DHTForSequenceClassification
from .imitation import ROWS, imitate
from .lexical import CLASSES, FILTERS, PAIRS, worded, words_cost
from .load import PRESETS, all_told_of, build, by_length, collate, device_of, tokenise
from .manifest import MANIFEST, MODEL_FILES, TOKENIZER_FILES, write_manifest
from .measure import autocast, report_of, run_policy, split_labels, time_policy
from .policy.baselines import DensePolicy
from .spending import SHORT, Spending, divide
from .task import Embedding, Regression, SingleLabel, TokenTags
from .training import FEEDBACK_EVERY, DHTTrainer, Ledger, finish

CALIBRATION_BATCHES = 8
CALIBRATION = 3.0
"""FLOPs of calibrating with a batch, in units of its dense forward."""
FEEDBACK_ROWS = 1024
TIMED_STEPS = 12

Say = Callable[[str], None]
Rows = dict[str, list[dict[str, Any]]]
MakeTrainer = Callable[
    [TrainSettings, DHTForSequenceClassification, PreTrainedTokenizerBase, Rows, Path, bool], Trainer
]
"""Settings, model, tokenizer, rows, folder of checkpoints and whether a checkpoint is resumed -> a trainer."""


@dataclass
class Fitted:
    """A trained model that was neither evaluated nor saved.

    Attributes:
        rows: the tokenised train and validation splits.
        steps: batches trained on. dense_steps: those that the full model would be trained on.
        history: what the ledger noted over training; empty for dense training.
        report: resumed, refused_updates, train_flops_fraction, train_seconds, train_cpu_seconds (of this process).
    """

    model: DHTForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    data: TextData
    rows: Rows
    steps: int
    dense_steps: int
    history: list[dict[str, float]]
    report: dict[str, Any]


def train(
    settings: TrainSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
    data: TextData | None = None,
) -> dict[str, Any]:
    """Trains, evaluates on the test split, fills `settings.out`, and returns the report.

    Started by `accelerate launch` or `torchrun`, all ranks train together; only the first one evaluates, writes and
    speaks, and the others return nothing.

    Args:
        data: train, validation and perhaps test split; None = loaded as `settings.data` says.
        resume: go on from the last complete checkpoint in `settings.out`.
        overwrite: replace a run that is already there.
        say: called with a line of news now and then.

    Raises:
        DHTError: bad settings or data, or a run in the way.
        KeyboardInterrupt: passed on; the last checkpoint stays usable.
    """
    fitted = fit(settings, resume=resume, overwrite=overwrite, say=say, data=data)
    if rank():
        return {}
    model, tokenizer, data, report = fitted.model, fitted.tokenizer, fitted.data, fitted.report
    if fitted.history:
        write_json(settings.out / "history.json", fitted.history)
    say("timing dense training steps on the same batches")
    dense = report["train_seconds"]
    if not settings.dense:
        batches = _sample(fitted.rows["train"], tokenizer, settings)
        dense = dense_step_seconds(model, batches, settings) * fitted.dense_steps
    report |= {"dense_train_seconds": dense, "train_time_fraction": report["train_seconds"] / dense}
    report |= evaluate_run(model, tokenizer, data, settings, split="test" if data.test else "validation")
    save_run(settings.out, model, tokenizer, report)
    return report


def fit(
    settings: TrainSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
    make: MakeTrainer | None = None,
    options: Mapping[str, Any] | None = None,
    data: TextData | None = None,
) -> Fitted:
    """Trains and readies the policy for serving; the test split is not looked at.

    Args:
        resume, overwrite, say: as for `train`.
        make: makes the trainer; None = dense or dynamic, as the settings say.
        options: fields of `DHTConfig` beyond those that the settings have.
        data: train and validation split; None = loaded as `settings.data` says.

    Raises:
        DHTError: as for `train`.
    """
    settings.check()
    device = device_of(settings.device)
    checkpoints = settings.out / "checkpoints"
    join(settings.device == "cpu")
    if rank():
        say = lambda _: None  # noqa: E731
    start = None
    if resume:
        start, problems = newest_whole(checkpoints)
        for problem in problems:
            say(f"{problem}; an earlier checkpoint is whole")
        settings.check_resumed(all_told_of(settings.out))
    wait()  # every rank has found the checkpoint
    if not rank():
        if start:
            remove_incomplete(checkpoints)
        else:
            claim_folder(settings.out, overwrite)
    wait()
    data = data or load_data(
        settings.data, text_column=settings.text_column, label_column=settings.label_column, seed=settings.seed,
        splits=("train", "validation"), optional=("test",), task=settings.task, limit=settings.limit,
    )  # fmt: skip
    for note in data.notes:
        say(note)
    set_seed(settings.seed)
    assert data.train is not None
    whole = data.train.pairs is not None or data.task in (TokenTags.name, Embedding.name)
    options = {**(options or {}), **task_options(data)}
    if _reads_words(settings, data):
        options.setdefault("lexical_pairs", PAIRS)
        options.setdefault("lexical_filters", FILTERS)
    if data.task == Embedding.name and settings.dense:
        raise DHTError("--dense: with --task embedding the full model is what is learned from; leave --dense out")
    if data.task == Embedding.name and settings.model in PRESETS:
        raise DHTError(f"--model: with --task embedding it is what is learned from, and {settings.model} knows nothing")
    if settings.class_weights == "balanced":
        if data.task != SingleLabel.name:
            raise DHTError(f"--class-weights: got 'balanced', but the task is {data.task}; it needs one class a row")
        options["class_weights"] = balanced_weights(data.train.labels, len(data.label_names))
    model, tokenizer = build(settings, data.label_names, options)
    cast(nn.Module, model).to(device)
    if data.task == Embedding.name:
        say("embedding all texts with the full model: what it says is what is learned")
        data = with_embeddings(data, model, tokenizer, settings.max_length)
    rows = {name: tokenise(tokenizer, getattr(data, name), settings.max_length) for name in ("train", "validation")}
    if not rank():
        write_json(settings.out / "run.json", settings.as_json())
    if whole:  # of a pair a window loses what is compared, and the other labels speak of all words
        settings = replace(settings, crop=0)
    longer = sum(len(row["input_ids"]) > settings.crop for row in rows["train"]) if settings.crop else 0
    if longer and not settings.dense:
        say(
            f"{longer} of {len(rows['train'])} training texts have more than {settings.crop} tokens: most steps read a"
            " window of them (--crop 0 reads them whole)"
        )
    if start:
        say(f"resuming from {start}")

    started, worked = time.perf_counter(), time.process_time()
    make = make or (dense_trainer if settings.dense else dynamic_trainer)
    trainer = make(settings, model, tokenizer, rows, checkpoints, bool(start))
    _run(trainer, checkpoints, start)
    if isinstance(trainer, DHTTrainer):
        finish(trainer, _feedback(settings, tokenizer, rows["validation"], device), settings.budget)
    ledger: Ledger | None = getattr(trainer, "ledger", None)
    refusals = trainer.refusals if isinstance(trainer, GuardedTrainer) else None
    if refusals and refusals.count:
        say(f"{refusals.count} updates were refused: {'; '.join(refusals.reasons)}")
    wanted = settings.train_budget or settings.budget
    if ledger and ledger.fraction > 1.1 * wanted:
        say(
            f"training took {ledger.fraction:.2f} of dense training, not {wanted:g}: on so few rows calibration and"
            " held-out rows leave little for steps, and a few are taken all the same"
        )
    report = {
        "resumed": bool(start),
        "refused_updates": refusals.count if refusals else 0,
        "train_flops_fraction": ledger.fraction if ledger else 1.0,
        "train_seconds": time.perf_counter() - started,
        "train_cpu_seconds": time.process_time() - worked,
    }
    steps = trainer.state.global_step * settings.accumulate
    smaller = trainer.args.per_device_train_batch_size / settings.batch_size
    dense_steps = round(steps * smaller / ledger.share) if ledger else steps
    return Fitted(model, tokenizer, data, rows, steps, dense_steps, ledger.history if ledger else [], report)


def task_options(data: TextData) -> dict[str, Any]:
    """The fields of `DHTConfig` that the labels decide."""
    if data.task == SingleLabel.name:
        return {}
    if data.task == Embedding.name:
        return {"head": "embedding"}
    if data.task == TokenTags.name:
        return {"head": "token"}
    options: dict[str, Any] = {"problem_type": data.task}
    if data.task == Regression.name:
        assert data.train is not None
        options |= {"label_mean": mean(data.train.labels), "label_std": pstdev(data.train.labels)}
    return options


def _reads_words(settings: TrainSettings, data: TextData) -> bool:
    """True if this training has a lexical exit."""
    single = data.task == SingleLabel.name and len(data.label_names) <= CLASSES
    assert data.train is not None
    return settings.lexical and not settings.dense and settings.search == "tree" and single and not data.train.pairs


def _run(trainer: Trainer, checkpoints: Path, start: Path | None) -> None:
    """Trains; when a checkpoint cannot be written, the half of it is removed and the last whole one is named.

    Raises:
        DHTError: no space, no permission.
    """
    try:
        with explained(checkpoints):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except DHTError as error:
        if not rank():
            remove_incomplete(checkpoints)
        whole = complete_checkpoints(checkpoints)
        if not whole:
            raise
        raise DHTError(f"{error}; {whole[-1]} is whole: then go on with the same command and --resume") from None


def claim_folder(out: Path, overwrite: bool) -> None:
    """Makes `out` ready for a new run; an earlier run there is removed only if asked.

    Raises:
        DHTError: a file or a run is in the way, or the folder cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise DHTError(f"--out: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise DHTError(f"--out: {out} already holds files; give another folder, --resume to go on, or --overwrite")
        files = ("report.json", "history.json", "run.json", "fitted.json", CARD, "model.safetensors", "config.json")
        for name in (MANIFEST, "checkpoints", *files):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DHTError(f"--out: cannot make {out}: {error.strerror}; choose another folder") from error


def arguments(settings: TrainSettings, checkpoints: Path) -> TrainingArguments:
    """The `Trainer` arguments that every training shares, whatever it trains."""
    saving: dict[str, Any] = {"save_strategy": "epoch"}
    if settings.save_every:
        saving = {"save_strategy": "steps", "save_steps": settings.save_every}
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        optim="adamw_torch_fused",
        seed=settings.seed,
        bf16=settings.dtype == "bfloat16",
        use_cpu=settings.device == "cpu" or not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_total_limit=2,
        logging_steps=50,
        report_to=[],
        **saving,
    )


def dense_trainer(
    settings: TrainSettings,
    model: DHTForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    checkpoints: Path,
    resuming: bool,
) -> Trainer:
    """Trains the plain full model: one exit, no policy."""
    model.active_policy = DensePolicy(model.config.num_attention_heads)
    trainer = GuardedTrainer(
        model, arguments(settings, checkpoints), train_dataset=rows["train"],
        data_collator=lambda batch: collate(tokenizer, batch),
    )  # fmt: skip
    trainer.model_accepts_loss_kwargs = False
    return trainer


def dynamic_trainer(
    settings: TrainSettings,
    model: DHTForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    checkpoints: Path,
    resuming: bool,
) -> DHTTrainer:
    """Trains weights and policy together; calibrates the model first unless a run is resumed."""
    feedback = _feedback(settings, tokenizer, rows["validation"], model.device)
    spending = spending_of(settings, model, tokenizer, rows, feedback)
    ledger = Ledger() if resuming else calibrated(settings, model, tokenizer, rows)
    ledger.share = spending.share
    if not resuming:
        ledger.executed += worded(model, tokenizer, rows["train"], feedback) * ranks()
        ledger.executed += imitated(settings, model, tokenizer, rows, spending.imitation / ranks()) * ranks()
    told = arguments(settings, checkpoints)
    told.max_steps, told.per_device_train_batch_size = spending.steps, spending.rows
    told.learning_rate *= min(FASTEST, model.policy.heads / model.policy.widths[0])
    trainer = DHTTrainer(
        model,
        told,
        train_dataset=rows["train"],
        data_collator=lambda batch: collate(tokenizer, batch),
        schedule=spending.schedule,
        feedback=lambda step: feedback[step % len(feedback)],
        feedback_every=FEEDBACK_EVERY * settings.batch_size // spending.rows,
        ledger=ledger,
        crop=Crop(settings.crop, spending.cropped, settings.seed) if spending.cropped else None,
    )
    trainer.drops = settings.epochs * spending.share >= SHORT
    return trainer


def spending_of(
    settings: TrainSettings,
    model: DHTForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    feedback: Sequence[dict[str, Tensor]],
) -> Spending:
    """How this training divides its budget: from its rows' lengths alone, so that a resumed run finds the same."""
    cost, policy = model.encoder.cost, model.policy

    def forward(batches: Iterable[dict[str, Tensor]]) -> float:
        return sum(float(cost.dense(batch["attention_mask"].sum(-1)).sum()) for batch in batches)

    batches, _ = by_length(tokenizer, rows["train"], settings.batch_size)
    epoch = forward(batches)
    held_out = forward(feedback)
    sample = forward(_cut(_sample(rows["train"], tokenizer, settings, CALIBRATION_BATCHES), settings))
    per_epoch = math.ceil(math.ceil(len(rows["train"]) / (settings.batch_size * ranks())) / settings.accumulate)
    narrow = (policy.widths[0] + policy.widths[-1]) / 2 / cost.heads  # of a probe, about
    passes = 1 + policy.chooses  # over the held-out rows when the weights are final
    return divide(
        settings.budget, settings.train_budget or settings.budget,
        epoch=epoch, epochs=settings.epochs, whole=math.ceil(per_epoch * settings.epochs), rows=settings.batch_size,
        fixed=(CALIBRATION * sample + passes * narrow * held_out + words_cost(model, batches)) * ranks(),
        surveys=model.config.exploration, probes=narrow / FEEDBACK_EVERY,
        imitates=_imitates(settings, model), warm_start=settings.warm_start, settle=settings.settle,
        crop=forward(_cut(batches, settings)) / epoch,
    )  # fmt: skip


def _imitates(settings: TrainSettings, model: DHTForSequenceClassification) -> bool:
    """True if there are layers that run narrow, and they know something."""
    policy = model.policy
    return settings.model not in PRESETS and policy.wide_from > 0 and policy.widths[0] < policy.heads


def imitated(
    settings: TrainSettings,
    model: DHTForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    flops: float,
) -> float:
    """Lets the layers that training runs narrow imitate themselves for about `flops`; returns the FLOPs spent."""
    if not flops:
        return 0.0
    policy, cost = model.policy, model.encoder.cost
    sets = policy.sets_of(policy.widths[0])
    sets[policy.wide_from :] = False
    layers = float(sets.any(-1).sum())
    each = (layers + 3 * float(sets.sum()) / policy.heads) / policy.layers  # teacher's forward, and a training step
    draw, batches = random.Random(settings.seed), list[dict[str, Tensor]]()
    while flops > 0:
        drawn, _ = by_length(tokenizer, draw.sample(rows["train"], min(len(rows["train"]), ROWS)), ROWS)
        (batch,) = _cut(drawn, settings, len(batches))
        batches.append({key: value.to(model.device) for key, value in batch.items()})
        flops -= each * float(cost.dense(batch["attention_mask"].sum(-1)).sum())
    with autocast(model.device, getattr(torch, settings.dtype)):
        return imitate(model, batches, sets)


def calibrated(
    settings: TrainSettings, model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Rows
) -> Ledger:
    """Calibrates the model on training batches; returns a ledger charged with what that cost."""
    sample = _cut(_sample(rows["train"], tokenizer, settings, CALIBRATION_BATCHES), settings)
    sample = [{key: value.to(model.device) for key, value in batch.items()} for batch in sample]
    with autocast(model.device, getattr(torch, settings.dtype)):
        passes = calibrate(model, sample)
    dense = sum(float(model.encoder.cost.dense(batch["attention_mask"].sum(-1)).sum()) for batch in sample)
    return Ledger(executed=passes * dense / len(sample) * ranks())


def _sample(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, settings: TrainSettings, batches: int = TIMED_STEPS
) -> list[dict[str, Tensor]]:
    """Training batches of the settings' size, spread evenly over the lengths, from a seeded draw of rows."""
    chosen = random.Random(settings.seed).sample(rows, min(len(rows), settings.batch_size * batches))
    return by_length(tokenizer, chosen, settings.batch_size)[0]


def _cut(batches: Sequence[dict[str, Tensor]], settings: TrainSettings, first: int = 0) -> list[dict[str, Tensor]]:
    """The batches before training, the `first` and those after it, cut as training will cut them."""
    crop = Crop(settings.crop, len(batches) + first, settings.seed)
    return [crop(batch, first + i, "before") for i, batch in enumerate(batches)] if settings.crop else list(batches)


def _feedback(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], device: torch.device
) -> list[dict[str, Tensor]]:
    """Held-out batches that pay the numeric arms: at most `FEEDBACK_ROWS` validation rows, drawn by seed."""
    draw = random.Random(settings.seed)
    chosen = draw.sample(rows, min(len(rows), FEEDBACK_ROWS))
    batches = by_length(tokenizer, chosen, settings.batch_size)[0]
    draw.shuffle(batches)
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def dense_step_seconds(
    model: DHTForSequenceClassification, batches: Sequence[dict[str, Tensor]], settings: TrainSettings
) -> float:
    """Seconds of one dense training step, mean over `batches`: the faster of our dense path and `transformers`' own.

    Forward, backward, gradient clipping, fused AdamW; without the training loop around it, which our own figure has.
    """
    contenders: dict[str, torch.nn.Module] = {"dense": copy.deepcopy(model)}
    contenders["dense"].active_policy = DensePolicy(model.config.num_attention_heads)
    if model.config.source in FAMILIES and model.config.head != "embedding":  # no loss without labels there
        contenders["transformers"] = export(model)
    taken = dict.fromkeys(contenders, 0.0)
    for contender in contenders.values():
        contender.to(model.device).train()
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: optimizer_of(contender, 1e-6)
        if name == "dense"
        else torch.optim.AdamW(contender.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        for name, contender in contenders.items()
    }
    for index, batch in enumerate([batches[len(batches) // 2], *batches]):
        labels, inputs = split_labels(batch, model.device)
        for name, contender in contenders.items():
            begun = time.perf_counter()
            with autocast(model.device, getattr(torch, settings.dtype)):
                loss = contender(**inputs, labels=labels).loss
            loss.backward()
            update(contender, optimizers[name])
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if index:  # the first is the warm-up
                taken[name] += time.perf_counter() - begun
    return min(taken.values()) / len(batches)


def evaluate_run(
    model: DHTForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    data: TextData,
    settings: TrainSettings,
    split: str,
) -> dict[str, Any]:
    """The inference fields of the report for the trained policy, and the full model's accuracy on the same rows."""
    rows = tokenise(tokenizer, getattr(data, split), settings.max_length)
    batches, _ = by_length(tokenizer, rows, settings.batch_size)
    dtype = getattr(torch, settings.dtype)
    dense = DensePolicy(model.config.num_attention_heads).to(model.device)
    policy = dense if settings.dense else model.policy
    outcome = run_policy(model, batches, policy, dtype=dtype)
    timing = time_policy(model, batches, policy, dtype=dtype)
    report = report_of(
        outcome, timing,
        budget=1.0 if settings.dense else settings.budget, policy="dense" if settings.dense else "learned",
        search=settings.search, seed=settings.seed, split=split, batch_size=settings.batch_size, dtype=settings.dtype,
        threads=torch.get_num_threads(), torch=torch.__version__, data=data.name, model=settings.model,
        ffn=settings.ffn,
    )  # fmt: skip
    full = (outcome if settings.dense else run_policy(model, batches, dense, dtype=dtype)).metrics
    return report | {f"full_depth_{name}": full[name] for name in ("accuracy", model.task.metric)}


def save_run(
    out: Path, model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any]
) -> None:
    """Writes a finished run: the model last, so that a folder with a `config.json` is a finished run, and checksums."""
    model.active_policy = None
    staged = out / ".model"
    with explained(out):
        (out / MANIFEST).unlink(missing_ok=True)
        tokenizer.save_pretrained(out)
        write_json(out / "report.json", report)
        write_card(out, model, report)
        model.save_pretrained(staged)
        for name in ("model.safetensors", "config.json"):
            (staged / name).replace(out / name)
        write_manifest(out, MODEL_FILES + TOKENIZER_FILES)
    shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
