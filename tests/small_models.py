"""Three layers of golden model a, one of each kind, for tests that compile several programs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from numerics import arrays, golden_config, golden_tensors

from ds4jax.language_model import LanguageModel
from ds4jax.model.parameters import build, shapes

DRAFTS = 2


@functools.cache
def small_model(cache: str = "float32") -> LanguageModel:
    """Layers 1 to 3 of the golden model with its MTP block, opened for two drafts."""
    return _model((1, 2, 3), cache, DRAFTS)


@functools.cache
def shallow_model() -> LanguageModel:
    """Layer 2 of the golden model, of ratio 4, opened for two drafts; without its MTP block it compiles in half of the time."""
    return _model((2,), "float32", DRAFTS)


@functools.cache
def roomy_model() -> LanguageModel:
    """The same layer with a context of 131,072 tokens."""
    return _model((2,), "float32", DRAFTS, max_context=131072)


def _model(layers: tuple[int, ...], cache: str, drafts: int, **others: Any) -> LanguageModel:
    whole = dataclasses.replace(golden_config(cache != "float32", cache), **others)
    ratios = (*(whole.compress_ratios[layer] for layer in layers), whole.mtp_ratio)
    hashed = sum(layer < whole.n_hash_layers for layer in layers)
    config = dataclasses.replace(whole, n_layers=len(layers), n_hash_layers=hashed, compress_ratios=ratios)
    names = {f"layers.{old}.": f"layers.{new}." for new, old in enumerate(layers)}
    held = {}
    for name, value in golden_tensors(golden_config()):
        start = ".".join(name.split(".")[:2]) + "."
        held[name.replace(start, names.get(start, "dropped."), 1) if start.startswith("layers.") else name] = value
    return LanguageModel(build(config, ((name, held[name]) for name in shapes(config))), None, max_draft=drafts)


def text(start: int, count: int) -> np.ndarray:
    """Tokens of the golden text, from anywhere on: int32 [count]."""
    return np.resize(np.roll(arrays("golden")["ids"], -start), count)
