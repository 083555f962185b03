"""The model as a function of a whole sequence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ds4jax import cache as caches
from ds4jax.cache import Rows
from ds4jax.model.tape import into
from ds4jax.model.transformer import Transformer


def score(model: Transformer, ids_T: jax.Array, *, tape: dict[str, jax.Array] | None = None, mtp: bool = False) -> Any:
    """Logits at every position of one sequence that starts at position 0; differentiable, and made for `jax.vmap`.

    Args:
        ids_T: int32 [T].
        tape: filled with named intermediates when given.
        mtp: also run the MTP block over positions 0..T-1, the last one with token 0 in the place of the unknown next.

    Returns:
        float32 [T, V], or with `mtp` a pair with the block's logits [T, V], row t predicting token t+2.
    """
    length = ids_T.shape[0]
    record = into(tape)
    rows = Rows.following(jnp.zeros((), jnp.int32), length, length)
    cache = caches.empty(model.config, length, ring=False)
    h_TND, cache = model.streams(ids_T, rows, cache, record)
    logits_TV = model.logits(h_TND)
    if not mtp:
        return logits_TV
    next_ids_T = jnp.concatenate([ids_T[1:], jnp.zeros(1, ids_T.dtype)])
    mtp_TND, _ = model.mtp_streams(h_TND, next_ids_T, rows, cache, record)
    return logits_TV, model.mtp_logits(mtp_TND)
