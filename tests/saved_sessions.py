"""A saved session of the golden model, for the tests of saving and of broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numerics import arrays

from ds4jax.engine.session import Session
from ds4jax.language_model import LanguageModel

OPTIONS = {"strict": True, "ignore_eos": True, "max_new_tokens": 40}


def text(start: int, count: int) -> list[int]:
    """Tokens of the golden text, from anywhere on."""
    return np.roll(arrays("golden")["ids"], -start)[:count].tolist()


def interrupted(model: LanguageModel, folder: Path) -> Path:
    """A session that was saved in the middle of its continuation."""
    session = Session(model, **OPTIONS)
    session.stream(text(0, 40)).advance(7)
    path = folder / "whole"
    session.save(path)
    return path
