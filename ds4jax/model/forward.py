"""The model as a differentiable function of one sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax.cache import state as caches
from ds4jax.cache.state import Rows
from ds4jax.model.tape import into
from ds4jax.model.transformer import Transformer


def score(
    model: Transformer, ids_T: jax.Array, *, tape: dict[str, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Logits at every position of one sequence from position 0 on; differentiable, for use with `jax.vmap`.

    Args:
        ids_T: int32 [T].
        tape: filled with named intermediates when given.

    Returns:
        Logits float32 [T, V], and the MTP block's logits [T, V], or None without the block. Their row t predicts token t+2. The
        last row has no next token and uses token 0. A jitted function does not compute a result that it does not use.
    """
    length = ids_T.shape[0]
    record = into(tape)
    rows = Rows.following(jnp.zeros((), jnp.int32), length, length)
    cache = caches.empty(model.config, length, ring=False)
    h_TND, _ = model.streams(ids_T, rows, cache, record)
    logits_TV = model.logits(h_TND)
    if not model.config.n_mtp:
        return logits_TV, None
    next_ids_T = jnp.concatenate([ids_T[1:], jnp.zeros(1, ids_T.dtype)])
    mtp_cache = caches.empty_mtp(model.config, length, ring=False)
    mtp_TND, _ = model.mtp_streams(h_TND, next_ids_T, rows, mtp_cache, record)
    return logits_TV, model.mtp_logits(mtp_TND)
