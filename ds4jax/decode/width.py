"""Rows of a decode step: how many it has room for, and how many it computes on this machine."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax.bounds import MAX_DRAFTS
from ds4jax.cache.state import Cache, Rows
from ds4jax.model import decode_kernels, paths
from ds4jax.model.transformer import Transformer

# Rows of a sequence that rings have room for beyond the window, in the programs of all drafters: sums over rings of equal sizes
# have equal bits. It is the widest step.
ROOM = 1 + MAX_DRAFTS


def step_rows(max_draft: int, sequences: int = 1) -> int:
    """Maximum rows W per sequence in a step: the last token, the drafts, and clones.

    A CPU multiplies rows in groups of four and the remaining rows with other code, so equal rows could differ in the last bit.
    So S·W is 1, 2 or a multiple of 4. One sequence with two drafts has one more clone, with four drafts three more.
    """
    width = 1 + max_draft
    while sequences * width > 2 and sequences * width % 4:
        width += 1
    return width


def rows_needed(model: Transformer, cache: Cache, max_draft: int, strict: bool) -> int:
    """Rows W per sequence in a step of this model on this machine: at most `step_rows`.

    The decode kernels of a GPU compute each row alone, so equal rows have equal bits and the clones of `step_rows` are left out.
    """
    sequences, width = cache.length.shape[0], 1 + max_draft
    if jax.default_backend() != "gpu":
        return step_rows(max_draft, sequences)
    rows = Rows.step(cache.length, width, jnp.zeros_like(cache.length), strict=strict)
    blocks = map(decode_kernels.weights_of, model.layers)
    why_not = paths.why_not_step(model.config, blocks, rows, cache.layers)
    why_not = why_not or paths.why_not_head(model.config, model.head.weight.get_value(), sequences * width, strict=strict)
    return step_rows(max_draft, sequences) if why_not else width
