"""The model as a function of a whole sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax import cache as caches
from ds4jax.cache import Rows
from ds4jax.model.tape import into
from ds4jax.model.transformer import Transformer


def score(
    model: Transformer, ids_T: jax.Array, *, tape: dict[str, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Logits at every position of one sequence that starts at position 0; differentiable, and made for `jax.vmap`.

    Args:
        ids_T: int32 [T].
        tape: filled with named intermediates when given.

    Returns:
        float32 [T, V], and the MTP block's logits [T, V], row t predicting token t+2, or None where there is no such block. Its
        last row, which has no next token, takes token 0 for it. A jitted function that does not use a part does not compute it.
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
