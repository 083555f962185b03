"""The kernels' harness finds what it is there for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_lowers, check_meaning, check_poisoned_row, check_rows, check_unread

X, ALL = np.arange(1, 13, dtype=np.float32).reshape(4, 3), np.ones(3, np.float32)
POISONED = np.where(np.arange(4)[:, None] == 1, np.float32(np.nan), X)
GOOD = Op("scaled", lambda x, w, interpret: {"y": x * w}, lambda x, w: {"y": x * w}, rows=(0,), tolerance=1e-6)


def made(kernel: Any) -> Op:
    return dataclasses.replace(GOOD, kernel=lambda x, w, interpret: {"y": kernel(x * w)})


def test_a_sound_kernel_passes() -> None:
    check_meaning(GOOD, (X, ALL))
    check_rows(GOOD, (X, ALL), (2, 4))
    check_unread(GOOD, (X, ALL), (POISONED, ALL), [0, 2, 3])
    check_poisoned_row(GOOD, (X, ALL), (POISONED, ALL), 1)


def test_numbers_that_are_off_are_found() -> None:
    with pytest.raises(AssertionError, match="off by"):
        check_meaning(made(lambda y: y + np.float32(1e-4)), (X, ALL))
    with pytest.raises(AssertionError, match="off by"):
        check_meaning(made(lambda y: np.where(y > 11, np.float32(np.nan), y)), (X, ALL))


def test_a_row_that_sees_its_company_is_found() -> None:
    with pytest.raises(AssertionError, match=r"rows \[0, 1\] of 2 differ"):
        check_rows(made(lambda y: y + len(y)), (X, ALL), (2,))
    spread = made(lambda y: y + y.sum())
    with pytest.raises(AssertionError, match="may not see"):
        check_unread(spread, (X, ALL), (POISONED, ALL), [0, 2, 3])
    with pytest.raises(AssertionError, match="another row"):
        check_poisoned_row(spread, (X, ALL), (POISONED, ALL), 1)
    with pytest.raises(AssertionError, match="nothing is poisoned"):
        check_unread(GOOD, (X, ALL), (X, ALL))


def test_a_kernel_that_is_not_called_is_found() -> None:
    with pytest.raises(AssertionError):
        check_lowers(jnp.sin, (X,), {"sine": 1})
