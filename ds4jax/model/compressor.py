"""The compressor: one row for every `ratio` tokens, pooled per channel by learned gates.

Source: architecture of `Compressor` in the reference inference code; ratio 4 pools over the previous block too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache.state import OVERLAP_RATIO, CompressorCache, Rows, with_ring, write_ring
from ds4jax.cache.stored_rows import put
from ds4jax.config import Config
from ds4jax.model.layers import Linear, RMSNorm, Rngs, parameter, together
from ds4jax.model.rope import inverse_frequencies, rotate
from ds4jax.model.tape import Record, ignore
from pallas_kernels.compressor import meaning

Finish = Callable[[jax.Array], jax.Array]


class Compressor(nnx.Module):
    """Pools finished blocks of tokens into rows of `width` and keeps them in its cache."""

    def __init__(self, config: Config, ratio: int, width: int, *, rngs: Rngs):
        self.overlap = 2 if ratio == OVERLAP_RATIO else 1
        self.ape = parameter(rngs, ratio, self.overlap * width, scale=0.02)
        self.wkv = Linear(self.overlap * width, config.dim, rngs=rngs)
        self.wgate = Linear(self.overlap * width, config.dim, rngs=rngs)
        self.norm = RMSNorm(width, config.norm_eps, rngs=rngs)
        self.config, self.ratio, self.width = config, ratio, width

    def __call__(
        self, x_TD: jax.Array, rows: Rows, cache: CompressorCache, *, finish: Finish, record: Record = ignore
    ) -> CompressorCache:
        """Take in the call's tokens and write the rows of the blocks that they close.

        Args:
            x_TD: float32 [T, D], the layer's normed input.
            finish: what becomes of the rotated rows [n, width]: the simulated rounding of rows or keys.
        """
        values, gates = together(x_TD, self.wkv, self.wgate, strict=rows.strict, decoding=rows.decoding)
        gates += self.ape.get_value().astype(jnp.float32)[rows.position % self.ratio]
        closing, closed = closing_rows(rows, self.ratio)
        position, sequence = rows.position[closing], rows.sequence[closing]
        pool = functools.partial(self._pool, values, gates, closing, rows, cache)
        # Most steps close no block, and a pool over 128 tokens is a tenth of the tiny model's step on a CPU.
        shape = (closing.shape[0], self.width)
        pooled = jax.lax.cond(jnp.any(closed), pool, lambda: jnp.zeros(shape, jnp.float32)) if rows.decoding else pool()
        record("pooled", pooled)
        normed = self.norm(pooled)
        record("normed", normed)
        first = position - (self.ratio - 1)
        entries = finish(rotate(normed, first, inverse_frequencies(self.config, compressed=True)))
        record("rows", entries)
        block = jnp.where(closed, position // self.ratio, cache.rows.shape[1])
        return CompressorCache(
            write_ring(cache.values, values, rows),
            write_ring(cache.gates, gates, rows),
            put(cache.rows, sequence, block, entries),
        )

    def _pool(self, values: jax.Array, gates: jax.Array, closing: jax.Array, rows: Rows, cache: CompressorCache) -> jax.Array:
        """Gate-weighted mean of the tokens of each block that closes: [n, width]."""
        span = self.overlap * self.ratio
        back = jnp.arange(span - 1, -1, -1, dtype=jnp.int32)
        position = rows.position[closing][:, None] - back
        sequence = rows.sequence[closing][:, None]
        size = cache.values.shape[1]
        in_ring = sequence * size + position % max(size, 1)
        in_call = cache.values.shape[0] * size + closing[:, None] - back
        index = jnp.where(position < rows.start[sequence], in_ring, in_call)
        index = jnp.maximum(index, 0)
        a = with_ring(cache.values, values)[index]
        g = with_ring(cache.gates, gates)[index]
        return meaning.pool(a, g, position >= 0, ratio=self.ratio)


def closing_rows(rows: Rows, ratio: int) -> tuple[jax.Array, jax.Array]:
    """Rows of the call that close a block: indices [n], n the maximum that T rows can close, and which of them are real."""
    width = rows.position.shape[0]
    if rows.single:
        # Live rows are consecutive positions, so the first that closes a block says which others do.
        index = (-1 - rows.position[0]) % ratio + jnp.arange(-(-width // ratio), dtype=jnp.int32) * ratio
        real = index < jnp.sum(rows.end - rows.start)
        return jnp.where(real, index, width - 1), real
    # Each sequence's rows close at most one block more than there are whole blocks among them.
    count = min(width, (width + rows.start.shape[0] * (ratio - 1)) // ratio)
    closes = rows.live & ((rows.position + 1) % ratio == 0)
    index = jnp.nonzero(closes, size=count, fill_value=width)[0].astype(jnp.int32)
    return jnp.minimum(index, width - 1), index < width


def visible_blocks(count: int, ratio: int, rows: Rows) -> jax.Array:
    """Which of its sequence's `count` compressed rows each query may see, bool [T, S]: blocks closed at its own position."""
    return jnp.arange(count, dtype=jnp.int32) < ((rows.position + 1) // ratio)[:, None]
