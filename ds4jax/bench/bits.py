"""Checks bit equality on the GPU: a row's result does not depend on the other rows or on the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.tuning.shapes import Product
from pallas_kernels.tuning.tune import Data

EVERY_M = tuple(range(1, MAX_ROWS + 1))


def differing(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> int:
    """Number of float32 values that differ in any bit, over pairs of arrays of equal shapes."""
    return sum(int((a.view(np.int32) != b.view(np.int32)).sum()) for a, b in zip(left, right, strict=True))


def _outputs(run: Callable[..., Any], data: Data, m: int, first: int = 0) -> list[np.ndarray]:
    """All results of a program over all sets of weights, [M, N] each."""
    return [np.asarray(array) for outputs in run(data.rows(m, first), data.weights) for array in outputs]


def check(product: Product, programs: Mapping[int, Any], data: Data) -> list[dict[str, Any]]:
    """Compare the results of one product's programs, over all sets of weights.

    Each number of rows has its own tile, so this also compares tiles.

    Args:
        programs: compiled programs by number of rows, 1 to 8.

    Returns:
        Rows {shape, m, against, differing}: each M against each of its rows alone, and M = 1 and 8 against a second run.
    """
    rows = []

    def note(m: int, against: str, count: int) -> None:
        rows.append({"shape": product.key, "m": m, "against": against, "differing": count})

    single = programs[1]
    each = [_outputs(single, data, 1, first) for first in range(MAX_ROWS)]
    alone = [np.concatenate(arrays) for arrays in zip(*each, strict=True)]
    together: dict[int, list[np.ndarray]] = {1: each[0]}
    for m in EVERY_M[1:]:
        together[m] = _outputs(programs[m], data, m)
        note(m, "each row alone", differing(together[m], [array[:m] for array in alone]))
    for m in (1, MAX_ROWS):
        note(m, "a second run", differing(together[m], _outputs(programs[m], data, m)))
    return rows


def equal(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are comparisons and all are equal."""
    return bool(rows) and not any(row["differing"] for row in rows)
