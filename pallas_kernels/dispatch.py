"""The gate: which path a product takes and why, from static facts alone.

The engine that the share-warp kernel comes from had a gate that silently never let it run; here every decision has a reason
that can be printed, and tests count the kernel's calls in the lowered program.
"""

from __future__ import annotations

import dataclasses
import os

from pallas_kernels.q8_matmul import MOST_ROWS

# Rows of one decode or verify step: the MTP block's h_proj has four rows per token.
DECODE_ROWS = 4 * MOST_ROWS
OPT_OUT = "DS4JAX_NO_SHARE_WARP"
IMPLEMENTATIONS = ("pallas", "xla", "interpret")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Paths of one product.

    Attributes:
        cuda, default: path when lowered for CUDA and for anything else: "pallas" (the share-warp kernel), "interpret" (its body
            without a GPU), "xla" (the same quantised arithmetic in jnp), "dot" (`jnp.dot` on float32 weights) or, on the tensor
            cores with sums in float32, "bfloat16" (weights and activations are rounded) or "three bfloat16" (each operand is the
            sum of two numbers, all but the smallest product is added up: nearly float32).
        reason: why, in a few words.
    """

    cuda: str
    default: str
    reason: str


def choose(rows: int, quantized: bool, *, half: bool = False, strict: bool, implementation: str | None = None) -> Choice:
    """Decide the path of a product of `rows` rows with a Q8_0 weight (`quantized`) or a float one, of 16 bits if `half`.

    `DS4JAX_NO_SHARE_WARP=1` in the environment is read here, that is once when a program is built.

    Raises:
        ValueError: an `implementation` that does not exist, or that this product cannot have; the message says why.
    """
    if implementation is not None:
        return _forced(implementation, rows, quantized, strict)
    if strict:
        return Choice("dot", "dot", "strict")
    many = rows > DECODE_ROWS
    if not quantized and half and many and os.environ.get(OPT_OUT) != "1":
        return Choice("three bfloat16", "dot", f"16-bit float weights, more than {DECODE_ROWS} rows")
    if not quantized:
        return Choice("dot", "dot", "float weights")
    if os.environ.get(OPT_OUT) == "1":
        path = "dot" if many else "xla"
        return Choice(path, path, f"{OPT_OUT}=1")
    if many:
        return Choice("bfloat16", "dot", f"Q8_0, more than {DECODE_ROWS} rows")
    return Choice("pallas", "xla", f"Q8_0, at most {DECODE_ROWS} rows")


def _forced(implementation: str, rows: int, quantized: bool, strict: bool) -> Choice:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "xla":
        if strict:
            raise ValueError(f"implementation is {implementation!r}, but strict allows no Pallas kernel")
        if not quantized:
            raise ValueError(f"implementation is {implementation!r}, but the kernel takes Q8_0 weights only")
        if rows > DECODE_ROWS:
            raise ValueError(f"implementation is {implementation!r}, but the kernel takes at most {DECODE_ROWS} rows, not {rows}")
    path = "dot" if implementation == "xla" and (strict or not quantized) else implementation
    return Choice(path, path, "asked for")
