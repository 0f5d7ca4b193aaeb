"""A small saved run with a tokenizer of its own, and rows to train on."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from builders import SIZES, dynamic_model

WORDS = [f"w{i}" for i in range(SIZES["vocab_size"] - 5)]


@pytest.fixture(scope="session")
def tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    bare = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=SIZES["max_position_embeddings"],
    )  # fmt: skip


@pytest.fixture
def model():
    """A dynamic model whose policy lets rows leave at different layers."""
    model = dynamic_model("bert")
    model.config.id2label = {0: "bad", 1: "so so", 2: "good"}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.policy.price.fill_(0.5)
    return model


@pytest.fixture
def run(model, tokenizer, tmp_path):
    """A folder as `dht train` leaves it."""
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (24,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


@pytest.fixture
def rows(texts, tokenizer):
    """Tokenised rows whose label is the remainder of their length by three: something to learn."""
    return [{**tokenizer(text), "labels": len(text.split()) % 3} for text in texts]
