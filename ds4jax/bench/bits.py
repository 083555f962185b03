"""Bit-equality on the GPU: a row's result depends on neither its company nor the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.q8_matmul import MOST_ROWS
from pallas_kernels.shapes import Product
from pallas_kernels.tune import Data

EVERY_M = tuple(range(1, MOST_ROWS + 1))


def differing(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> int:
    """How many float32 values differ in any bit, over pairs of arrays of equal shapes."""
    return sum(int((a.view(np.int32) != b.view(np.int32)).sum()) for a, b in zip(left, right, strict=True))


def _outputs(run: Callable[..., Any], data: Data, m: int, first: int = 0) -> list[np.ndarray]:
    """Every result of a program over all sets of weights, [M, N] each."""
    return [np.asarray(array) for outputs in run(data.rows(m, first), data.weights) for array in outputs]


def check(product: Product, programs: Mapping[int, Any], data: Data) -> list[dict[str, Any]]:
    """Compare the results of one product's programs by number of rows, over all of its weights.

    Each number of rows has a tile of its own, so that this compares tiles too.

    Returns:
        Rows {shape, m, against, differing}: each M with each of its rows alone, and M = 1 and 8 with a second run.
    """
    rows = []

    def note(m: int, against: str, count: int) -> None:
        rows.append({"shape": product.key, "m": m, "against": against, "differing": count})

    single = programs[1]
    each = [_outputs(single, data, 1, first) for first in range(MOST_ROWS)]
    alone = [np.concatenate(arrays) for arrays in zip(*each, strict=True)]
    together: dict[int, list[np.ndarray]] = {1: each[0]}
    for m in EVERY_M[1:]:
        together[m] = _outputs(programs[m], data, m)
        note(m, "each row alone", differing(together[m], [array[:m] for array in alone]))
    for m in (1, MOST_ROWS):
        note(m, "a second run", differing(together[m], _outputs(programs[m], data, m)))
    return rows


def equal(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether something was compared and nothing differed."""
    return bool(rows) and not any(row["differing"] for row in rows)
