"""What every kernel is held to: its meaning, a row's bits in any company, what it may not read, and lowering for CUDA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from cuda import kernel_calls, lowered_for_cuda

Operands = tuple[Any, ...]


def same(results: Any) -> Any:
    """All of the results."""
    return results


@dataclasses.dataclass(frozen=True)
class Op:
    """A kernel and how its numbers are checked.

    Attributes:
        name: in messages.
        kernel: called with operands and `interpret`; any tree of arrays.
        meaning: called with the same operands; what the kernel's results are close to, or None where a test compares them itself.
        rows: which operands have an axis of rows in front; of a tree every array has.
        tolerance: how far results may be off, as a share of each row's largest value, or of the array's if `whole`.
        compared: of the kernel's results, what the meaning says.
        by_row: of the kernel's results, what has an axis of rows in front.
        take: some rows' operands, where `rows` does not say enough.
    """

    name: str
    kernel: Callable[..., Any]
    meaning: Callable[..., Any] | None = None
    rows: tuple[int, ...] = ()
    tolerance: float = 0.0
    whole: bool = False
    compared: Callable[[Any], Any] = same
    by_row: Callable[[Any], Any] = same
    take: Callable[[Operands, slice], Operands] | None = None

    def some(self, operands: Operands, rows: slice) -> Operands:
        """The operands of some rows."""
        if self.take:
            return self.take(operands, rows)
        return tuple(jax.tree.map(lambda x: x[rows], one) if i in self.rows else one for i, one in enumerate(operands))

    def made(self, operands: Operands, *, interpret: bool) -> list[tuple[str, np.ndarray]]:
        """The kernel's results that have rows, with their names."""
        return named(self.by_row(self.kernel(*operands, interpret=interpret)))


def named(tree: Any) -> list[tuple[str, np.ndarray]]:
    """Arrays of a tree with their names."""
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def check_meaning(op: Op, operands: Operands, *, interpret: bool = True, tolerance: float | None = None) -> None:
    """Results have the meaning's shapes and are close to it."""
    assert op.meaning is not None
    tolerance = op.tolerance if tolerance is None else tolerance
    made = named(op.compared(op.kernel(*operands, interpret=interpret)))
    for (name, array), (_, wanted) in zip(made, named(op.meaning(*operands)), strict=True):
        assert array.shape == wanted.shape, f"{op.name}{name}"
        assert np.isfinite(wanted).all(), f"{op.name}{name}"
        off, size = (np.abs(x).reshape(len(x), -1).max(axis=1) for x in (array - wanted, wanted))
        size = np.max(size) if op.whole else size
        assert (size > 0).all(), f"{op.name}{name}"
        assert (off <= tolerance * size).all(), f"{op.name}{name}: rows are off by {off / size} of the largest value"


def check_rows(
    op: Op, operands: Operands, counts: tuple[int, ...], *, interpret: bool = True, alone: Callable[[int], Operands] | None = None
) -> None:
    """The first rows together, so many in a call, have the bits of each row alone.

    Args:
        counts: how many rows, one call each.
        alone: operands of row m by itself, where they are more than its part of all operands.
    """
    alone = alone or (lambda m: op.some(operands, slice(m, m + 1)))
    single = [op.made(alone(m), interpret=interpret) for m in range(max(counts))]
    for count in counts:
        for i, (name, array) in enumerate(op.made(op.some(operands, slice(count)), interpret=interpret)):
            differing = [m for m in range(count) if array[m].tobytes() != single[m][i][1][0].tobytes()]
            assert not differing, f"{op.name}{name} of {array.shape}: rows {differing} of {count} differ from the same rows alone"


def check_unread(op: Op, operands: Operands, poisoned: Operands, rows: Any = slice(None), *, interpret: bool = True) -> None:
    """These rows' results have the same bits with NaN in what they may not see; the others' are not looked at."""
    assert any(np.isnan(x).any() for _, x in named(poisoned) if np.issubdtype(x.dtype, np.floating)), "nothing is poisoned"
    clean, found = (op.made(given, interpret=interpret) for given in (operands, poisoned))
    for (name, array), (_, wanted) in zip(found, clean, strict=True):
        assert array[rows].tobytes() == wanted[rows].tobytes(), f"{op.name}{name} depends on what it may not see"


def check_poisoned_row(op: Op, operands: Operands, poisoned: Operands, row: int, *, interpret: bool = True) -> None:
    """What is not finite in a row's operands makes its results NaN, all of them, and stays in that row."""
    clean, found = (op.made(given, interpret=interpret) for given in (operands, poisoned))
    for (name, array), (_, wanted) in zip(found, clean, strict=True):
        others = np.arange(len(array)) != row
        assert np.isnan(array[row]).all(), f"{op.name}{name}"
        assert array[others].tobytes() == wanted[others].tobytes(), f"{op.name}{name}: another row has other bits"


def check_lowers(function: Callable[..., Any], operands: Operands, calls: dict[str, int], **options: Any) -> None:
    """The function lowers for CUDA and calls kernels so often."""
    text = lowered_for_cuda(function if hasattr(function, "trace") else jax.jit(function), *operands, **options)
    assert {name: kernel_calls(text, name) for name in calls} == calls
