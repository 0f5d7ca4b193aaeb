"""`GuardedTrainer`: a `transformers` trainer that refuses updates that are not finite and checks its checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from .adamw import DeferredAdamW
from .checkpoints import Seal, load_state, save_state
from .errors import DHTError, NonFiniteError
from .manifest import COMPLETE, verify
from .model.encoder import without_dropout

PATIENCE = 3
"""Updates refused in a row that stop the training."""

KEPT_REASONS = 20

OPTIMIZER, SCHEDULER, RANDOM = "optimizer.safetensors", "scheduler.safetensors", "rng_state_{}.safetensors"


class Refusals(TrainerCallback, ExportableState):
    """Updates that were refused; saved in every checkpoint's `trainer_state.json`.

    Attributes:
        count: refused so far. streak: of them in a row, up to now.
        reasons: the first `KEPT_REASONS`, such as "step 12: the loss is nan".
    """

    def __init__(self, count: int = 0, streak: int = 0, reasons: list[str] | None = None) -> None:
        self.count, self.streak, self.reasons = count, streak, reasons or []

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into the checkpoint."""
        return {"args": {"count": self.count, "streak": self.streak, "reasons": self.reasons}, "attributes": {}}

    def note(self, step: int, reason: str) -> None:
        """Counts the step: refused, unless `reason` is empty.

        Raises:
            DHTError: it was the last that patience allows.
        """
        self.streak = self.streak + 1 if reason else 0
        if not reason:
            return
        self.count += 1
        if len(self.reasons) < KEPT_REASONS:
            self.reasons.append(f"step {step}: {reason}")
        if self.streak == PATIENCE:
            raise DHTError(
                f"training stopped: {PATIENCE} updates in a row were refused, the last at step {step}: {reason};"
                " look at the data of these steps, or start anew with a lower --lr"
            )


class _EpochStart(TrainerCallback):
    """Has a resumed epoch start with the random state that it started with, from which its order of rows is drawn.

    `Trainer` draws the order anew from the seed, which is right for the first epoch alone.
    """

    def __init__(self, trainer: GuardedTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        states, self.trainer.resumed = self.trainer.resumed, None
        if states is not None:
            between_epochs = float(state.epoch or 0.0).is_integer()
            _set_generators(states["now"] if between_epochs else states["epoch"])
        self.trainer.epoch_generators = _read_generators()


class GuardedTrainer(Trainer):
    """Refuses every update whose loss, gradients, contexts or rewards are not finite, and stops after three in a row.

    A refused update leaves weights and optimizer as they were. Checkpoints hold safetensors and JSON only, are sealed
    with checksums when whole, and are checked before anything of them is loaded.

    Attributes:
        drops: False to train without the dropout that the model is configured with, as short trainings should.
    """

    drops = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), Refusals(), Seal(), _EpochStart(self)]
        self._reason = ""
        self.epoch_generators: dict[str, Any] = {}
        self.resumed: dict[str, Any] | None = None
        self._deferred: DeferredAdamW | None = None
        super().__init__(*args, **kwargs)

    @property
    def refusals(self) -> Refusals:
        """The count among the callbacks: resuming puts a restored one in the place of the first."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Refusals))

    def refuse(self, reason: str) -> None:
        """Has the optimizer step that is being prepared left out; the first reason is the one told."""
        self._reason = self._reason or reason

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; a loss that is not finite refuses the update."""
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except NonFiniteError as error:
            self.refuse(str(error))
            return torch.full((), math.nan, device=self.args.device)
        if not bool(loss.isfinite()):
            self.refuse(f"the loss is {float(loss)}")
        return loss

    # An optimizer that passes over the rows of the embedding table that a batch did not read

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer` does; however it ends, no row of the embedding table is left behind."""
        try:
            with nullcontext() if self.drops else without_dropout(cast(nn.Module, self.model)):
                return super().train(*args, **kwargs)
        finally:
            if self._deferred is not None:
                self._deferred.detach()

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """As `Trainer` does; fused AdamW is one whose embedding table can be deferred."""
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return (DeferredAdamW if kind is torch.optim.AdamW and options.get("fused") else kind), options

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer` does; a single process defers the embedding table."""
        optimizer = super().create_optimizer(model)
        words = self.model.get_input_embeddings() if isinstance(self.model, PreTrainedModel) else None
        alone = self.args.world_size == 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if alone and isinstance(optimizer, DeferredAdamW) and isinstance(words, nn.Embedding):
            if not optimizer.tables:  # one that was handed over may have its own
                optimizer.attach(words)
            self._deferred = optimizer
        return optimizer

    def _load_best_model(self) -> None:
        if self._deferred is not None:
            self._deferred.settle()  # what is owed is owed to the weights that go
        super()._load_best_model()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._deferred is not None and self._deferred.tables:
            return self._deferred.clip(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The one place between the last backward of an update and its optimizer step that sees the gradients' norm.
        if grad_norm is None and self._deferred is not None and self._deferred.tables:
            grad_norm = self._deferred.clip(math.inf)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(float(norm)):
            self.refuse(f"the norm of the gradients is {float(norm)}")
        if self.args.world_size > 1:
            refused = self.accelerator.reduce(torch.tensor(float(bool(self._reason)), device=self.args.device), "sum")
            if float(refused):
                self.refuse("refused on another rank")
        reason, self._reason = self._reason, ""
        if reason:
            model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
            norm = 0.0
        self.refusals.note(self.state.global_step, reason)
        return norm

    # Checkpoints without pickles

    @property
    def _own_format(self) -> bool:
        """False where `Trainer` shards the state its own way."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.args.device.type in ("cpu", "cuda")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._deferred is not None:
            self._deferred.settle()
        super()._save(output_dir, state_dict)
        if self._own_format:  # a pickle that nothing reads
            (Path(str(output_dir or self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._own_format:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            save_state(Path(output_dir) / OPTIMIZER, self.optimizer.state_dict())
            save_state(Path(output_dir) / SCHEDULER, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / OPTIMIZER).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        self.optimizer.load_state_dict(load_state(Path(checkpoint) / OPTIMIZER))
        self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / SCHEDULER))

    def _save_rng_state(self, output_dir: str) -> None:
        if not self._own_format:
            super()._save_rng_state(output_dir)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # a rank may be here before rank 0 has made it
        states = {"now": _read_generators(), "epoch": self.epoch_generators}
        save_state(Path(output_dir) / RANDOM.format(self.args.process_index), states)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / RANDOM.format(self.args.process_index)
        if path.is_file():
            _set_generators(load_state(path)["now"])
        else:
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        verify(resume_from_checkpoint, COMPLETE)
        path = Path(resume_from_checkpoint) / RANDOM.format(self.args.process_index)
        self.resumed = load_state(path) if path.is_file() else None
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _read_generators() -> dict[str, Any]:
    return {name: read() for name, (read, _) in _generators().items()}


def _set_generators(states: dict[str, Any]) -> None:
    for name, (_, put) in _generators().items():
        if name in states:
            put(states[name])


def _generators() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """The process's random generators: how to read and how to set their states."""
    generators: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "python": (random.getstate, random.setstate),
        "numpy": (np.random.get_state, np.random.set_state),
        "torch": (torch.get_rng_state, torch.set_rng_state),
    }
    if torch.cuda.is_available():
        generators["cuda"] = (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    return generators
