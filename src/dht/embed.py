"""`dht.embed`: sentence embeddings with a budget dial.

An embedding is the mean over a row's tokens at the layer where it left, mapped into the space of the last layer. What
is right needs no labels: it is what the full model says.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ._files import explained
from .curve import measure_curve
from .data import Split, Text, TextData
from .errors import DataError, shown
from .hf.convert import convert
from .hf.modeling import DHTForSequenceClassification
from .load import RUN_FILE, by_length, check_budget, load_run, told_of
from .maps import fit_maps
from .plan import Trace
from .policy.base import Policy
from .policy.baselines import DensePolicy
from .policy.reward import quality
from .predict import cleaned, encode_mixed
from .task import Embedding

FEWEST_TEXTS = 50


@dataclass
class Embedder:
    """A dynamic encoder that embeds texts.

    Attributes:
        model: its configuration has `head="embedding"`; `model.policy.set_budget(b)` turns the dial.
        max_length: tokens that a text is cut to.
    """

    model: DHTForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    max_length: int = 128

    def encode(self, texts: Sequence[Text], *, batch_size: int = 32, policy: Policy | None = None) -> Tensor:
        """Embeddings of the texts, float32 [n, D], in order.

        Args:
            policy: None = the learned one.

        Raises:
            DataError: a text is not a string.
        """
        return self.encode_and_spend(texts, batch_size=batch_size, policy=policy)[0]

    def encode_and_spend(
        self, texts: Sequence[Text], *, batch_size: int = 32, policy: Policy | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `encode`; and of each text the layers run, int64 [n], and FLOPs as a fraction of dense, float64 [n]."""
        rows = encode_mixed(self.tokenizer, cleaned(texts), self.max_length)
        batches, order = by_length(self.tokenizer, rows, batch_size)
        self.model.eval()
        width = self.model.config.hidden_size
        parts = [(torch.zeros(0, width), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64))]
        for batch in batches:
            with torch.inference_mode():
                inputs = {name: part.to(self.model.device) for name, part in batch.items()}
                trace: Trace = self.model(**inputs, policy=policy).trace
            parts.append((trace.logits.float().cpu(), trace.layers.cpu(), (trace.flops / trace.dense_flops).cpu()))
        back = torch.tensor(order, dtype=torch.long).argsort()
        vectors, layers, fractions = (torch.cat(column)[back] for column in zip(*parts, strict=True))
        return vectors, layers, fractions

    def save(self, folder: str | Path) -> None:
        """Writes model, policy and tokenizer; `load`, `dht predict` and `dht evaluate` read the folder.

        Raises:
            DHTError: it cannot be written.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.model_max_length = self.max_length
        with explained(Path(folder)):
            tokenizer.save_pretrained(folder)
            self.model.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", max_length: int | None = None) -> Embedder:
        """The embedder in a folder: one that `save` wrote, or a run of `dht train --task embedding`.

        Args:
            max_length: tokens that a text is cut to; None = as it was saved or trained with.

        Raises:
            DHTError: nothing loadable there, or a model for another task.
        """
        model, tokenizer = load_run(folder, device)
        if not isinstance(model.task, Embedding):
            raise DataError(f"{folder}: a model for {model.task.name}, not for embeddings; train with --task embedding")
        trained_with = told_of(folder, "max_length") if (Path(folder) / RUN_FILE).is_file() else None
        return cls(model, tokenizer, max_length or trained_with or tokenizer.model_max_length)


def fit_embedder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    budget: float = 0.5,
    max_length: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    **settings: Any,
) -> Embedder:
    """An embedder with the weights of `model`, which stay as they are; a full plan gives the mean of its last layer.

    Half of the texts fit the maps of the exits, the other half, which the maps have not seen, pay the policy and
    measure its prices. Only depth is chosen. The more texts the better (each map has D x D weights): 2,000 and more.

    Args:
        model: a `transformers` encoder of one of the families.
        texts: `FEWEST_TEXTS` or more, unlabelled, such as those that will be embedded.
        budget: fraction of dense FLOPs that is served until another one is set, in (0, 1].
        max_length: tokens that a text is cut to.
        batch_size: rows that run together.
        seed: of the halves.
        settings: further fields of `DHTConfig`.

    Raises:
        DataError: too few texts, or one that is not a string. ConfigError: the budget. DHTError: a family that does not
            convert.
    """
    check_budget(budget)
    if isinstance(texts, str) or len(texts) < FEWEST_TEXTS:
        got = f"one string, {shown(texts)}" if isinstance(texts, str) else str(len(texts))
        raise DataError(f"texts: got {got}; fitting needs a list of {FEWEST_TEXTS} or more")
    texts = cleaned(texts)
    heads = model.config.num_attention_heads
    dynamic = convert(model, 1, head="embedding", widths=[heads], budget=budget, policy_seed=seed, **settings)
    cast(nn.Module, dynamic).to(model.device).eval()
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    rows = encode_mixed(tokenizer, [texts[i] for i in order], max_length)
    half = len(rows) // 2
    first, second = (
        [{k: v.to(dynamic.device) for k, v in batch.items()} for batch in by_length(tokenizer, part, batch_size)[0]]
        for part in (rows[:half], rows[half:])
    )
    with torch.no_grad():
        dense = DensePolicy(heads).to(dynamic.device)
        tables = [dynamic(**batch, policy=dense, every_exit=True).trace.exit_table()[0] for batch in first]
        means = torch.cat(tables).float()
        fit_maps(list(dynamic.encoder.exits), means.unbind(1), means[:, -1])
        dynamic.policy.restart()
        dynamic.policy.expect_lengths(second)
        for batch in second:
            trace: Trace = dynamic(**batch, mode="probe").trace
            full = trace.exit_table()[0][:, -1]
            dynamic.policy.observe(trace, quality(trace, full, dynamic.task))
            dynamic.policy.finish_step()
    measure_curve(dynamic, second, budget)
    return Embedder(dynamic, tokenizer, max_length)


def with_embeddings(
    data: TextData, model: DHTForSequenceClassification, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TextData:
    """The data with the full model's embeddings, float32 [D], for labels."""
    dense = DensePolicy(model.config.num_attention_heads).to(model.device)
    teacher = Embedder(model, tokenizer, max_length)

    def told(split: Split | None) -> Split | None:
        if split is None:
            return None
        return replace(split, labels=list(teacher.encode(split.inputs, policy=dense).unbind()))

    return replace(data, train=told(data.train), validation=told(data.validation), test=told(data.test))
