"""Rows of activations times rows of matrices of one lane format, by one warp. Expert and dense products share it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.formats import BLOCK, Quantized
from pallas_kernels.linear import activation
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ActivationK, quantize_k
from pallas_kernels.linear.lane_formats import LANE_FORMATS
from pallas_kernels.linear.lanes import Format, Loaded, Place

# References of a matrix's planes, the index of its row, and whether the row exists.
WeightRow = tuple[Sequence[Any], tuple[Any, ...], jax.Array | None]
Sums = tuple[jax.Array, ...]


def quantize_for(x: jax.Array, weight: type[Quantized], groups: int = 1, *, interpret: bool = False) -> Activation | ActivationK:
    """Quantise rows float32 [M, C·K] with C = `groups` in the blocks and the order of a lane format, in one launch.

    In blocks of 256 each group is a row of its own, M·C rows.
    """
    if weight.BLOCK == BLOCK:
        return activation.quantize(x, groups, interpret=interpret)
    return quantize_k(x.reshape(x.shape[0] * groups, -1), weight, interpret=interpret)


@functools.cache
def lane_format(format: type[Quantized], interpret: bool) -> Format:
    """One object per format, so that launches of equal shapes compare equal."""
    return LANE_FORMATS[format](interpret)


def codebook(format: type[Quantized]) -> jax.Array:
    """The codebook that a kernel of this format takes, int32 [n]."""
    return jnp.asarray(LANE_FORMATS[format].codebook())


def zeros(count: int) -> Sums:
    """So many accumulators, float32 [32] each."""
    return tuple(jnp.zeros(LANES, jnp.float32) for _ in range(count))


@dataclasses.dataclass(frozen=True)
class Turn:
    """Products of one row of activations with some weight rows.

    Attributes:
        x_row: number of the row of activations.
        weights: the weight rows.
        sums: for each weight row, the number of its accumulator.
    """

    x_row: Any
    weights: Sequence[WeightRow]
    sums: Sequence[int]


@dataclasses.dataclass(frozen=True)
class LaneRow:
    """Multiplies rows of activations by rows of matrices of one format.

    Attributes:
        format: how a lane multiplies.
        x, table: references of the activations and of the format's codebook.
        columns: number of lane parts in a weight row.
        once: whether no other program loads the same weights.
    """

    format: Format
    x: Sequence[Any]
    table: Any
    columns: int
    interpret: bool
    once: bool = True

    def add(self, x_rows: Sequence[Any], weights: Sequence[WeightRow], accs: Sums) -> Sums:
        """Add the products of each row of activations with each weight row, which is loaded once.

        Args:
            x_rows: numbers of rows of activations.
            weights: rows of matrices.
            accs: float32 [32] for each pair; the weights are innermost.
        """

        def chunk(first: jax.Array, accs: Sums) -> Sums:
            loaded, x = self._weights(weights, first), self._activations(x_rows[0], first)
            if not self.interpret:
                # As in the share-warp kernel: start all loads before the first product.
                plt.debug_barrier()
            decoded = [self.format.apply_codebook(w, self.table) for w in loaded]
            made: list[jax.Array] = []
            for m, x_row in enumerate(x_rows):
                if m:
                    # Later rows would need many registers at once; they come from the cache.
                    x = self._activations(x_row, first)
                own = accs[m * len(weights) : (m + 1) * len(weights)]
                made += [self.format.add(w, x, acc) for w, acc in zip(decoded, own, strict=True)]
            return tuple(made)

        chunks = pl.cdiv(self.columns, LANES)
        if chunks == 1:
            return chunk(loads.value(0), accs)
        return jax.lax.fori_loop(0, chunks, lambda i, accs: chunk(i * LANES, accs), accs)

    def add_in_turn(self, turns: Sequence[Turn], accs: Sums, ahead: int) -> Sums:
        """Add products of one row of activations at a time, so that the loads of a turn run beside the products of another.

        Args:
            turns: products of 32 lanes after 32 lanes of a row; turns of the same row of activations share its loads.
            accs: float32 [32] each.
            ahead: how many loads of 32 lanes are under way beside those that are multiplied. It changes only the time.
        """
        firsts = [loads.value(i * LANES) for i in range(pl.cdiv(self.columns, LANES))]
        if all(turn.x_row is turns[0].x_row for turn in turns):
            steps = [(turn, first) for first in firsts for turn in turns]
        else:
            steps = [(turn, first) for turn in turns for first in firsts]
        under_way: list[tuple[list[Loaded], Loaded]] = []
        made, x = list(accs), self._activations(steps[0][0].x_row, steps[0][1])
        for i, (turn, _) in enumerate(steps):
            for j in range(i + len(under_way), min(i + 1 + ahead, len(steps))):
                later, first = steps[j]
                if j and (later.x_row is not steps[j - 1][0].x_row or first is not steps[j - 1][1]):
                    x = self._activations(later.x_row, first)
                under_way.append((self._weights(later.weights, first), x))
            if not self.interpret:
                plt.debug_barrier()
            loaded, known = under_way.pop(0)
            for w, place in zip(loaded, turn.sums, strict=True):
                made[place] = self.format.add(self.format.apply_codebook(w, self.table), known, made[place])
        return tuple(made)

    def _weights(self, weights: Sequence[WeightRow], first: jax.Array) -> list[Loaded]:
        """What 32 lanes multiply of each weight row."""
        inside = self._inside(first)
        return [
            self.format.weights(refs, Place(index, first, loads.all_of(inside, real), self.once)) for refs, index, real in weights
        ]

    def _activations(self, x_row: Any, first: jax.Array) -> Loaded:
        """What 32 lanes multiply of a row of activations."""
        return self.format.activations(self.x, Place((x_row,), first, self._inside(first)))

    def _inside(self, first: jax.Array) -> jax.Array | None:
        """Which lanes have a column, bool [32]; None if all have."""
        return first + loads.numbers() < self.columns if self.columns % LANES else None
