"""From a `transformers` encoder to a dynamic one and back, and neurons dealt to head units."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ..errors import DHTError
from ..model.block import Block
from .configuration import DHTConfig
from .families import FAMILIES, Family, family_of, settings_of, source_settings
from .modeling import DHTForSequenceClassification, model_class

__all__ = ["FAMILIES", "convert", "deal_neurons", "export", "load_source"]


def convert(model: PreTrainedModel, num_labels: int | None = None, **settings: Any) -> DHTForSequenceClassification:
    """A dynamic classifier with the weights of `model`; a full plan gives the same hidden states.

    A sequence or token classifier keeps its head as the last exit; a base model's pooler (if it has one) starts every
    exit head. A token classifier, or `head="token"`, makes a `DHTForTokenClassification`.

    Args:
        model: a `transformers` model of one of the `FAMILIES`, with or without a classification head.
        num_labels: classes; None = those of `model`.
        settings: fields of `DHTConfig` to set, such as `search`, `ffn`, `widths`, `budget`.

    Raises:
        DHTError: the architecture has no name map, or is a variant that we do not run.
        ConfigError: the sizes or settings do not fit.
    """
    source, family = model.config, family_of(model.config)
    labelled: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if num_labels is None and getattr(source, "id2label", None):
        labelled = {"id2label": source.id2label, "label2id": source.label2id}
    kind = "token" if type(model).__name__.endswith("ForTokenClassification") else "classifier"
    settings = {"head": kind} | settings
    keeps_head = (
        hasattr(model, "classifier")
        and settings["head"] == kind
        and (num_labels is None or num_labels == source.num_labels)
    )
    if keeps_head and kind == "classifier":  # the checkpoint's own head reads the first token, unless it says otherwise
        labelled["last_pooling"] = getattr(source, "classifier_pooling", "cls")
        if source.problem_type is not None:
            settings = {"problem_type": source.problem_type} | settings
    config = DHTConfig(**settings_of(source), **labelled, **settings)
    dynamic = model_class(config.head)(config)
    prefix = f"{model.base_model_prefix}."
    state = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        if f"{family.pooler}.weight" in state and config.head == "classifier":  # many a base model comes without
            for exit_ in dynamic.encoder.exits:
                exit_.dense.weight.copy_(state[f"{family.pooler}.weight"])
                exit_.dense.bias.copy_(state[f"{family.pooler}.bias"])
        for names, ours in _counterparts(dynamic, family, keeps_head):
            ours.copy_(torch.cat([state[name] for name in names]).view(ours.shape))
        if keeps_head:
            mean, std = config.label_mean, config.label_std
            last = dynamic.encoder.exits[-1].classifier
            last.weight.div_(std)
            last.bias.sub_(mean).div_(std)
    dynamic.policy.restart()
    return dynamic


def _counterparts(
    dynamic: DHTForSequenceClassification, family: Family, head: bool
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every weight of ours as a view whose elements come in the order of theirs, and what theirs is called.

    Several names are tensors that end to end make ours up.

    Args:
        head: True for the last exit's head too.
    """
    encoder, last = dynamic.encoder, dynamic.encoder.exits[-1]
    modules: list[tuple[str | None, nn.Module | None]] = [
        (family.words, encoder.embeddings.words),
        (family.positions, encoder.embeddings.positions),
        (family.types, encoder.embeddings.types),
        (family.norm, encoder.embeddings.norm),
        (family.project, encoder.embeddings.project),
        (family.bias, encoder.position_bias and encoder.position_bias.values),
        (family.final_norm, encoder.final_norm),
    ]
    if head:
        modules.append((family.head or family.pooler, last.dense))
        modules.append((family.head_norm, last.norm))
        modules.append((_classifier(dynamic, family), last.classifier))
    parts = {"qkv": family.qkv, "out": (family.out,), "up": (family.up,), "down": (family.down,)}
    for index, block in enumerate(encoder.blocks):
        at = family.layer.format(index)
        modules.append((at + family.attention_norm, block.attention_norm))
        modules.append((at + family.ffn_norm, block.ffn_norm))
        for name, ours in block.named_parameters(recurse=False):
            part, kind = name.rsplit("_", 1)
            if part == "qkv" or (part == "up" and block.gated):
                view = ours.transpose(0, 1)  # theirs: the queries of all heads, then the keys, ...
            elif part in ("out", "down") and kind == "weight":
                view = ours.permute(2, 0, 1)  # theirs: the inputs, which the units own, last
            else:
                view = ours
            yield tuple(f"{at}{theirs}.{kind}" for theirs in parts[part]), view
    for theirs, module in modules:
        for kind, ours in module.named_parameters(recurse=False) if module is not None else ():
            yield (f"{theirs}.{kind}",), ours


def _classifier(dynamic: DHTForSequenceClassification, family: Family) -> str:
    """What the family calls the classifier of the model's task; that of every token classifier is `classifier`."""
    return "classifier" if dynamic.config.head == "token" else family.classifier


def load_source(path: str | Path, num_labels: int, head: str = "classifier") -> PreTrainedModel:
    """The `transformers` model at `path` (folder or Hub id): with its classifier if that has `num_labels` classes.

    Args:
        head: "classifier", or "token" for the classifier of tokens.

    Raises:
        DHTError: nothing loadable there.
    """
    kind = "TokenClassification" if head == "token" else "SequenceClassification"
    auto = AutoModelForTokenClassification if head == "token" else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(path)
        classifier = any(kind in name for name in config.architectures or [])
        if classifier and config.num_labels == num_labels:
            model: PreTrainedModel = auto.from_pretrained(path, use_safetensors=True)
        else:
            model = AutoModel.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise DHTError(f"model: cannot load {str(path)!r}: {str(error).splitlines()[0]}") from error
    return model


@torch.no_grad()
def deal_neurons(block: Block, unit_importance: Tensor, neuron_importance: Tensor) -> None:
    """Deals the FFN's neurons to head units, best neurons to the best unit; the block's function does not change.

    Args:
        block: a coupled `Block`.
        unit_importance: [H], of the attention heads.
        neuron_importance: [H, M/H], of the neurons where they are now.
    """
    heads, share = neuron_importance.shape
    ranked = neuron_importance.flatten().argsort(dim=0, descending=True)
    dealt = torch.empty_like(ranked).view(heads, share)
    dealt[unit_importance.argsort(dim=0, descending=True)] = ranked.view(heads, share)
    order = dealt.flatten()
    up = (block.up_weight, block.up_bias)
    for weight in (*(w.transpose(1, 2) if block.gated else w for w in up), block.down_weight):  # [H, M/H, ...]
        weight.copy_(weight.flatten(0, 1)[order].unflatten(0, (heads, share)))


def export(dynamic: DHTForSequenceClassification) -> PreTrainedModel:
    """The dense model of the family that `dynamic` came from, with its weights and last exit: plain `transformers`.

    Raises:
        DHTError: the weights came from no family (a from-scratch preset).
    """
    config = dynamic.config
    family = FAMILIES.get(config.source)
    if family is None:
        raise DHTError(
            f"model: {config.source!r} has no counterpart in transformers; what has: {', '.join(sorted(FAMILIES))}"
        )
    embeds = config.head == "embedding"
    kinds = {"embedding": AutoModel, "token": AutoModelForTokenClassification}
    kind: Any = kinds.get(config.head, AutoModelForSequenceClassification)
    plain: PreTrainedModel = kind.from_config(AutoConfig.for_model(config.source, **source_settings(config)))
    own = plain.state_dict()
    state: dict[str, Tensor] = {}
    for names, ours in _counterparts(dynamic, family, head=not embeds):
        full = [name if name in own else f"{plain.base_model_prefix}.{name}" for name in names]
        theirs = ours.detach().reshape(-1, *own[full[0]].shape[1:])
        state |= dict(zip(full, theirs.chunk(len(full)), strict=True))
    if not embeds:
        at = f"{_classifier(dynamic, family)}."
        state[at + "weight"] = state[at + "weight"] * config.label_std  # theirs answers in the labels' unit by itself
        state[at + "bias"] = state[at + "bias"] * config.label_std + config.label_mean
    missing, unexpected = plain.load_state_dict(state, strict=False)
    lost = [name for name in missing if "position_ids" not in name and not (embeds and name.startswith("pooler."))]
    assert not [*lost, *unexpected], f"name map of {config.source} is incomplete: {lost} {unexpected}"
    return plain
