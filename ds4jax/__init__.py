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
    from ds4jax.decode.drafter import Drafter, Drafts
    from ds4jax.decode.sampling import Sampling
    from ds4jax.engine.engine import Engine
    from ds4jax.engine.generation import Generation
    from ds4jax.engine.options import Result
    from ds4jax.engine.session import Session
    from ds4jax.evaluation.trace import Trace
    from ds4jax.language_model import LanguageModel, generate, load, restore
    from ds4jax.text.encoder import ChatPrompt, chat_prompt
    from ds4jax.text.parse_reply import parse_reply
    from ds4jax.text.parsed import ParsedReply
    from ds4jax.text.reply_parser import ReplyParser
    from ds4jax.text.tokenizer import Tokenizer
    from ds4jax.training.dspark import dspark_loss
    from ds4jax.training.mtp import mtp_loss

__version__ = "0.2.0"
__all__ = [
    "ChatPrompt",
    "Config",
    "Drafter",
    "Drafts",
    "Engine",
    "Generation",
    "InputError",
    "LanguageModel",
    "ParsedReply",
    "ReplyParser",
    "Result",
    "Sampling",
    "Session",
    "Tokenizer",
    "Trace",
    "chat_prompt",
    "dspark_loss",
    "generate",
    "load",
    "mtp_loss",
    "parse_reply",
    "restore",
]

_HOME = {
    "ChatPrompt": "text.encoder",
    "Drafter": "decode.drafter",
    "Drafts": "decode.drafter",
    "Engine": "engine.engine",
    "Generation": "engine.generation",
    "LanguageModel": "language_model",
    "ParsedReply": "text.parsed",
    "ReplyParser": "text.reply_parser",
    "Result": "engine.options",
    "Sampling": "decode.sampling",
    "Session": "engine.session",
    "Tokenizer": "text.tokenizer",
    "Trace": "evaluation.trace",
    "chat_prompt": "text.encoder",
    "dspark_loss": "training.dspark",
    "generate": "language_model",
    "load": "language_model",
    "mtp_loss": "training.mtp",
    "parse_reply": "text.parse_reply",
    "restore": "language_model",
}


def __getattr__(name: str) -> Any:
    """Import modules that need JAX on first use, so the command line reports a wrong option without delay."""
    if name not in _HOME:
        raise AttributeError(f"module 'ds4jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ds4jax.{_HOME[name]}"), name)
