"""The multi-token-prediction block: from the streams at t and the token at t+1 to a prediction of t+2.

Source: `MTPBlock` of the reference inference code; DeepSeek-V3 report (arXiv 2412.19437) §2.2.
"""

from __future__ import annotations

import jax
from flax import nnx

from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.model.block import Block
from ds4jax.model.layers import Linear, RMSNorm, Rngs, parameter
from ds4jax.model.tape import Record, ignore
from pallas_kernels.linear.cut import gathered_together

# Filter of `nnx.split` for the block's parameters.
MTP_PARAMETERS = nnx.PathContains("mtp")


class MTP(Block):
    """A block with its own cache; its inputs are the main model's streams and the next token's embedding."""

    def __init__(self, config: Config, *, rngs: Rngs):
        super().__init__(config, config.n_layers, config.mtp_ratio, hashed=False, rngs=rngs)
        self.e_proj = Linear(config.dim, config.dim, rngs=rngs)
        self.h_proj = Linear(config.dim, config.dim, rngs=rngs)
        self.enorm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.hnorm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.hc_head_fn = parameter(rngs, config.hc_mult, config.hc_mult * config.dim, scale=0.01)
        self.hc_head_base = parameter(rngs, config.hc_mult)
        self.hc_head_scale = parameter(rngs, 1, mean=0.1)

    def mixed(self, h_TND: jax.Array, embedded_TD: jax.Array, rows: Rows, record: Record = ignore) -> jax.Array:
        """Input of the block for rows of positions t, streams float32 [T, N, D].

        Args:
            h_TND: float32 [T, N, D], the main model's streams after its last layer, or this block's own for deeper drafts.
            embedded_TD: float32 [T, D], embeddings of the tokens at t+1.
        """
        t, n, d = h_TND.shape
        streams = self.h_proj.part(self.hnorm(h_TND).reshape(t * n, d), strict=rows.strict, decoding=rows.decoding)
        token = self.e_proj.part(self.enorm(embedded_TD), strict=rows.strict, decoding=rows.decoding)
        # Equal matrices, so that both are cut or none is.
        streams, token = gathered_together([streams, token], self.h_proj.weight.get_value())
        mixed_TND = token[:, None, :] + streams.reshape(t, n, d)
        record("input", mixed_TND)
        return mixed_TND
