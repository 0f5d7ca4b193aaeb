"""One ONNX file from one module, what it is fed, and how long a runtime takes."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._extras import optional
from ..errors import DHTError
from ..hf.modeling import DHTForSequenceClassification

TOLERANCE = 1e-3
"""Largest difference of logits between onnxruntime and torch that passes for rounding (float32, a dozen layers)."""


def write_onnx(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], path: Path) -> None:
    """Writes `module` as one ONNX file; the first axis of every input is the batch, the second the tokens.

    Args:
        inputs: an example of each, in the order of the module's arguments, with 2 rows and 2 tokens or more.
        outputs: names of what the module returns.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        DHTError: the exporter of torch cannot trace the module.
    """
    for package in ("onnx", "onnxscript"):
        optional(package, "onnx", "export to ONNX")
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    before = logging.root.manager.disable
    # The exporter warns of its own deprecations and of packages that nothing here needs.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                path,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=tuple({0: batch, 1: tokens} for _ in inputs),
            )
        except OSError:  # a full disk and the like: whoever writes says so
            raise
        except Exception as error:  # of torch.export, onnxscript and onnx: any class
            raise DHTError(
                f"export to ONNX: torch {torch.__version__} cannot trace the model ({first_line(error)}); report this "
                "with the versions that dht doctor prints"
            ) from error
        finally:
            logging.disable(before)
    assert program is not None
    shapes = [value.shape for value in program.model.graph.inputs]
    assert not any(isinstance(size, int) for shape in shapes for size in list(shape or [])[:2]), (
        "a traced size is fixed"
    )


def open_onnx(path: Path) -> Any:
    """An onnxruntime session on the CPU with as many threads as torch uses.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    runtime = optional("onnxruntime", "onnx", "export to ONNX")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sample_rows(model: DHTForSequenceClassification, types: bool, rows: int, longest: int) -> dict[str, Tensor]:
    """Random rows of 1 to `longest` tokens: `input_ids`, `attention_mask` and, if asked for, `token_type_ids`."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(0, model.config.vocab_size, (rows, longest), generator=generator)
    pad = model.config.pad_token_id or 0
    ids[ids == pad] = pad + 1  # some families tell padding by the id
    batch = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if types:
        starts = lengths // 2
        batch["token_type_ids"] = (torch.arange(longest) >= starts[:, None]).long() * mask
    return batch


def first_line(error: Exception) -> str:
    """What another library's error says first, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def latency_ms(run: Callable[[], Any], repeats: int = 9) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    run()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return 1000 * statistics.median(taken)
