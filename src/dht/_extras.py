"""Packages that only some parts need: which extra installs each, and one error that says so."""

from __future__ import annotations

import importlib
from typing import Any

from dht.errors import DHTError

__all__ = ["EXTRAS", "MissingExtraError", "optional"]

EXTRAS = {
    "data": ("datasets", "pyarrow"),
    "sklearn": ("scikit-learn",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "sentence": ("sentence-transformers",),
}
"""Extra of dht -> the packages that it installs."""
_PACKAGE = {"sklearn": "scikit-learn", "sentence_transformers": "sentence-transformers"}


class MissingExtraError(DHTError, ImportError):
    """A package is not installed that an extra of dht would install."""


def optional(
    module: str, extra: str, purpose: str, otherwise: str = "", error: type[DHTError] = MissingExtraError
) -> Any:
    """The module called `module`, imported now.

    Args:
        extra: what installs it, a key of `EXTRAS`.
        purpose: the subject of the error's first sentence.
        otherwise: what else the user can do.
        error: the class to raise.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        advice = f'run pip install "dht-transformer[{extra}]"' + (f", {otherwise}" if otherwise else "")
        package = _PACKAGE.get(module.split(".")[0], module.split(".")[0])
        raise error(f"{purpose} needs {package}, which is not installed; {advice}") from None
