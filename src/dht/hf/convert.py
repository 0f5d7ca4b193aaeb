"""From a `transformers` encoder to a dynamic one: one name map per family, and neurons dealt to head units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from ..errors import DHTError
from ..model.block import Block
from .configuration import DHTConfig
from .modeling import DHTForSequenceClassification


@dataclass(frozen=True)
class Family:
    """What an architecture calls our modules; None = it has no such module. `layer` prefixes a layer's parts."""

    words: str
    positions: str
    types: str | None
    norm: str
    layer: str
    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    up: str
    down: str
    ffn_norm: str
    pooler: str
    head: str | None
    classifier: str
    bias: str | None


BERT = Family(
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    norm="embeddings.LayerNorm",
    layer="encoder.layer.{}.",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="output.LayerNorm",
    pooler="pooler.dense",
    head=None,
    classifier="classifier",
    bias=None,
)
MPNET = replace(
    BERT,
    types=None,
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    head="classifier.dense",
    classifier="classifier.out_proj",
    bias="encoder.relative_attention_bias",
)
FAMILIES = {"bert": BERT, "mpnet": MPNET}
"""Every architecture that converts, by its `model_type`."""


def convert(model: PreTrainedModel, num_labels: int | None = None, **settings: Any) -> DHTForSequenceClassification:
    """A dynamic classifier with the weights of `model`; a full plan gives the same hidden states.

    A sequence classifier keeps its head as the last exit; a base model's pooler (if it has one) starts every exit head.

    Args:
        model: a BERT or MPNet model of `transformers`, with or without a classification head.
        num_labels: classes; None = those of `model`.
        settings: fields of `DHTConfig` to set, such as `search`, `ffn`, `widths`, `budget`.

    Raises:
        DHTError: the architecture has no name map.
        ConfigError: the sizes or settings do not fit.
    """
    source = model.config
    family = FAMILIES.get(source.model_type)
    if family is None:
        raise DHTError(
            f"model: cannot convert architecture {source.model_type!r}; what works: {', '.join(sorted(FAMILIES))}"
        )
    labelled: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if num_labels is None and getattr(source, "id2label", None):
        labelled = {"id2label": source.id2label, "label2id": source.label2id}
    if hasattr(model, "classifier") and (num_labels is None or num_labels == source.num_labels):
        labelled["last_pooling"] = "cls"  # the checkpoint's own head reads the first token
    config = DHTConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        intermediate_size=source.intermediate_size,
        hidden_act=source.hidden_act,
        hidden_dropout_prob=source.hidden_dropout_prob,
        attention_probs_dropout_prob=source.attention_probs_dropout_prob,
        max_position_embeddings=source.max_position_embeddings,
        type_vocab_size=source.type_vocab_size if family.types else 0,
        layer_norm_eps=source.layer_norm_eps,
        pad_token_id=source.pad_token_id,
        position_offset=source.pad_token_id + 1 if source.model_type == "mpnet" else 0,
        relative_attention_num_buckets=source.relative_attention_num_buckets if family.bias else 0,
        source=source.model_type,
        **labelled,
        **settings,
    )
    dynamic = DHTForSequenceClassification(config)
    prefix = f"{model.base_model_prefix}."
    state = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        _copy(dynamic, state, family)
    dynamic.policy.restart()
    return dynamic


def _copy(dynamic: DHTForSequenceClassification, state: dict[str, Tensor], family: Family) -> None:
    encoder, heads = dynamic.encoder, dynamic.config.num_attention_heads

    def put(module: nn.Module, name: str | None) -> None:
        for part, parameter in module.named_parameters(recurse=False):
            if name and f"{name}.{part}" in state:
                parameter.copy_(state[f"{name}.{part}"])

    put(encoder.embeddings.words, family.words)
    put(encoder.embeddings.positions, family.positions)
    put(encoder.embeddings.norm, family.norm)
    if encoder.embeddings.types is not None:
        put(encoder.embeddings.types, family.types)
    if encoder.position_bias is not None:
        put(encoder.position_bias.values, family.bias)
    for index, block in enumerate(encoder.blocks):
        at = family.layer.format(index)
        for i, name in enumerate((family.query, family.key, family.value)):
            block.qkv_weight[:, i] = state[f"{at}{name}.weight"].unflatten(0, (heads, -1))
            block.qkv_bias[:, i] = state[f"{at}{name}.bias"].unflatten(0, (heads, -1))
        block.out_weight.copy_(state[f"{at}{family.out}.weight"].T.unflatten(0, (heads, -1)))
        block.out_bias.copy_(state[f"{at}{family.out}.bias"])
        block.up_weight.copy_(state[f"{at}{family.up}.weight"].unflatten(0, (heads, -1)))
        block.up_bias.copy_(state[f"{at}{family.up}.bias"].unflatten(0, (heads, -1)))
        block.down_weight.copy_(state[f"{at}{family.down}.weight"].T.unflatten(0, (heads, -1)))
        block.down_bias.copy_(state[f"{at}{family.down}.bias"])
        put(block.attention_norm, at + family.attention_norm)
        put(block.ffn_norm, at + family.ffn_norm)
    for exit_ in encoder.exits:
        put(exit_.dense, family.pooler)
    if dynamic.config.last_pooling == "cls":
        put(encoder.exits[-1].dense, family.head)
        put(encoder.exits[-1].classifier, family.classifier)


def load_source(path: str | Path, num_labels: int) -> PreTrainedModel:
    """The `transformers` model at `path` (folder or Hub id): with its classifier if that has `num_labels` classes.

    Raises:
        DHTError: nothing loadable there.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        classifier = any("SequenceClassification" in name for name in config.architectures or [])
        if classifier and config.num_labels == num_labels:
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True)
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
    for weight in (block.up_weight, block.up_bias, block.down_weight):
        flat = weight.flatten(0, 1)
        weight.copy_(flat[order].view_as(weight))


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
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "vocab_size",
             "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps",
             "pad_token_id", "id2label", "label2id")  # fmt: skip
    sizes = {name: getattr(config, name) for name in names}
    if family.types:
        sizes["type_vocab_size"] = config.type_vocab_size
    if family.bias:
        sizes["relative_attention_num_buckets"] = config.relative_attention_num_buckets
    plain: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(config.source, **sizes)
    )
    prefix = f"{plain.base_model_prefix}."
    own = set(plain.state_dict())
    state: dict[str, Tensor] = {}

    def put(name: str | None, **parts: Tensor) -> None:
        for part, tensor in parts.items():
            if name:
                full = f"{name}.{part}"
                state[full if full in own else prefix + full] = tensor.detach().contiguous()

    def module(name: str | None, source: nn.Module) -> None:
        put(name, **dict(source.named_parameters(recurse=False)))

    encoder, head = dynamic.encoder, dynamic.encoder.exits[-1]
    module(family.words, encoder.embeddings.words)
    module(family.positions, encoder.embeddings.positions)
    module(family.norm, encoder.embeddings.norm)
    if encoder.embeddings.types is not None:
        module(family.types, encoder.embeddings.types)
    if encoder.position_bias is not None:
        module(family.bias, encoder.position_bias.values)
    for index, block in enumerate(encoder.blocks):
        at = family.layer.format(index)
        for i, name in enumerate((family.query, family.key, family.value)):
            put(at + name, weight=block.qkv_weight[:, i].flatten(0, 1), bias=block.qkv_bias[:, i].flatten())
        put(at + family.out, weight=block.out_weight.flatten(0, 1).T, bias=block.out_bias)
        put(at + family.up, weight=block.up_weight.flatten(0, 1), bias=block.up_bias.flatten())
        put(at + family.down, weight=block.down_weight.flatten(0, 1).T, bias=block.down_bias)
        module(at + family.attention_norm, block.attention_norm)
        module(at + family.ffn_norm, block.ffn_norm)
    module(family.head or family.pooler, head.dense)
    module(family.classifier, head.classifier)
    with torch.no_grad():
        missing, unexpected = plain.load_state_dict(state, strict=False)
    lost = [name for name in missing if "position_ids" not in name]
    assert not [*lost, *unexpected], f"name map of {config.source} is incomplete: {lost} {unexpected}"
    return plain
