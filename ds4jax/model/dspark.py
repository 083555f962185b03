"""The DSpark block: K drafts in one pass of a few V4 layers, then a correction by the token before each.

Layers ("stages") see a ring of rows made of the main model's streams, and the K rows of the block in both directions. Source:
`DSparkBlock` of the published 0731 inference code.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.config import Config
from ds4jax.model.block import Block
from ds4jax.model.layers import Embedding, Linear, RMSNorm, Rngs, parameter
from pallas_kernels.hyper_connections import meaning as hc

# Filter of `nnx.split` for the block's parameters.
DSPARK_PARAMETERS = nnx.PathContains("dspark")


class DSpark(nnx.Module):
    """Stages, the projection that fills their rings, their head, the Markov tables and the confidence score."""

    def __init__(self, config: Config, *, rngs: Rngs):
        self.stages = nnx.List(
            [Block(config, config.n_layers + stage, 0, hashed=False, rngs=rngs) for stage in range(config.n_dspark)]
        )
        self.main_proj = Linear(config.dim, len(config.dspark_layers) * config.dim, rngs=rngs)
        self.main_norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.hc_head_fn = parameter(rngs, config.hc_mult, config.hc_mult * config.dim, scale=0.01)
        self.hc_head_base = parameter(rngs, config.hc_mult)
        self.hc_head_scale = parameter(rngs, 1, mean=0.1)
        self.markov_w1 = Embedding(config.vocab_size, config.dspark_rank, rngs=rngs)
        self.markov_w2 = Linear(config.vocab_size, config.dspark_rank, rngs=rngs)
        self.confidence = Linear(1, config.dim + config.dspark_rank, rngs=rngs)
        self.config = config

    def main_rows(self, means: Sequence[jax.Array], *, strict: bool, decoding: bool = False) -> jax.Array:
        """Inputs of the stages' rings, float32 [T, D], from the means [T, D] after each of the config's `dspark_layers`."""
        return self.main_norm(self.main_proj(jnp.concatenate(list(means), axis=-1), strict=strict, decoding=decoding))

    def block_ids(self, last_S: jax.Array) -> jax.Array:
        """Tokens of the block's rows, int32 [S, K]: the last committed token, then noise."""
        noise_SK = jnp.full((last_S.shape[0], self.config.dspark_block), self.config.dspark_noise_id, jnp.int32)
        return noise_SK.at[:, 0].set(last_S)

    def collapsed(self, h_TND: jax.Array) -> jax.Array:
        """Streams [T, N, D] after the last stage → float32 [T, D], before the norm."""
        fn, scale, base = (getattr(self, f"hc_head_{name}").get_value() for name in ("fn", "scale", "base"))
        return hc.head(h_TND, fn, scale, base, eps=self.config.hc_eps, norm_eps=self.config.norm_eps)

    def before(self, token_S: jax.Array, after: jax.Array | None = None) -> jax.Array:
        """What a slot knows of the token before it, float32 [S, R]; `after` as in `ds4jax.model.layers.Embedding`."""
        return self.markov_w1(token_S, after)

    def correction(self, before_SR: jax.Array, *, strict: bool) -> jax.Array:
        """What the token before a slot adds to its logits, float32 [S, V]."""
        return self.markov_w2(before_SR, strict=strict, decoding=True)

    def score(self, x_SD: jax.Array, before_SR: jax.Array) -> jax.Array:
        """Probability float32 [S] that a slot's draft stands where the earlier ones do.

        Args:
            x_SD: float32 [S, D], the slot's `collapsed` streams.
            before_SR: float32 [S, R], `before` of the token before the slot.
        """
        both_SK = jnp.concatenate([x_SD, before_SR], axis=-1)
        # One output is no size for a kernel.
        return jax.nn.sigmoid(self.confidence(both_SK, strict=True)[:, 0])
