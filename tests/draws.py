"""What counted draws say about the law that they should follow."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import gammaincc

LEAST_P = 1e-4
LEAST_EXPECTED = 5


def p_value(observed: np.ndarray, probability: np.ndarray) -> float:
    """Chi-square of counts against cell probabilities; cells expected fewer than five times are pooled."""
    assert probability.sum() == pytest.approx(1)
    assert not observed[probability == 0].any(), "a sequence that cannot be"
    expected = probability * observed.sum()
    large = expected >= LEAST_EXPECTED
    observed, expected = (np.append(cells[large], cells[~large].sum()) for cells in (observed, expected))
    possible = expected > 0
    statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    return float(gammaincc(jnp.float32((possible.sum() - 1) / 2), jnp.float32(statistic / 2)))


def overlaid(probability: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """The distribution with next to nothing in cells that a wrong rule has reached."""
    possible = probability + np.where(observed > 0, 1e-12, 0)
    return possible / possible.sum()
