"""`DHTTrainer`: a `transformers` trainer that lets the policy decide, pays it, and keeps training within its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .crop import Crop
from .curve import keep_curve, measure_curve
from .distributed import merge_policy, rank, ranks, total
from .errors import NonFiniteError
from .guarded import GuardedTrainer
from .hf.modeling import DHTForSequenceClassification, exit_loss
from .mixture import fit_mixture, mixed_anew
from .plan import Mode, Trace
from .policy.budget import Schedule, dual_ascent
from .policy.reward import quality, quality_at_once
from .spending import BACKWARD

FEEDBACK_EVERY = 32
"""Training steps between batches of held-out rows."""

LONGEST_LOG = 1000
"""Entries of a log, above which every other one goes: the log of a long run stays as small as that of a short one."""


class Ledger(TrainerCallback, ExportableState):
    """What training has cost, in FLOPs, and how it went; saved in every checkpoint's `trainer_state.json`.

    Attributes:
        executed: FLOPs run: training steps, calibration and feedback passes.
        dense: FLOPs of the same training steps (and nothing else) on the full model, whole rows.
        share: steps taken as a share of those that the full model would be trained for.
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
        share: float = 1.0,
    ) -> None:
        self.executed, self.dense, self.history = executed, dense, history or []
        self.every, self._window, self.share = every, window or [], share

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into the checkpoint."""
        kept = {
            "executed": self.executed, "dense": self.dense, "history": self.history, "every": self.every,
            "window": self._window, "share": self.share,
        }  # fmt: skip
        return {"args": kept, "attributes": {}}

    @property
    def fraction(self) -> float:
        """Training FLOPs executed as a fraction of dense training's, once the steps are done."""
        return self.share * self.executed / self.dense if self.dense else 0.0

    def step(self, flops: float, dense_flops: float) -> None:
        """Counts forward and backward of one training step, given its forward FLOPs and those of the dense model."""
        self.executed += (1 + BACKWARD) * flops
        self.dense += (1 + BACKWARD) * dense_flops

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

    A step is an optimizer step: with gradient accumulation, or on several ranks, all batches of it are decided by the
    same policy, which then learns from all of them at once, is equal on all ranks, and moves its price once.

    Args:
        feedback: returns the i-th batch of held-out labelled rows, on the model's device; None = first-epoch rows only.
        schedule: budget over training.
        price_rate: step size of the dual ascent.
        feedback_every: training steps between feedback batches.
        ledger: continues an earlier count (calibration).
        crop: cuts long rows in the first steps; None = rows are read whole.
    """

    def __init__(
        self,
        *args: Any,
        schedule: Schedule,
        feedback: Callable[[int], dict[str, Tensor]] | None = None,
        price_rate: float = 0.1,
        feedback_every: int = FEEDBACK_EVERY,
        ledger: Ledger | None = None,
        crop: Crop | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), ledger or Ledger()]
        self._unwrapped: tuple[Any, Any] = None, None
        super().__init__(*args, **kwargs)
        self.schedule, self.feedback, self.crop = schedule, feedback, crop
        self.price_rate, self.feedback_every = price_rate, feedback_every
        self.model_accepts_loss_kwargs = False
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True  # ranks skip different layers
        self._traces: list[tuple[Trace, Tensor]] = []
        self._losses: list[Tensor] = []
        self._probed = 0.0
        self._left_out = 0.0

    @property
    def ledger(self) -> Ledger:
        """The one among the callbacks: resuming puts a restored one in the place of the first."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Ledger))

    @property
    def dynamic(self) -> DHTForSequenceClassification:
        """The model without wrappers; looking for them goes through all modules, so it is done once a model."""
        if self._unwrapped[0] is not self.model:
            self._unwrapped = self.model, self.accelerator.unwrap_model(self.model)
        return cast(DHTForSequenceClassification, self._unwrapped[1])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss over the exits passed; while training, the trace is kept for the policy."""
        labels = inputs.pop("labels")
        training = model.training
        output = model(**inputs, every_exit=training, mode=self._mode() if training else "exploit", tap_gates=training)
        loss = exit_loss(output.trace, labels, self.dynamic.task, self.dynamic.config.distillation)
        if training:
            self._traces.append((output.trace, labels))
        return (loss, output) if return_outputs else loss

    def _mode(self) -> Mode:
        """Explore; every 1 / `exploration` steps survey, so that no layer starves and every unit is paid."""
        share = self.dynamic.config.exploration
        return "survey" if share and self.state.global_step % round(1 / share) == 0 else "explore"

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; with the last batch of an optimizer step, the policy learns from all of them."""
        if self.crop:
            whole, cost = inputs["attention_mask"], self.dynamic.encoder.cost
            inputs = self.crop(inputs, self.state.global_step, f"{rank()} {len(self._traces)}")
            if inputs["attention_mask"].shape != whole.shape:
                kept = inputs["attention_mask"]
                self._left_out += float(cost.dense(whole.sum(-1)).sum() - cost.dense(kept.sum(-1)).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            self._learn()
        return loss

    @torch.no_grad()
    def _learn(self) -> None:
        """One step of the policy: the traces of all accumulated batches and all ranks, then the price.

        Of an update that any rank refuses, no rank's policy learns; what was executed counts all the same.
        """
        policy, step = self.dynamic.policy, self.state.global_step
        base = policy.snapshot()
        whole = all(bool(loss.isfinite()) for loss in self._losses)
        if whole:
            try:
                self._observe()
            except NonFiniteError as error:
                self.refuse(str(error))
                whole = False
        sums = [
            sum(float(trace.flops.sum()) for trace, _ in self._traces),
            sum(float(trace.dense_flops.sum()) for trace, _ in self._traces),
            sum(float(loss) for loss in self._losses) / ranks(),
            float(not whole),
            self._left_out,
        ]
        flops, dense, loss, refusing, left_out = total(
            torch.tensor(sums, dtype=torch.float64, device=policy.price.device)
        ).tolist()
        self.ledger.step(flops, dense + left_out)
        self._count_probes()
        if refusing:
            policy.merge(base, [])
        else:
            merge_policy(policy, base)
            price, target = float(policy.price), self.schedule.at(step / max(self.state.max_steps, 1))
            if self._mode() == "explore":  # a survey is not what the price asked for
                price = dual_ascent(price, flops / dense, target, self.price_rate)
                policy.price.fill_(price)
            self.ledger.note(step, flops / dense, target, price, loss)
        policy.finish_step()
        self._traces, self._losses, self._left_out = [], [], 0.0

    def _observe(self) -> None:
        """Pays the arms with what this rank's batches showed, and now and then with held-out rows."""
        policy, step = self.dynamic.policy, self.state.global_step
        policy.observe_units(*(trace for trace, _ in self._traces))
        for trace, labels in self._traces:
            if self.feedback is None or (self.state.epoch or 0.0) < 1.0:
                policy.observe(trace, quality(trace, labels, self.dynamic.task))
        if self.feedback is not None and step % self.feedback_every == 0:
            self.probe(self.feedback(step // self.feedback_every * ranks() + rank()))

    def _count_probes(self) -> None:
        """Adds the probes of all ranks since the last call to the ledger."""
        probed = torch.tensor(self._probed, dtype=torch.float64, device=self.dynamic.policy.price.device)
        self.ledger.executed += float(total(probed))
        self._probed = 0.0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer` does, with what the policy spends beside the loss: `flops_fraction`, `flops_target`, `price`."""
        if "loss" in logs and self.ledger.history:
            last = self.ledger.history[-1]
            logs |= {"flops_fraction": last["fraction"], "flops_target": last["target"], "price": last["price"]}
        super().log(logs, *args, **kwargs)

    def probe(self, batch: dict[str, Tensor]) -> Trace:
        """Runs held-out rows to full depth, without gradients, and lets the policy learn from every exit."""
        trace = self.held_out(batch)
        self.learn(trace, batch["labels"])
        return trace

    def learn(self, trace: Trace, labels: Tensor) -> None:
        """Pays the numeric arms with what every exit of held-out rows was worth."""
        policy, task = self.dynamic.policy, self.dynamic.task
        policy.observe(trace, quality(trace, labels, task), quality_at_once(trace, labels, task))

    def held_out(self, batch: dict[str, Tensor]) -> Trace:
        """What held-out rows do when all of them run every layer, without gradients."""
        model = self.dynamic
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            trace: Trace = model(**inputs, mode="probe").trace
        model.train(was_training)
        self._probed += float(trace.flops.sum())
        return trace


def finish(trainer: DHTTrainer, batches: list[dict[str, Tensor]], budget: float) -> None:
    """Readies exits and policy for serving once the weights are final: fresh probes, how exits add up, what each arm is
    worth, head sets, price curve, budget.

    Ranks do all of it alike, each on all batches, so that they end with the same policy.

    Args:
        batches: held-out labelled rows.
    """
    policy, traces = trainer.dynamic.policy, list[Trace]()
    policy.restart()
    policy.expect_lengths(batches)
    mixes = policy.reads_exits and trainer.dynamic.encoder.mixture is not None
    for batch in batches:
        traces.append(trainer.held_out(batch) if mixes else trainer.probe(batch))
        policy.finish_step()
    if mixes:
        labels = [batch["labels"] for batch in batches]
        fit_mixture(trainer.dynamic, traces, labels)
        for i, trace in enumerate(traces):
            traces[i] = mixed_anew(trainer.dynamic, trace)
            trainer.learn(traces[i], labels[i])
    policy.fix_head_sets(torch.cat([trace.context for trace in traces]))
    trainer._count_probes()
    if not policy.chooses:  # the probes ran what is served
        keep_curve(policy, traces, budget)
        return
    with trainer.compute_loss_context_manager():
        trainer.ledger.executed += measure_curve(trainer.dynamic, batches, budget) * ranks()
