"""Started twice by `torchrun`: trains with `DHTTrainer`, leaves what each rank ends with, and then runs `shards`.

Imported by the test, `trained` is the same training in one process, with the ranks' batches accumulated instead.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from builders import batch, dynamic_model
from dht.distributed import join, rank
from dht.policy.budget import Schedule
from dht.training import DHTTrainer, finish
from tools.shards import run_different_layers


def rows(count: int):
    made = batch(tuple(1 + (7 * i) % 12 for i in range(count)), seed=3)
    return [{key: value[i] for key, value in made.items()} for i in range(count)]


def trained(
    out: Path,
    *,
    accumulate: int,
    steps: int = 5,
    held_out: bool = False,
    batch_size: int = 4,
    resume: bool = False,
    **settings,
) -> DHTTrainer:
    """A trainer after `steps` steps of plain SGD on rows in a fixed order, or after those since a checkpoint."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "exploration": 0.25, "ridge": 10.0}
    model = dynamic_model("dht", **options | settings)
    feedback = [batch((5, 3, 9), seed=seed) for seed in range(20)]
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", use_cpu=True, report_to=[], logging_steps=1, save_strategy="steps",
        save_steps=3, restore_callback_states_from_checkpoint=True, save_total_limit=2,
        remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DHTTrainer(
        model, arguments, train_dataset=rows(48), schedule=Schedule(0.4),
        feedback=(lambda i: feedback[i % 20]) if held_out else None, feedback_every=2,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-3") if resume else None)
    if held_out:
        finish(trainer, feedback[:3], 0.4)
    return trainer


def ending(trainer: DHTTrainer) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Weights and policy, and what the ledger says."""
    ledger = trainer.ledger
    return trainer.dynamic.state_dict(), {
        "executed": ledger.executed, "dense": ledger.dense, "price": float(trainer.dynamic.policy.price),
        "history": ledger.history,
    }  # fmt: skip


def main(out: Path) -> None:
    join(cpu=True)
    scenes = {
        "exact": {"accumulate": 1, "forgetting": 1.0},
        "full": {"accumulate": 2, "held_out": True, "forgetting": 0.99},
        "resumed": {"accumulate": 2, "held_out": True, "forgetting": 0.99, "resume": True},
    }
    for name, settings in scenes.items():
        state, ledger = ending(trained(out, **settings))
        save_file({key: value.contiguous() for key, value in state.items()}, out / f"{name}-{rank()}.safetensors")
        (out / f"{name}-{rank()}.json").write_text(json.dumps(ledger))
    run_different_layers()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
