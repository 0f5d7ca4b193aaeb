"""The full model as plain `transformers`: every layer, every head unit, no policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._files import atomic_dir
from ..errors import DHTError
from ..hf.convert import export
from ..hf.modeling import DHTForSequenceClassification
from ..policy.baselines import DensePolicy
from ..task import Embedding
from .graphs import EmbeddingsGraph, LayerGraph
from .onnx_file import TOLERANCE, sample_rows

CHECKED_ROWS = 32


def export_dense(
    model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, types: bool, out: Path
) -> dict[str, Any]:
    """Writes the dense model and the tokenizer as a folder for `from_pretrained`, and returns what was measured.

    The classifier comes along where the family's own head computes what the last exit does (`pooling="cls"`, as in a
    converted classifier). Otherwise the encoder is written alone: a head that answers differently would be a trap.

    Args:
        model: on the CPU.
        types: True if the model takes `token_type_ids`.
        out: the folder.

    Returns:
        head: True if the classifier came along (left out for embeddings, which have none). rows_checked, and
        max_difference of its logits, or of the last hidden states.

    Raises:
        DHTError: the weights came from no family, the two do not agree, or the folder cannot be written.
    """
    dense = export(model).eval()
    rows = sample_rows(model, types, CHECKED_ROWS, 32)
    with torch.inference_mode():
        head, embeds = False, isinstance(model.task, Embedding)
        if not embeds:
            expected = model(**rows, policy=DensePolicy(model.config.num_attention_heads)).logits
            apart = (dense(**rows).logits - expected).abs()
            difference = float((apart[rows["attention_mask"].bool()] if model.tags else apart).max())
            head = difference <= TOLERANCE
        if not head:
            body: PreTrainedModel = dense.base_model
            keep = rows["attention_mask"].bool()
            difference = float((body(**rows).last_hidden_state - _states(model, rows))[keep].abs().max())
            dense = body
    if not difference <= TOLERANCE:
        raise DHTError(
            f"{out}: transformers and dht disagree by {difference:.2g} in the last hidden states; nothing was written: "
            "report this with the versions that dht doctor prints"
        )
    with atomic_dir(out) as fresh:
        dense.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    report = {"rows_checked": CHECKED_ROWS, "max_difference": difference}
    return report if embeds else {"head": head} | report


def _states(model: DHTForSequenceClassification, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, T, D], hidden states after the last layer."""
    encoder, every = model.encoder, torch.ones(model.config.num_attention_heads, dtype=torch.bool)
    states: torch.Tensor = EmbeddingsGraph(encoder)(**rows)
    for layer in range(len(encoder.blocks)):
        (states,) = LayerGraph(encoder, layer + 1, every, reads=False)(states, rows["attention_mask"])
    return states
