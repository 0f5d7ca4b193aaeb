"""What each architecture of `transformers` calls our modules and settings: one name map per family, read both ways."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig

from ..errors import DHTError
from .configuration import DHTConfig

_SAME = {
    name: name
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps",
        "pad_token_id",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The modules of an architecture by their names; None = it has no such module. `layer` prefixes a layer's parts.

    Args:
        qkv: query, key and value, or one module that holds all three.
        up: holds both halves of a gated FFN.
        project: from the embeddings' width to the encoder's.
        bias: relative position bias shared by the layers.
        pooler: of a base model; starts every exit head.
        head, head_norm, classifier: a sequence classifier's own head; `head` None = it reads the pooler.
        settings: our name of a setting -> theirs.
        fixed: settings that the architecture itself decides.
        skips_padding: positions are counted from `pad_token_id` + 1.
        rotary: rotary positions and sliding windows instead of learned positions.
    """

    words: str = "embeddings.word_embeddings"
    positions: str | None = "embeddings.position_embeddings"
    types: str | None = "embeddings.token_type_embeddings"
    norm: str = "embeddings.LayerNorm"
    project: str | None = None
    layer: str = "encoder.layer.{}."
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    ffn_norm: str = "output.LayerNorm"
    final_norm: str | None = None
    bias: str | None = None
    pooler: str | None = "pooler.dense"
    head: str | None = None
    head_norm: str | None = None
    classifier: str = "classifier"
    settings: dict[str, str] = field(default_factory=lambda: _SAME | {"type_vocab_size": "type_vocab_size"})
    fixed: dict[str, Any] = field(default_factory=dict)
    skips_padding: bool = False
    rotary: bool = False


BERT = Family()
ROBERTA = replace(BERT, head="classifier.dense", classifier="classifier.out_proj", skips_padding=True)
ELECTRA = replace(
    BERT,
    project="embeddings_project",
    pooler=None,
    head="classifier.dense",
    classifier="classifier.out_proj",
    settings=BERT.settings | {"embedding_size": "embedding_size"},
    fixed={"last_activation": "gelu"},
)
MPNET = replace(
    ROBERTA,
    types=None,
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    bias="encoder.relative_attention_bias",
    settings=_SAME | {"relative_attention_num_buckets": "relative_attention_num_buckets"},
    fixed={"type_vocab_size": 0},
)
DISTILBERT = replace(
    BERT,
    types=None,
    layer="transformer.layer.{}.",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    ffn_norm="output_layer_norm",
    pooler=None,
    head="pre_classifier",
    settings={name: name for name in ("vocab_size", "max_position_embeddings", "pad_token_id")}
    | {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    fixed={"type_vocab_size": 0, "layer_norm_eps": 1e-12, "last_activation": "relu"},
)
MODERNBERT = Family(
    words="embeddings.tok_embeddings",
    positions=None,
    types=None,
    norm="embeddings.norm",
    layer="layers.{}.",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    attention_norm="attn_norm",
    up="mlp.Wi",
    down="mlp.Wo",
    ffn_norm="mlp_norm",
    final_norm="final_norm",
    pooler=None,
    head="head.dense",
    head_norm="head.norm",
    settings=_SAME
    | {
        "hidden_act": "hidden_activation",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "layer_norm_eps": "norm_eps",
        "attention_bias": "attention_bias",
        "ffn_bias": "mlp_bias",
        "norm_bias": "norm_bias",
        "last_activation": "classifier_activation",
        "last_bias": "classifier_bias",
    },
    fixed={"type_vocab_size": 0, "norm": "modern", "gated_ffn": True, "last_norm": True},
    rotary=True,
)
FAMILIES = {
    "bert": BERT,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "modernbert": MODERNBERT,
    "mpnet": MPNET,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}
"""Every architecture that converts, by its `model_type`."""


def family_of(source: PreTrainedConfig) -> Family:
    """The name map of an architecture.

    Raises:
        DHTError: there is none.
    """
    family = FAMILIES.get(source.model_type)
    if family is None:
        raise DHTError(
            f"model: cannot convert architecture {source.model_type!r}; what works: {', '.join(sorted(FAMILIES))}"
        )
    return family


def settings_of(source: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `DHTConfig` that describe the encoder of a `transformers` configuration.

    Raises:
        DHTError: the architecture has no name map, or a variant that we do not run.
    """
    family = family_of(source)
    if getattr(source, "is_decoder", False):
        raise DHTError(f"model: this {source.model_type!r} has is_decoder=True; only encoders convert")
    settings = {ours: getattr(source, theirs) for ours, theirs in family.settings.items()}
    settings |= family.fixed | {"source": source.model_type}
    if family.skips_padding:
        settings["position_offset"] = source.pad_token_id + 1
    if family.rotary:
        kinds = source.layer_types
        scaled = {kind: source.rope_parameters[kind]["rope_type"] for kind in kinds}
        odd = sorted(f"{kind}: {name}" for kind, name in scaled.items() if name != "default")
        if odd:
            raise DHTError(f"model: rope_parameters scale the rotary positions ({', '.join(odd)}); 'default' works")
        settings["rotary_thetas"] = [source.rope_parameters[kind]["rope_theta"] for kind in kinds]
        settings["windows"] = [source.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    return settings


def source_settings(config: DHTConfig) -> dict[str, Any]:
    """The inverse of `settings_of`: the fields of the source's configuration, classes and head included."""
    family = FAMILIES[config.source]
    settings = {theirs: getattr(config, ours) for ours, theirs in family.settings.items()}
    settings |= {"id2label": config.id2label, "label2id": config.label2id}
    if config.problem_type is not None:
        settings["problem_type"] = config.problem_type
    if family.rotary:
        assert config.rotary_thetas is not None
        assert config.windows is not None
        kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
        nearest = [window for window in config.windows if window is not None]
        thetas = dict(zip(kinds, config.rotary_thetas, strict=True))
        settings |= {
            "layer_types": kinds,
            "rope_parameters": {k: {"rope_type": "default", "rope_theta": theta} for k, theta in thetas.items()},
            "classifier_pooling": "cls" if config.last_pooling == "cls" else "mean",
        }
        if nearest:
            settings["local_attention"] = 2 * nearest[0]
    return settings
