"""The model's pass over the rows of a decode step: all of them together, or on a CPU one row of each sequence after the other."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ds4jax.cache.state import Cache, Rows
from ds4jax.decode.width import rows_needed, step_rows
from ds4jax.model.transformer import Transformer


class Verified(NamedTuple):
    """Output of the model for W rows of each of S sequences; rows past a sequence's count are undefined.

    Attributes:
        h_SWND: float32 [S, W, N, D], streams after the last layer.
        means: float32 [S, W, D] for each tapped layer.
        logits_SWV: float32 [S, W, V].
    """

    h_SWND: jax.Array
    means: tuple[jax.Array, ...]
    logits_SWV: jax.Array


def verify(
    model: Transformer, cache: Cache, ids_SW: jax.Array, count_S: jax.Array, taps: tuple[int, ...], *, strict: bool
) -> tuple[Verified, Cache]:
    """Run the model over the last tokens and the drafts, and write all their rows into the cache.

    A CPU pays for every row, and it computes calls of other numbers of rows with other code, which ends in other last bits. So it
    takes one row of each sequence at a time, as many as the deepest sequence has. Then a row's bits are those of plain decode in
    the programs of all drafters.

    Args:
        ids_SW: int32 [S, W], tokens at the positions from the cache's length on.
        count_S: int32 [S], live rows of each sequence, 0 to W; at least one sequence has any.
        taps: static; layers whose means are wanted.
        strict: static.
    """
    if jax.default_backend() == "cpu":
        return _row_by_row(model, cache, ids_SW, count_S, taps, strict)
    (sequences, verified), width = ids_SW.shape, rows_needed(model, cache, ids_SW.shape[1] - 1, strict)
    rows = Rows.step(cache.length, width, count_S, strict=strict)
    h_TND, cache, means = model.tapped(rows.spread(ids_SW), rows, cache, taps)
    flat = Verified(h_TND, tuple(means), model.logits(h_TND, strict=strict))
    return jax.tree.map(lambda x: x.reshape(sequences, width, *x.shape[1:])[:, :verified], flat), cache


def _row_by_row(
    model: Transformer, cache: Cache, ids_SW: jax.Array, count_S: jax.Array, taps: tuple[int, ...], strict: bool
) -> tuple[Verified, Cache]:
    sequences, width = ids_SW.shape

    def row(i: jax.Array | int, cache: Cache) -> tuple[Verified, Cache]:
        rows = Rows.step(cache.length, step_rows(0, sequences), (count_S > i).astype(jnp.int32), strict=strict)
        h_TND, cache, means = model.tapped(ids_SW[rows.sequence, i], rows, cache, taps)
        made = Verified(h_TND, tuple(means), model.logits(h_TND, strict=strict))
        return jax.tree.map(lambda x: x.reshape(sequences, -1, *x.shape[1:])[:, 0], made), cache

    def one(i: jax.Array, carry: tuple[Verified, Cache]) -> tuple[Verified, Cache]:
        made, cache = row(i, carry[1])
        return jax.tree.map(lambda all_S, x: all_S.at[:, i].set(x), carry[0], made), cache

    if width == 1:
        made, cache = row(0, cache)
        return jax.tree.map(lambda x: x[:, None], made), cache
    shapes = jax.eval_shape(lambda: row(0, cache)[0])
    empty = jax.tree.map(lambda x: jnp.zeros((x.shape[0], width, *x.shape[1:]), x.dtype), shapes)
    verified: tuple[Verified, Cache] = jax.lax.fori_loop(0, jnp.max(count_S), one, (empty, cache))
    return verified
