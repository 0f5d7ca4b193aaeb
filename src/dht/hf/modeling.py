"""The dynamic encoder as `transformers` models: `DHTForSequenceClassification` and `DHTForTokenClassification`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

from ..errors import ConfigError
from ..manifest import COMPLETE, MANIFEST, verify
from ..model.block import Block
from ..model.encoder import Encoder, ExitHead, Map
from ..model.execute import execute
from ..plan import Mode, Trace
from ..policy.base import Policy
from ..policy.integrated import IntegratedPolicy
from ..policy.tree import TreePolicy
from ..task import SINGLE_LABEL, Task, task_of
from .configuration import DHTConfig


@dataclass
class DHTOutput(ModelOutput):
    """What a forward returns.

    Attributes:
        loss: scalar, when labels were given.
        logits: [B, C], each row's answer, from the exit where it left. Of a tagger [B, T, C], zeros where
            `attention_mask` is 0.
        trace: what was executed (`dht.plan.Trace`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    trace: Trace | None = None


class DHTForSequenceClassification(PreTrainedModel):
    """A classifier that decides for every row how many layers and which head units to run.

    `policy` makes the decisions and is saved with the weights; assign `active_policy` (or pass `policy=` to `forward`)
    to run another one, such as a baseline, through the same executor.
    """

    config: DHTConfig
    config_class = DHTConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch's rows, whatever the batches accumulated with it
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _keys_to_ignore_on_load_missing = [r"policy\.mean_tokens"]  # noqa: RUF012  (of runs older than it)
    tags: ClassVar[bool] = False

    def __init__(self, config: DHTConfig) -> None:
        config.check()
        if self.tags != (config.head == "token"):
            right = model_class(config.head).__name__
            raise ConfigError(f"head: got {config.head!r}, which {type(self).__name__} is not for; use {right}")
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = Encoder(config)
        self.policy = {"tree": TreePolicy, "integrated": IntegratedPolicy}[config.search](config)
        self.active_policy: Policy | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Map) and not getattr(module.weight, "_is_hf_initialized", False):
            module.reset_parameters()
        elif isinstance(module, Block | ExitHead):
            for name, parameter in module.named_parameters(recurse=False):
                if not getattr(parameter, "_is_hf_initialized", False):
                    zero = name.endswith(("bias", "queries"))
                    parameter.zero_() if zero else parameter.normal_(0.0, self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The saved model; its policy in float64 to the last bit, whatever `dtype` the weights are loaded in.

        Raises:
            CheckpointError: a local folder's files are not those that its manifest lists.
        """
        for name in (MANIFEST, COMPLETE):
            verify(Path(str(pretrained_model_name_or_path)) / (kwargs.get("subfolder") or ""), name)
        kwargs.setdefault("use_safetensors", True)  # nothing is ever unpickled
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        where: dict[str, Any] = {
            k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only", "subfolder") if k in kwargs
        }
        state = _policy_state(pretrained_model_name_or_path, where)
        if state:
            model.policy.load_state_dict({k: v.to(model.device) for k, v in state.items()}, assign=True)
        return loaded

    @property
    def task(self) -> Task:
        """What the model is for, as its configuration says."""
        return task_of(self.config)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """As in `transformers`, block by block.

        Raises:
            ConfigError: the reentrant variant, which would lose the gradients of packed rows.
        """
        function = kwargs.get("gradient_checkpointing_func")
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise ConfigError("gradient_checkpointing_kwargs: got use_reentrant=True, allowed: use_reentrant=False")
        super()._set_gradient_checkpointing(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the blocks (arguments of `torch.compile`), not the loop over layers, where the policy decides."""
        for block in self.encoder.modules():
            if isinstance(block, Block):  # an adapter's wrapper around it is not
                block.compile(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Saves as every model of `transformers` does; checksums of what is replaced there go."""
        for name in (MANIFEST, COMPLETE):
            (Path(save_directory) / name).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embeddings.words = value

    def __setattr__(self, name: str, value: Any) -> None:
        # A borrowed policy is not part of the model: it must not be saved with it.
        if name == "active_policy":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        policy: Policy | None = None,
        mode: Mode = "exploit",
        every_exit: bool = False,
        tap_gates: bool = False,
        return_dict: bool | None = None,
        **_: object,
    ) -> DHTOutput | tuple[Any, ...]:
        """Runs the batch under the policy.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 1 at real tokens.
            token_type_ids: int64 [B, T].
            labels: int64 [B], float [B, C] (several labels), float [B] (regression) or float [B, D] (the full model's
                embeddings), int64 [B, T] (tags, -100 where there is none); adds the loss over all visited exits.
            policy: what decides; None = `active_policy`, else the learned policy.
            mode: exploit (default), explore or probe.
            every_exit: compute every exit passed, even if the policy does not read them.
            tap_gates: collect gate gradients in backward.
        """
        chosen = policy or self.active_policy or self.policy
        trace = execute(
            self.encoder,
            chosen,
            input_ids,
            attention_mask,
            token_type_ids,
            mode=mode,
            every_exit=every_exit or (labels is not None and chosen.trains_exits),
            tap_gates=tap_gates,
        )
        loss = None if labels is None else exit_loss(trace, labels, self.task, self.config.distillation)
        logits = trace.logits.masked_fill(trace.logits.isneginf(), 0.0) if self.tags else trace.logits
        output = DHTOutput(loss=loss, logits=logits, trace=trace)
        return output if return_dict is not False else output.to_tuple()


class DHTForTokenClassification(DHTForSequenceClassification):
    """A tagger that decides for every row how many layers and which head units to run; its tokens leave together.

    Its configuration has `head="token"`.
    """

    tags: ClassVar[bool] = True


def model_class(head: str) -> type[DHTForSequenceClassification]:
    """The class of the models whose configuration says `head`."""
    return DHTForTokenClassification if head == "token" else DHTForSequenceClassification


def _policy_state(path: str | Path, where: dict[str, Any]) -> dict[str, Tensor]:
    """The policy's tensors as they stand in the checkpoint's safetensors file or shards."""
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **where)
    names = [SAFE_WEIGHTS_NAME]
    if index:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in names:
        with safe_open(cached_file(path, name, **where), "pt") as file:
            keys = [key for key in list(file.keys()) if key.startswith("policy.")]
            state |= {key.removeprefix("policy."): file.get_tensor(key) for key in keys}
    return state


def exit_loss(trace: Trace, labels: Tensor, task: Task = SINGLE_LABEL, distillation: float = 0.0) -> Tensor:
    """Mean over rows of the mean loss of each row's visited exits.

    Args:
        labels: [B, ...], as the task takes them.
        task: says what the loss of an exit is. Where classes have weights, the mean is still over rows.
        distillation: share of the loss of a row's earlier exits in which its last exit's answer is the label.

    Raises:
        ValueError: labels of a type or shape that the task does not take.
    """
    task.check(labels, trace.logits)
    total = trace.exits[0].logits.new_zeros(labels.shape[0], dtype=torch.float32)
    passed = torch.zeros_like(total)
    answers = task.as_labels(trace.logits.detach()) if distillation else labels
    for exit_ in trace.exits:
        loss = task.losses(exit_.logits, labels[exit_.rows])
        if distillation:  # the last exit imitates nobody
            imitates = distillation * (trace.layers[exit_.rows] > exit_.layer)
            loss = loss.lerp(task.losses(exit_.logits, answers[exit_.rows]), imitates.to(loss.dtype))
        total = total.index_add(0, exit_.rows, loss)
        passed = passed.index_add(0, exit_.rows, torch.ones_like(passed[exit_.rows]))
    return (total / passed).mean()


AutoConfig.register("dht", DHTConfig, exist_ok=True)
AutoModelForSequenceClassification.register(DHTConfig, DHTForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(DHTConfig, DHTForTokenClassification, exist_ok=True)
