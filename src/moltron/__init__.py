"""moltron: train, fine-tune and run biomolecular language models.

from moltron import load_model
vectors = load_model("runs/esm2_8M").embed(["MKTAYIAKQRQISFVKSHFSRQ"])
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("moltron")
except PackageNotFoundError:  # src/ on the path, not installed
    __version__ = "0+source"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    """`load_model` brings torch along: it is imported when it is asked for."""
    if name == "load_model":
        return import_module("moltron.infer.api").load_model
    raise AttributeError(f"module 'moltron' has no attribute {name!r}")
