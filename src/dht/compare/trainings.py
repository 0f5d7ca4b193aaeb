"""The models of a comparison: what is trained, at what cost, and how. Each is trained once, whoever needs it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import SaveStrategy

from .._files import write_json
from ..config import TrainSettings
from ..guarded import GuardedTrainer
from ..hf.modeling import DHTForSequenceClassification, exit_loss
from ..load import collate
from ..plan import Trace
from ..policy.baselines import ConfidencePolicy, DensePolicy, StaticPolicy
from ..spending import SHORT
from ..train import MakeTrainer, Rows, arguments, calibrated, dense_trainer, dynamic_trainer, fit, save_run
from ..training import Ledger
from .ablations import install, variant
from .dropping import Keep, progressive_cost, progressive_layers, progressive_theta, random_layers, run_layers
from .regret import cumulative, record_regret
from .settings import CompareSettings
from .shapes import Sizes

RIVALS = ("dense-decay", "smaller-dense", "layer-dropout", "progressive")
"""Trainings that are given what our own training at that budget and seed took, in FLOPs or in seconds."""


@dataclass(frozen=True)
class Training:
    """One model to train.

    Args:
        kind: "dense", "dht", "static" and "exits" (layers x units), or one of `RIVALS`.
        budget: of "dht", and of the "dht" that a rival is matched to.
        match: "flops" or "seconds", of a rival. variant: an ablation, of "dht".
    """

    kind: str
    seed: int
    budget: float = 1.0
    layers: int = 0
    units: int = 0
    match: str = ""
    variant: str = ""

    @property
    def key(self) -> str:
        """A file name that no other training has."""
        parts = [self.kind]
        parts += [self.variant] if self.variant else []
        parts += (
            [f"{self.layers}x{self.units}"] if self.layers else [f"{self.budget:g}"] if self.kind != "dense" else []
        )
        parts += [self.match] if self.match else []
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def needs(self) -> list[Training]:
        """Trainings whose measured cost this one is matched to."""
        if self.kind not in RIVALS:
            return []
        ours = Training("dht", self.seed, self.budget)
        if self.match == "flops":
            return [ours]
        return [ours, Training(self.kind, self.seed, self.budget, match="flops")]

    def effort(self, sizes: Sizes) -> float:
        """About what it costs, in dense trainings: for the time left."""
        if self.layers:
            return sizes.cost(self.layers, self.units) + 0.05
        return 1.0 if self.kind == "dense" else min(1.0, self.budget + 0.1)


def dense_of(settings: CompareSettings, seed: int) -> Training:
    """What a seed's seconds are measured by: its own dense training if such are compared, else that of the first seed.

    How long a training takes hardly depends on its seed, and with long rows dense ones are most of the work.
    """
    return Training("dense", seed if "dense" in settings.methods else settings.seeds[0])


def weights_of(settings: CompareSettings, training: Training) -> Path:
    """The run folder that holds the model."""
    return settings.out / "models" / training.key


def record_of(settings: CompareSettings, training: Training) -> Path:
    """The JSON file that says what the training cost; it is written last."""
    return settings.out / "trainings" / f"{training.key}.json"


def read_record(settings: CompareSettings, training: Training) -> dict[str, Any]:
    """What the finished training cost."""
    record: dict[str, Any] = json.loads(record_of(settings, training).read_text(encoding="utf-8"))
    return record


@dataclass
class Recipe:
    """How to train: share of the settings' epochs, changes of the settings, the trainer, and notes for the record.

    `probes` fills up while ours trains: the records of `record_regret`.
    """

    make: MakeTrainer
    share: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)


class CountingTrainer(GuardedTrainer):
    """A plain trainer whose steps are counted in FLOPs.

    Args:
        keep: layers of each batch (layer dropout); None = what the model's active policy runs.
        mean_of_exits: the loss is the mean over the exits passed, else that of the answer alone.
        ledger: continues an earlier count (calibration).
        seed: of the layers drawn.
    """

    def __init__(
        self, *args: Any, keep: Keep | None = None, mean_of_exits: bool = False, ledger: Ledger, seed: int = 0,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.keep, self.mean_of_exits, self.ledger = keep, mean_of_exits, ledger
        self.generator = torch.Generator().manual_seed(seed)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of what ran, which is charged to the ledger."""
        labels = inputs.pop("labels")
        if self.keep is not None:
            progress = self.state.global_step / max(1, self.state.max_steps)
            trace = run_layers(self.accelerator.unwrap_model(model), inputs, self.keep(progress, self.generator))
        else:
            trace = model(**inputs, every_exit=self.mean_of_exits).trace
        self.ledger.step(float(trace.flops.sum()), float(trace.dense_flops.sum()))
        return mean_exit_loss(trace, labels) if self.mean_of_exits else exit_loss(trace, labels)


def mean_exit_loss(trace: Trace, labels: Tensor) -> Tensor:
    """Mean cross-entropy over all exits, each weighing the same; every row has passed every exit."""
    losses = [torch.nn.functional.cross_entropy(e.logits.float(), labels[e.rows]) for e in trace.exits]
    return torch.stack(losses).mean()


def train_model(settings: CompareSettings, training: Training, sizes: Sizes) -> dict[str, Any]:
    """Trains, leaves the weights and a record of the cost in the comparison's folder, and returns the record."""
    recipe = _recipe(settings, training, sizes)
    out = weights_of(settings, training)
    budget = training.budget if training.kind == "dht" else 1.0
    own = {"lexical": training.kind == "dht", "epochs": settings.epochs * recipe.share}
    changes = own | recipe.settings
    asked = settings.training(budget, training.seed, out, **changes)
    fitted = fit(asked, overwrite=True, make=lambda *given: _quiet(recipe.make(*given)), options=recipe.options)
    record = {
        "training": training.key, "kind": training.kind, "seed": training.seed, "budget": training.budget,
        "train_flops_fraction": fitted.report["train_flops_fraction"] * recipe.share,
        "train_seconds": fitted.report["train_seconds"], "share": recipe.share, "steps": fitted.steps,
        "epochs": asked.epochs, "threads": torch.get_num_threads(), "clock": "wall", **recipe.notes,
    }  # fmt: skip
    if record["threads"] == 1 and fitted.model.device.type == "cpu":
        # On one thread the process's own time is the wall time of an idle machine, whatever runs beside it.
        record |= {"train_seconds": fitted.report["train_cpu_seconds"], "clock": "process"}
    if recipe.probes:
        record["regret"] = cumulative(recipe.probes)
    if fitted.history:
        record["history"] = fitted.history
    save_run(out, fitted.model, fitted.tokenizer, record)
    write_json(record_of(settings, training), record)
    return record


def _quiet(trainer: Trainer) -> Trainer:
    """Without checkpoints, which would count as training time, and without prints: the comparison has its own bar."""
    trainer.args.save_strategy = SaveStrategy.NO
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return trainer


def _recipe(settings: CompareSettings, training: Training, sizes: Sizes) -> Recipe:
    if training.kind == "dense":
        return Recipe(dense_trainer, settings={"dense": True})
    if training.kind == "dht":
        return _ours(training.variant)
    if training.kind == "static":
        return Recipe(_static(training.layers, training.units))
    if training.kind == "exits":
        return Recipe(_exits(training.layers, training.units), options={"exit_memory": 0.0})  # as these are published
    assert training.kind in RIVALS, training.kind
    recipe = _rival(settings, training, sizes)
    if settings.epochs * recipe.share < SHORT:
        recipe.make = _without_dropout(recipe.make)
    return recipe


def _without_dropout(make: MakeTrainer) -> MakeTrainer:
    """For a rival that is given few passes: ours drops nothing out then either."""

    def made(*given: Any) -> Trainer:
        trainer = cast(GuardedTrainer, make(*given))
        trainer.drops = False
        return trainer

    return made


def _rival(settings: CompareSettings, training: Training, sizes: Sizes) -> Recipe:
    """A training rival, given the FLOPs that ours took, or as many steps as fit into the seconds that ours took."""
    ours = read_record(settings, training.needs[0])
    target = min(1.0, ours["train_flops_fraction"])
    speed = 1.0
    if training.match == "seconds":
        speed = ours["train_seconds"] / read_record(settings, training.needs[1])["train_seconds"]
    notes = {"matched_flops": target, "match": training.match}
    if training.kind == "dense-decay":
        return Recipe(dense_trainer, target * speed, {"dense": True}, notes=notes)
    if training.kind == "smaller-dense":
        layers = max(1, math.ceil(target * sizes.layers - 1e-9))
        share = target * sizes.layers / layers * speed
        return Recipe(_static(layers, sizes.heads, pruned=False), share, notes=notes | {"layers": layers})
    if training.kind == "layer-dropout":
        depth = max(1.0, target * sizes.layers)
        share = target * sizes.layers / depth * speed
        return Recipe(_dropping(random_layers(sizes.layers, depth)), share, notes=notes | {"mean_depth": depth})
    theta = progressive_theta(sizes.layers, target)
    share = min(1.0, target / progressive_cost(sizes.layers, theta)) * speed
    return Recipe(_dropping(progressive_layers(sizes.layers, theta)), share, notes=notes | {"theta": theta})


def _ours(name: str) -> Recipe:
    switch = variant(name)

    def make(
        settings: TrainSettings, model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Rows,
        checkpoints: Path, resuming: bool,
    ) -> Trainer:  # fmt: skip
        install(model, name)
        # Everything that is held out, in training and after it, comes from these rows.
        rows["validation"] = rows[switch.feedback]
        trainer = dynamic_trainer(settings, model, tokenizer, rows, checkpoints, resuming)
        switch.after_calibration(model.policy)
        if model.policy.reads_exits:  # only the tree says where it would have left
            recipe.probes = record_regret(trainer)
        return trainer

    recipe = Recipe(make, settings=dict(switch.settings), options=dict(switch.options), notes={"variant": name})
    return recipe


def _static(layers: int, units: int, pruned: bool = True) -> MakeTrainer:
    """A static sub-network, trained alone: units by gate gradients if `pruned`, else all of them."""

    def make(
        settings: TrainSettings, model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Rows,
        checkpoints: Path, resuming: bool,
    ) -> Trainer:  # fmt: skip
        ledger = calibrated(settings, model, tokenizer, rows) if pruned else Ledger()
        model.active_policy = StaticPolicy(layers, units, model.policy.ranking()).to(model.device)
        return _counting(settings, model, tokenizer, rows, checkpoints, ledger=ledger)

    return make


def _exits(layers: int, units: int) -> MakeTrainer:
    """All rows run L layers with K units each and pay the mean loss of the L exits."""

    def make(
        settings: TrainSettings, model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Rows,
        checkpoints: Path, resuming: bool,
    ) -> Trainer:  # fmt: skip
        ledger = calibrated(settings, model, tokenizer, rows)
        model.active_policy = ConfidencePolicy(static_sets(model, layers, units), 2.0)
        return _counting(settings, model, tokenizer, rows, checkpoints, ledger=ledger, mean_of_exits=True)

    return make


def _dropping(keep: Keep) -> MakeTrainer:
    def make(
        settings: TrainSettings, model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Rows,
        checkpoints: Path, resuming: bool,
    ) -> Trainer:  # fmt: skip
        model.active_policy = DensePolicy(model.config.num_attention_heads)
        return _counting(settings, model, tokenizer, rows, checkpoints, ledger=Ledger(), keep=keep, seed=settings.seed)

    return make


def _counting(
    settings: TrainSettings,
    model: DHTForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    checkpoints: Path,
    **options: Any,
) -> CountingTrainer:
    return CountingTrainer(
        model, arguments(settings, checkpoints), train_dataset=rows["train"],
        data_collator=lambda batch: collate(tokenizer, batch), **options,
    )  # fmt: skip


def static_sets(model: DHTForSequenceClassification, layers: int, units: int) -> Tensor:
    """Bool [N, H], the K best units of the first L layers, none in the others (where all rows have left)."""
    sets = StaticPolicy(layers, units, model.policy.ranking()).sets.clone()
    sets[layers:] = False
    return sets
