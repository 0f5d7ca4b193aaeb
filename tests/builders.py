"""Small random encoders and batches at awkward sizes, shared by the tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from dht.hf.configuration import DHTConfig
from dht.hf.convert import convert
from dht.hf.modeling import DHTForSequenceClassification
from dht.plan import Plan

SIZES = {
    "vocab_size": 97,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 95,
    "num_labels": 3,
    "max_position_embeddings": 64,
}
_CHANGED = {
    "electra": {"embedding_size": 36},
    "distilbert": {"hidden_dim": SIZES["intermediate_size"]},
    "modernbert": {"local_attention": 6, "pad_token_id": 0}
    | dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
}
"""What a family does not call as the others do, and a window that the longest rows exceed."""
LENGTHS = (13, 1, 4, 9, 9, 2, 7)


def plain_model(family: str, seed: int = 0, **changes):
    """A classifier of `transformers` with weights large enough that every part matters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SIZES | _CHANGED.get(family, {}) | changes)
    return _spread(AutoModelForSequenceClassification.from_config(config)).eval()


def dynamic_model(family: str = "bert", seed: int = 0, **settings) -> DHTForSequenceClassification:
    """A small dynamic model; `family` "dht" is the pre-norm preset."""
    settings = {"widths": [2, 4, 5], "wide_from": 3, "context_projection": 3, "train_widths": "all"} | settings
    torch.manual_seed(seed)
    if family == "dht":
        model = _spread(
            DHTForSequenceClassification(DHTConfig(**SIZES | {"norm": "pre", "type_vocab_size": 0} | settings))
        )
    else:
        model = convert(plain_model(family, seed), **settings)
        for exit_ in model.encoder.exits[:-1]:
            _spread(exit_)
    return model.eval()


def _spread(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return module


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, pad: int = 0, labels: int = 3) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels of rows of the given lengths, padded on the right with `pad`."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths, default=1)
    mask = (torch.arange(longest) < torch.tensor(lengths, dtype=torch.long)[:, None]).long()
    ids = torch.randint(5, SIZES["vocab_size"], (len(lengths), longest), generator=generator)
    return {
        "input_ids": torch.where(mask.bool(), ids, pad),
        "attention_mask": mask,
        "labels": torch.randint(0, labels, (len(lengths),), generator=generator),
    }


def random_plan(rows: int, layers: int = 3, heads: int = 5, seed: int = 0) -> Plan:
    """Every row its own depth, and its own head set in every layer."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.rand(rows, layers, heads, generator=generator) < 0.5
    units[..., 0] |= ~units.any(-1)
    depth = torch.randint(1, layers + 1, (rows,), generator=generator)
    return Plan(units & (torch.arange(layers) < depth[:, None])[..., None])
