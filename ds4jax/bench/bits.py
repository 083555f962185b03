"""Bit-equality on the GPU: a row's result depends on neither its company, nor the run, nor the tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.q8_matmul import MOST_ROWS, Tile
from pallas_kernels.shapes import FLASH, Product
from pallas_kernels.tune import Data, Launch

EVERY_M = tuple(range(1, MOST_ROWS + 1))
TILED = FLASH[1]
TILED_ROWS = (1, 4)
TILES = tuple(Tile(rows, warps) for rows in (1, 2, 4) for warps in (1, 2))


def launches(product: Product, tile: Tile) -> list[Launch]:
    """What `check` compares: every M with the product's own tile, and all tiles of q_b at M = 1 and 4."""
    tiled = [Launch(product, m, other) for m in TILED_ROWS for other in TILES if other != tile]
    return [Launch(product, m, tile) for m in EVERY_M] + (tiled if product == TILED else [])


def differing(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> int:
    """How many float32 values differ in any bit, over pairs of arrays of equal shapes."""
    return sum(int((a.view(np.int32) != b.view(np.int32)).sum()) for a, b in zip(left, right, strict=True))


def _outputs(run: Callable[..., Any], data: Data, m: int, first: int = 0) -> list[np.ndarray]:
    """Every result of a program over all sets of weights, [M, N] each."""
    return [np.asarray(array) for outputs in run(data.rows(m, first), data.weights) for array in outputs]


def check(product: Product, tile: Tile, programs: Mapping[Launch, Any], data: Data) -> list[dict[str, Any]]:
    """Compare the results of one product's programs, over all of its weights.

    Returns:
        Rows {shape, m, against, differing}: each M with each of its rows alone, M = 1 and 8 with a second run, and where
        `launches` names other tiles, these with the product's own.
    """
    rows = []

    def note(m: int, against: str, count: int) -> None:
        rows.append({"shape": product.key, "m": m, "against": against, "differing": count})

    single = programs[Launch(product, 1, tile)]
    each = [_outputs(single, data, 1, first) for first in range(MOST_ROWS)]
    alone = [np.concatenate(arrays) for arrays in zip(*each, strict=True)]
    together: dict[int, list[np.ndarray]] = {1: each[0]}
    for m in EVERY_M[1:]:
        together[m] = _outputs(programs[Launch(product, m, tile)], data, m)
        note(m, "each row alone", differing(together[m], [array[:m] for array in alone]))
    for m in (1, MOST_ROWS):
        note(m, "a second run", differing(together[m], _outputs(programs[Launch(product, m, tile)], data, m)))
    for launch, run in programs.items():
        if launch.tile != tile:
            other = _outputs(run, data, launch.m)
            note(launch.m, f"tile {launch.tile.rows}x{launch.tile.warps}", differing(together[launch.m], other))
    return rows


def equal(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether something was compared and nothing differed."""
    return bool(rows) and not any(row["differing"] for row in rows)
