"""Quantised weight formats: the layout in a GGUF file, the layout on the device, and the values."""

from __future__ import annotations

from pallas_kernels.formats.base import Quantized, Terms
from pallas_kernels.formats.iq1 import IQ1_M, IQ1_S
from pallas_kernels.formats.iq2_s import IQ2_S
from pallas_kernels.formats.iq2_xs import IQ2_XS
from pallas_kernels.formats.iq2_xxs import IQ2_XXS
from pallas_kernels.formats.iq3_s import IQ3_S
from pallas_kernels.formats.iq3_xxs import IQ3_XXS
from pallas_kernels.formats.iq4 import IQ4_NL, IQ4_XS
from pallas_kernels.formats.k_quants import Q2_K, Q4_K
from pallas_kernels.formats.legacy import Q4_0, Q4_1, Q5_0, Q5_1
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.formats.q3_k import Q3_K
from pallas_kernels.formats.q5_k import Q5_K
from pallas_kernels.formats.q6_k import Q6_K
from pallas_kernels.formats.q8_0 import BLOCK, BLOCK_BYTES, HALF, Q8_0, WORDS

# In a layout of their own, which kernels read.
_LAID_OUT: tuple[type[Quantized], ...] = (Q8_0, IQ2_XXS, IQ2_S, IQ3_XXS, Q2_K, Q4_K, Q5_K, Q6_K, MXFP4)
# As the file has them, without kernels.
_STORED: tuple[type[Quantized], ...] = (Q3_K, IQ3_S, IQ4_XS, IQ4_NL, IQ2_XS, IQ1_S, IQ1_M, Q4_0, Q4_1, Q5_0, Q5_1)
# By their names in GGUF.
FORMATS: dict[str, type[Quantized]] = {format.__name__: format for format in (*_LAID_OUT, *_STORED)}

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "FORMATS",
    "HALF",
    "IQ2_S",
    "IQ2_XXS",
    "IQ3_XXS",
    "MXFP4",
    "Q2_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "WORDS",
    "Quantized",
    "Terms",
]
