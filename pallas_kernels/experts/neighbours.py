"""The order of an expert product's programs: those of the same weight rows are neighbours, whatever row they serve.

Rows of activations that chose the same expert read the same weights. In the order of the rows that is a whole matrix of each of
their experts later, when the L2 holds them no longer. Here it is a few tiles of each later.
"""

from __future__ import annotations

import math

import jax

# Bytes of a matrix that the programs of one row or pair take one after the other, so that memory is read in long pieces.
PIECE = 1 << 16


def piece(tiles: int, tile_bytes: int) -> int:
    """Tiles of a piece, a divisor of all tiles.

    Args:
        tiles: programs of a row or pair.
        tile_bytes: bytes that a program reads of a matrix.
    """
    return math.gcd(tiles, 1 << max(PIECE // tile_bytes, 1).bit_length() - 1)


def place(program: jax.Array, count: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The row or pair of a program, and its tile.

    Args:
        count: rows or pairs.
        size: tiles of a piece; all tiles put a row's programs one after the other.
    """
    number, rest = program // (count * size), program % (count * size)
    return rest // size, number * size + rest % size
