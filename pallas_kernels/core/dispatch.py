"""The gate: chooses the path of a product from static facts, and gives the reason.

The engine that the share-warp kernel comes from had a gate that silently never chose it. Here every decision has a reason that
can be printed, and tests count the kernel's calls in the lowered program.
"""

from __future__ import annotations

import dataclasses
import os

from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.formats import Quantized
from pallas_kernels.linear.lane_formats import LANE_FORMATS

# Maximum rows of a call that is computed like a decode step if nothing says what it is: a verify step of one sequence, whose
# product h_proj of the MTP block has four rows per token.
DECODE_ROWS = 4 * MAX_ROWS
OPT_OUT = "DS4JAX_NO_SHARE_WARP"
IMPLEMENTATIONS = ("pallas", "xla", "interpret")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Paths of one product.

    Attributes:
        cuda, default: path when lowered for CUDA and for other platforms: "pallas" (the kernel of the format), "interpret" (its
            body without a GPU), "xla" (the same quantised arithmetic in jnp) or "dot" (`jnp.dot` on float32 weights). Two paths
            use tensor cores with float32 sums: "bfloat16" (weights and activations are rounded) and "three bfloat16" (each
            operand is the sum of two numbers, and three of the four products are added: nearly float32).
        reason: the reason in a few words.
    """

    cuda: str
    default: str
    reason: str


def opt_out() -> str | None:
    """The reason "DS4JAX_NO_SHARE_WARP=1" if the environment sets it, else None. Read when a program is traced."""
    return f"{OPT_OUT}=1" if os.environ.get(OPT_OUT) == "1" else None


def choose(
    rows: int, format: type[Quantized] | None, *, half: bool = False, strict: bool, decoding: bool = False,
    implementation: str | None = None,
) -> Choice:  # fmt: skip
    """Choose the path of a product.

    Args:
        rows: rows of the activations.
        format: the weight's; None if it is a float matrix.
        half: whether the float weight has 16 bits.
        strict, decoding, implementation: as for `pallas_kernels.ops.matmul`.

    Raises:
        ValueError: the `implementation` does not exist or does not support this product; the message gives the reason.
    """
    if implementation is not None:
        return _forced(implementation, rows, format, strict)
    if strict:
        return Choice("dot", "dot", "strict")
    many = rows > DECODE_ROWS and not decoding
    if format is None:
        if half and many and not opt_out():
            return Choice("three bfloat16", "dot", f"16-bit float weights, more than {DECODE_ROWS} rows")
        return Choice("dot", "dot", "float weights")
    if reason := opt_out():
        path = "dot" if many else "xla"
        return Choice(path, path, reason)
    name = format.__name__
    if many:
        return Choice("bfloat16", "dot", f"{name}, more than {DECODE_ROWS} rows")
    few = f"at most {DECODE_ROWS} rows" if rows <= DECODE_ROWS else "a decode step"
    if format not in LANE_FORMATS:
        return Choice("xla", "xla", f"{name} has no kernel, {few}")
    return Choice("pallas", "xla", f"{name}, {few}")


def _forced(implementation: str, rows: int, format: type[Quantized] | None, strict: bool) -> Choice:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "xla":
        if strict:
            raise ValueError(f"implementation is {implementation!r}, but strict allows no Pallas kernel")
        if format not in LANE_FORMATS:
            raise ValueError(f"implementation is {implementation!r}, but {format.__name__ if format else 'float'} has no kernel")
        if rows > DECODE_ROWS:
            raise ValueError(f"implementation is {implementation!r}, but the kernel takes at most {DECODE_ROWS} rows, not {rows}")
    path = "dot" if implementation == "xla" and (strict or format is None) else implementation
    return Choice(path, path, "asked for")
