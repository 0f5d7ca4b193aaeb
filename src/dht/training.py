"""`DHTTrainer`: a `transformers` trainer that lets the policy decide, pays it, and keeps training within its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .curve import measure_curve
from .errors import NonFiniteError
from .guarded import GuardedTrainer
from .hf.modeling import DHTForSequenceClassification, exit_loss
from .plan import Mode, Trace
from .policy.budget import Schedule, dual_ascent
from .policy.reward import quality

BACKWARD = 2.0
"""FLOPs of a backward pass in units of its forward."""

LONGEST_LOG = 1000
"""Entries of a log, above which every other one goes: the log of a long run stays as small as that of a short one."""


class Ledger(TrainerCallback, ExportableState):
    """What training has cost, in FLOPs, and how it went; saved in every checkpoint's `trainer_state.json`.

    Attributes:
        executed: FLOPs run: training steps, calibration and feedback passes.
        dense: FLOPs of the same training steps (and nothing else) on the full model.
        history: a dict every few steps: step, fraction, target, price, loss; means over the steps since the last.
        every: steps between two of them.
    """

    def __init__(
        self,
        executed: float = 0.0,
        dense: float = 0.0,
        history: list[dict[str, float]] | None = None,
        every: int = 10,
        window: list[tuple[float, float, float]] | None = None,
    ) -> None:
        self.executed, self.dense, self.history = executed, dense, history or []
        self.every, self._window = every, window or []

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into the checkpoint."""
        kept = {
            "executed": self.executed, "dense": self.dense, "history": self.history, "every": self.every,
            "window": self._window,
        }  # fmt: skip
        return {"args": kept, "attributes": {}}

    @property
    def fraction(self) -> float:
        """Training FLOPs executed so far as a fraction of dense training's."""
        return self.executed / self.dense if self.dense else 0.0

    def step(self, trace: Trace) -> None:
        """Counts one training step: forward and backward of the trace, and of the dense model."""
        self.executed += (1 + BACKWARD) * float(trace.flops.sum())
        self.dense += (1 + BACKWARD) * float(trace.dense_flops.sum())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if len(state.log_history) > LONGEST_LOG:
            del state.log_history[1::2]

    def note(self, step: int, fraction: float, target: float, price: float, loss: float) -> None:
        """Adds a line to the history every `every` steps: means over the window."""
        self._window.append((fraction, target, loss))
        if step % self.every == 0:
            mean = [sum(column) / len(self._window) for column in zip(*self._window, strict=True)]
            self.history.append({"step": step, "fraction": mean[0], "target": mean[1], "price": price, "loss": mean[2]})
            self._window.clear()
            if len(self.history) > LONGEST_LOG:
                del self.history[1::2]
                self.every *= 2


class DHTTrainer(GuardedTrainer):
    """Trains the weights and the policy together under a budget.

    A step: the policy explores on the batch; the loss is over the exits that each row passed; backward also yields the
    gate gradients that pay the head units. Numeric arms are paid only with rows that the weights have not fitted:
    first-epoch rows (their quality is read before the update) and, every `feedback_every` steps, a batch of held-out
    rows that runs to full depth without gradients. The price moves after every step.

    Args:
        feedback: returns the i-th batch of held-out labelled rows, on the model's device; None = first-epoch rows only.
        schedule: budget over training.
        price_rate: step size of the dual ascent.
        feedback_every: training steps between feedback batches.
        ledger: continues an earlier count (calibration).
    """

    def __init__(
        self,
        *args: Any,
        schedule: Schedule,
        feedback: Callable[[int], dict[str, Tensor]] | None = None,
        price_rate: float = 0.1,
        feedback_every: int = 16,
        ledger: Ledger | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), ledger or Ledger()]
        super().__init__(*args, **kwargs)
        self.schedule, self.feedback = schedule, feedback
        self.price_rate, self.feedback_every = price_rate, feedback_every
        self.model_accepts_loss_kwargs = False
        self._trace: Trace | None = None

    @property
    def ledger(self) -> Ledger:
        """The one among the callbacks: resuming puts a restored one in the place of the first."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Ledger))

    @property
    def dynamic(self) -> DHTForSequenceClassification:
        """The model without wrappers."""
        return cast(DHTForSequenceClassification, self.accelerator.unwrap_model(self.model))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss over the exits passed; while training, the trace is kept for the policy."""
        labels = inputs.pop("labels")
        training = model.training
        output = model(**inputs, every_exit=training, mode=self._mode() if training else "exploit", tap_gates=training)
        loss = exit_loss(output.trace, labels, self.dynamic.task)
        if training:
            self._trace, self._labels = output.trace, labels
        return (loss, output) if return_outputs else loss

    def _mode(self) -> Mode:
        """Explore; every 1 / `exploration` steps survey, so that no layer starves and every unit is paid."""
        share = self.dynamic.config.exploration
        return "survey" if share and self.state.global_step % round(1 / share) == 0 else "explore"

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward, then what the policy learns from it."""
        mode = self._mode()
        self._trace = None
        loss = super().training_step(model, inputs, num_items_in_batch)
        trace = cast("Trace | None", self._trace)  # None: the forward was refused half-way
        if trace is not None:
            self.ledger.step(trace)
            if bool(loss.isfinite()):
                try:
                    self._learn(trace, mode, float(loss))
                except NonFiniteError as error:
                    self.refuse(str(error))
        self.dynamic.policy.finish_step()
        self._trace = None
        return loss

    def _learn(self, trace: Trace, mode: Mode, loss: float) -> None:
        """Pays the arms with what the step showed, and moves the price."""
        policy, step = self.dynamic.policy, self.state.global_step
        target = self.schedule.at(step / max(self.state.max_steps, 1))
        with torch.no_grad():
            policy.observe_units(trace)
            if self.feedback is None or (self.state.epoch or 0.0) < 1.0:
                policy.observe(trace, quality(trace, self._labels, self.dynamic.task))
            if self.feedback is not None and step % self.feedback_every == 0:
                self.probe(self.feedback(step // self.feedback_every))
            price = float(policy.price)
            if mode == "explore":  # a survey is not what the price asked for
                price = dual_ascent(price, trace.flops_fraction, target, self.price_rate)
                policy.price.fill_(price)
        self.ledger.note(step, trace.flops_fraction, target, price, loss)

    def probe(self, batch: dict[str, Tensor]) -> Trace:
        """Runs held-out rows to full depth, without gradients, and lets the policy learn from every exit."""
        model = self.dynamic
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            trace: Trace = model(**inputs, mode="probe").trace
        model.train(was_training)
        model.policy.observe(trace, quality(trace, batch["labels"], model.task))
        self.ledger.executed += float(trace.flops.sum())
        return trace


def finish(trainer: DHTTrainer, batches: list[dict[str, Tensor]], budget: float, passes: int = 1) -> None:
    """Readies the policy for serving once the weights are final: fresh probes, head sets, price curve, budget.

    Args:
        batches: held-out labelled rows.
        passes: probe passes over them.
    """
    policy, contexts = trainer.dynamic.policy, []
    policy.restart()
    with torch.no_grad():
        for _ in range(passes):
            for batch in batches:
                contexts.append(trainer.probe(batch).context)
                policy.finish_step()
        policy.fix_head_sets(torch.cat(contexts))
    with trainer.compute_loss_context_manager():
        trainer.ledger.executed += measure_curve(trainer.dynamic, batches, budget)
