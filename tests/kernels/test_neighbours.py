"""The order of an expert product's programs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.experts import neighbours


@given(st.integers(1, 12), st.integers(1, 200), st.integers(1, 1 << 18))
def test_every_tile_of_every_row_has_one_program(count: int, tiles: int, tile_bytes: int) -> None:
    size = neighbours.piece(tiles, tile_bytes)
    assert tiles % size == 0
    number, tile = neighbours.place(np.arange(count * tiles), count, size)
    assert len({*zip(number.tolist(), tile.tolist(), strict=True)}) == count * tiles
    assert (number < count).all()
    assert (tile < tiles).all()


def test_programs_of_the_same_weights_are_neighbours() -> None:
    """128 tiles of 1,024 bytes: pieces of 64, and after a piece of one row come the same tiles of the next."""
    assert neighbours.piece(128, 1024) == 64
    number, tile = neighbours.place(np.arange(3 * 128), 3, 64)
    assert number[:192].tolist() == [0] * 64 + [1] * 64 + [2] * 64
    assert tile[:192].tolist() == [*range(64)] * 3
    assert tile[192:].min() == 64


def test_all_tiles_in_a_piece_are_the_order_of_the_rows() -> None:
    number, tile = neighbours.place(np.arange(3 * 8), 3, 8)
    assert number.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert tile.tolist() == [*range(8)] * 3
