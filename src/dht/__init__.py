"""dht: a transformer that decides for every input how many layers and which head units to run."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "DHTConfig": "dht.hf.configuration",
    "DHTForSequenceClassification": "dht.hf.modeling",
    "DHTForTokenClassification": "dht.hf.modeling",
    "convert": "dht.hf.convert",
    "fit": "dht.fitting",
    "Plan": "dht.plan",
    "Trace": "dht.plan",
    "load_data": "dht.data",
    "quantize": "dht.model.quantize",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> object:
    """Imports public names on first use, so that `import dht` and `dht --help` stay light."""
    if name not in _WHERE:
        raise AttributeError(f"module 'dht' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
