"""DeepSeek-V4-Flash inference in JAX.

>>> import ds4jax
>>> model = ds4jax.load()
>>> print(model.generate("In the beginning", max_new_tokens=16).text)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds4jax.config import Config
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.generation import Generation, Result
    from ds4jax.language_model import LanguageModel, generate, load
    from ds4jax.sampling import Sampling
    from ds4jax.saving import restore
    from ds4jax.session import Session
    from ds4jax.tokenizer import Tokenizer
    from ds4jax.trace import Trace
    from ds4jax.training.mtp import mtp_loss

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Generation",
    "InputError",
    "LanguageModel",
    "Result",
    "Sampling",
    "Session",
    "Tokenizer",
    "Trace",
    "generate",
    "load",
    "mtp_loss",
    "restore",
]

_HOME = {
    "Generation": "generation",
    "LanguageModel": "language_model",
    "Result": "generation",
    "Sampling": "sampling",
    "Session": "session",
    "Tokenizer": "tokenizer",
    "Trace": "trace",
    "generate": "language_model",
    "load": "language_model",
    "mtp_loss": "training.mtp",
    "restore": "saving",
}


def __getattr__(name: str) -> Any:
    """Import what needs JAX only when it is asked for, so that a wrong option on the command line is told at once."""
    if name not in _HOME:
        raise AttributeError(f"module 'ds4jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ds4jax.{_HOME[name]}"), name)
