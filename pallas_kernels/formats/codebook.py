"""Codebooks of the I-quants, from the `gguf` package, which ggml's authors keep with the format."""

from __future__ import annotations

import functools
import importlib

import numpy as np


@functools.cache
def codebook(name: str) -> np.ndarray:
    """Patterns of a format, int8 [patterns, weights of a pattern].

    The package is imported here, when a program that decodes the format is first traced, so that importing `pallas_kernels` does
    not wait for it.

    Args:
        name: of the format in GGUF.
    """
    format = getattr(importlib.import_module("gguf.quants"), name)
    format.init_grid()
    patterns: np.ndarray = format.grid.reshape(format.grid_shape).astype(np.int8)
    return patterns
