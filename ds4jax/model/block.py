"""One block: hyper-connections around attention, hyper-connections around the experts."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from ds4jax.cache.state import LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model import paths
from ds4jax.model.attention import Attention
from ds4jax.model.layers import RMSNorm, Rngs, constant, parameter
from ds4jax.model.moe import MoE
from ds4jax.model.tape import Record, ignore, under
from pallas_kernels.hyper_connections import meaning as hc
from pallas_kernels.hyper_connections import prefill
from pallas_kernels.linear.cut import rows_of
from pallas_kernels.linear.meaning import NEARLY_FLOAT32


def initial_base(config: Config, layer: int) -> np.ndarray:
    """Initial biases [M] for training: each sub-layer reads mostly one stream, and streams mix little.

    Without them, equal streams would stay equal.
    """
    n = config.hc_mult
    pre = np.where(np.arange(n) == layer % n, 2.0, -2.0)
    return np.concatenate([pre, np.zeros(n), (4.0 * np.eye(n)).reshape(-1)]).astype(np.float32)


class Block(nnx.Module):
    """A layer of the model, or the body of the MTP block."""

    def __init__(self, config: Config, layer: int, ratio: int, *, hashed: bool, rngs: Rngs):
        streams = config.hc_mult * config.dim
        for part in ("attn", "ffn"):
            setattr(self, f"hc_{part}_fn", parameter(rngs, config.hc_mixes, streams, scale=streams**-0.5))
            setattr(self, f"hc_{part}_base", constant(rngs, initial_base(config, layer)))
            setattr(self, f"hc_{part}_scale", parameter(rngs, 3, mean=0.1))
        self.attn_norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.attn = Attention(config, ratio, rngs=rngs)
        self.ffn = MoE(config, hashed, rngs=rngs)
        self.config = config

    def __call__(
        self, h_TND: jax.Array, ids_T: jax.Array, rows: Rows, cache: LayerCache, record: Record = ignore
    ) -> tuple[jax.Array, LayerCache]:
        """Run rows through the block.

        Args:
            h_TND: float32 [T, N, D] streams.
            ids_T: int32 [T] tokens, which choose the experts of a hash-routed layer.
            cache: the layer's cache before the call.

        Returns:
            Streams float32 [T, N, D], and the cache with the live rows.
        """
        with jax.named_scope("attention"):
            x_TD, post, comb = self._collapse("attn", h_TND, rows, record)
            x_TD = self.attn_norm(x_TD)
            y_TD, cache = self.attn(x_TD, rows, cache, under(record, "attn"))
            record("attn_in", x_TD)
            record("attn_out", y_TD)
            h_TND = hc.write_back(y_TD, h_TND, post, comb)
        with jax.named_scope("experts"):
            x_TD, post, comb = self._collapse("ffn", h_TND, rows, record)
            x_TD = self.ffn_norm(x_TD)
            y_TD = self.ffn(x_TD, ids_T, strict=rows.strict, decoding=rows.decoding, record=under(record, "ffn"))
            record("ffn_in", x_TD)
            record("ffn_out", y_TD)
            h_TND = hc.write_back(y_TD, h_TND, post, comb)
        record("streams", h_TND)
        return h_TND, cache

    def _collapse(self, part: str, h_TND: jax.Array, rows: Rows, record: Record) -> tuple[jax.Array, jax.Array, jax.Array]:
        fn, base, scale = (getattr(self, f"hc_{part}_{name}").get_value() for name in ("fn", "base", "scale"))
        config = self.config

        def modules(h_TND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            mixes_TM = hc.mixes(h_TND, fn, config.norm_eps)
            return hc.split(mixes_TM, scale, base, n=config.hc_mult, iterations=config.hc_iters, eps=config.hc_eps)

        def kernels(h_TND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            mixes_TM = hc.mixes(h_TND, fn, config.norm_eps, NEARLY_FLOAT32)
            return prefill.split(mixes_TM, scale, base, iterations=config.hc_iters, eps=config.hc_eps)

        if record is ignore and paths.why_not_prefill_streams(config, rows, rows_of(self.attn.wq_b.weight.get_value())) is None:
            pre, post, comb = jax.lax.platform_dependent(h_TND, cuda=kernels, default=modules)
        else:
            pre, post, comb = modules(h_TND)
        for name, value in (("pre", pre), ("post", post), ("comb", comb)):
            record(f"hc_{part}_{name}", value)
        return hc.collapse(h_TND, pre), post, comb
