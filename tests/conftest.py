"""What every test shares: two threads (or OMP_NUM_THREADS), fixed seeds, no hub, embedded assets.

Tensor rows that nobody wrote show as NaN.
"""

from __future__ import annotations

import os

# Before transformers and torch are imported: no test may reach a hub, and matrix products on a GPU are reproducible.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from dht import assets

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
# Deterministic mode also fills torch.empty with NaN, so that a row nobody wrote cannot pass for a result.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

settings.register_profile(
    "dht",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("dht")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test draw from it)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    return assets.model_path("minilm")


@pytest.fixture(scope="session")
def vader_path() -> Path:
    return assets.data_path("vader")
