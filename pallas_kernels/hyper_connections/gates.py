"""The gates of hyper-connections inside kernels: numbers of one row, or vectors with a lane for each row.

Their meaning is `pallas_kernels.hyper_connections.meaning.split`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

STREAMS = 4
# Projections of the streams: N of pre, N of post, N² of comb.
MIXES = STREAMS * (2 + STREAMS)

Row = list[jax.Array]


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + jnp.exp(-x))


def mixing(logits: Row, iterations: int, eps: float) -> Row:
    """Weights between streams from their sixteen logits, source stream by source stream."""
    comb = []
    for j in range(STREAMS):
        own = logits[STREAMS * j : STREAMS * (j + 1)]
        top = functools.reduce(jnp.maximum, own)
        weights = [jnp.exp(logit - top) for logit in own]
        total = (weights[0] + weights[1]) + (weights[2] + weights[3])
        comb += [weight / total + eps for weight in weights]
    return _sinkhorn(comb, iterations, eps)


def _sinkhorn(c: Row, iterations: int, eps: float) -> Row:
    """Normalise the columns of a positive 4×4 matrix, sixteen numbers, then rows and columns alternately."""

    def scaled(c: Row, lines: list[list[int]]) -> Row:
        out = list(c)
        for line in lines:
            inverse = 1.0 / ((c[line[0]] + c[line[1]]) + (c[line[2]] + c[line[3]]) + eps)
            for i in line:
                out[i] = c[i] * inverse
        return out

    rows = [[STREAMS * j + k for k in range(STREAMS)] for j in range(STREAMS)]
    columns = [list(line) for line in zip(*rows, strict=True)]

    def one_round(_: jax.Array, c: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(scaled(scaled(list(c), rows), columns))

    return list(jax.lax.fori_loop(0, iterations - 1, one_round, tuple(scaled(c, columns))))
