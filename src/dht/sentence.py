"""`DHTModule`: a dynamic embedder as the first module of a `sentence-transformers` model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._extras import optional
from .data import Text
from .embed import Embedder
from .load import check_budget, collate
from .predict import encode_mixed

optional("sentence_transformers", "sentence", "dht.sentence")
from sentence_transformers.base.modules import InputModule  # noqa: E402

__all__ = ["DHTModule"]


class DHTModule(InputModule):
    """Stands for both the transformer and the pooling: `SentenceTransformer(modules=[DHTModule(embedder)])`.

    `encode`, `similarity`, the evaluators and `save` work. `sentence-transformers` imports modules of other packages
    only with `trust_remote_code=True`; `SentenceTransformer(modules=[DHTModule.load(folder)])` loads without it.

    Args:
        embedder: from `dht.embed`.
        budget: fraction of dense FLOPs, in (0, 1]; None = as the embedder has it.
    """

    def __init__(self, embedder: Embedder, budget: float | None = None) -> None:
        super().__init__()
        self.embedder, self.model, self.tokenizer = embedder, embedder.model, embedder.tokenizer
        if budget is not None:
            self.set_budget(budget)

    def set_budget(self, budget: float) -> None:
        """Turns the dial; raises `ConfigError` outside (0, 1]."""
        self.model.policy.set_budget(check_budget(budget))

    @property
    def max_seq_length(self) -> int:
        """Tokens that a text is cut to."""
        return self.embedder.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.embedder.max_length = value

    def get_embedding_dimension(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    def preprocess(self, inputs: Sequence[Text], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """A padded batch of texts or pairs."""
        texts: list[Text] = [text if isinstance(text, str) else (text[0], text[1]) for text in inputs]
        if prompt:
            texts = [prompt + text if isinstance(text, str) else (prompt + text[0], text[1]) for text in texts]
        return collate(self.tokenizer, encode_mixed(self.tokenizer, texts, self.embedder.max_length))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [B, D], and `layers` [B] and `flops_fraction` [B], what each row took."""
        known = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in features}
        trace = self.model(**known).trace
        taken = {"layers": trace.layers, "flops_fraction": trace.flops / trace.dense_flops}
        return features | {"sentence_embedding": trace.logits} | taken

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes the embedder's files."""
        self.embedder.save(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> DHTModule:
        """The module that was saved in a folder or pushed to the Hub."""
        names = ("token", "cache_folder", "revision", "local_files_only")
        where = {name: kwargs[name] for name in names if name in kwargs}
        folder = cls.load_dir_path(model_name_or_path, subfolder=subfolder, **where)
        return cls(Embedder.load(str(folder), device="cpu"))
