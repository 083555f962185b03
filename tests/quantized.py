"""Random quantised weights that tests share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import FORMATS, MXFP4, Quantized
from pallas_kernels.formats.iq1 import IQ1_M
from pallas_kernels.formats.stored import Stored


def layouts() -> list[str]:
    """Formats that differ in their layout on the device: one stands for all that have none of their own."""
    stored = [name for name, format in FORMATS.items() if issubclass(format, Stored)]
    return [*(name for name in FORMATS if name not in stored), stored[0]]


def random_blocks(
    format: type[Quantized], shape: tuple[int, ...], seed: int = 0, *, least: int = -7, most: int = 0
) -> np.ndarray:
    """Rows of a weight [..., N, K] as a file stores them: random bytes, scales between these powers of ten.

    As they are given, some scales lie below float16's normal range.
    """
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // format.BLOCK, format.BLOCK_BYTES), np.uint8)

    def scale() -> np.ndarray:
        numbers = random.standard_normal(blocks.shape[:-1]) * 10.0 ** random.integers(least, most, blocks.shape[:-1])
        return numbers.astype(np.float16)

    for place in format.FLOAT16:
        blocks[..., place : place + 2] = scale()[..., None].view(np.uint8)
    if format is MXFP4:
        blocks[..., 0] = random.integers(110, 130, blocks.shape[:-1])
    if format is IQ1_M:
        set_scale(blocks, scale())
    return blocks.reshape(*shape[:-1], -1)


def set_scale(blocks: np.ndarray, scale: np.ndarray) -> None:
    """Write float16 scales [...] into blocks of IQ1_M, uint8 [..., 56]: four bits into each of the four last words."""
    for part in range(4):
        blocks[..., 49 + 2 * part] &= 15
        blocks[..., 49 + 2 * part] |= (((scale.view(np.uint16) >> (4 * part)) & 15) << 4).astype(np.uint8)


def form(value: jax.Array | Quantized) -> str:
    """The type of a loaded weight, as `Tensor.form` has it."""
    if isinstance(value, Quantized):
        return type(value).__name__
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}[jnp.dtype(value.dtype).name]


@functools.partial(jax.jit, static_argnames="dtype")
def as_float(weight: Quantized, dtype: str = "float32") -> jax.Array:
    """A weight's values in one program; outside of one, `dequantize` is a dozen."""
    return weight.dequantize(jnp.dtype(dtype))


def abstract(format: type[Quantized], *shape: int) -> Quantized:
    """The shapes and types of a weight [..., N, K]."""
    *lead, k = shape
    return jax.eval_shape(format.split, jax.ShapeDtypeStruct((*lead, k // format.BLOCK, format.BLOCK_BYTES), jnp.uint8))


def abstract_experts(gate: type[Quantized], down: type[Quantized], tokens: int) -> tuple[Any, ...]:
    """Rows, choice, weights, and the stacks of V4-Flash's experts, for a function of experts that is only lowered."""
    numbers = (((tokens, 4096), "float32"), ((tokens, 6), "int32"), ((tokens, 6), "float32"))
    stacks = abstract(gate, 256, 2048, 4096), abstract(gate, 256, 2048, 4096), abstract(down, 256, 4096, 2048)
    return (*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in numbers), *stacks)
