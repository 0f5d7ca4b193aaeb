"""A small saved run with a tokenizer of its own, rows to train on, and real processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from builders import SIZES, dynamic_model

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def launch():
    """Runs a program in two processes of its own and returns what they printed; both must end well."""

    def run(launcher: str, *program: str | Path) -> str:
        # --cpu starts one process only; --multi_gpu starts several, which use gloo where there is no GPU.
        start = {
            "accelerate": [
                "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
                "--num_cpu_threads_per_process", "1",
            ],
            "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
        }[launcher]  # fmt: skip
        here = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *start, *map(str, program)], env=os.environ | here, capture_output=True, text=True,
            timeout=150,
        )  # fmt: skip
        assert not done.returncode, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout + done.stderr

    return run
