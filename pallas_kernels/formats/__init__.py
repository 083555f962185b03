"""Quantised weight formats: how blocks lie in a GGUF file, how they lie on the device, and what they mean."""

from __future__ import annotations

from pallas_kernels.formats.base import Quantized, Terms
from pallas_kernels.formats.iq2_xxs import IQ2_XXS
from pallas_kernels.formats.k_quants import Q2_K, Q4_K
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.formats.q8_0 import BLOCK, BLOCK_BYTES, HALF, Q8_0, WORDS

# By the name that GGUF gives them.
FORMATS: dict[str, type[Quantized]] = {format.__name__: format for format in (Q8_0, IQ2_XXS, Q2_K, Q4_K, MXFP4)}

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "FORMATS",
    "HALF",
    "IQ2_XXS",
    "MXFP4",
    "Q2_K",
    "Q4_K",
    "Q8_0",
    "WORDS",
    "Quantized",
    "Terms",
]
