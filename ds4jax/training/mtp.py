"""The loss for training the MTP block alone, with everything else frozen.

The main model does not change, so its output does not change; only the number of accepted drafts does. Any optimiser that updates
a pytree of arrays works.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache import state as caches
from ds4jax.cache.state import Rows
from ds4jax.model.mtp import MTP_PARAMETERS
from ds4jax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen model's output for a window: the MTP block's input and its target.

    Attributes:
        h_TND: float32 [T - 1, N, D], streams after the last layer at every position except the window's last.
        logits_TV: float32 [T - 1, V], logits at the same positions.
    """

    h_TND: jax.Array
    logits_TV: jax.Array


def teacher(model: Transformer, ids_T: jax.Array) -> Teacher:
    """Run the main model over a window of tokens int32 [T] from position 0. Works under `jax.vmap` and `jax.lax.map`."""
    count = ids_T.shape[0] - 1
    rows = Rows.following(jnp.int32(0), count, count)
    h_TND, _ = model.streams(ids_T[:-1], rows, caches.empty(model.config, count, ring=False))
    return Teacher(h_TND, model.logits(h_TND))


def mtp_loss(
    model: Transformer, ids_T: jax.Array, *, known: Teacher | None = None, distill: float = 0.5
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of the MTP block on a window of tokens, with everything else frozen. Differentiable; works under `jax.vmap`.

    Row t of the block sees the model's streams at t and the token at t+1. It predicts the token at t+2. The loss compares this
    prediction with the token and with the main model's distribution at t+1. All other weights have gradient zero, including
    the shared embedding and head.

    Args:
        model: has float32 weights (`LanguageModel.float_model`); a product with quantised weights has no gradient.
        ids_T: int32 [T], at least 3 tokens, from position 0.
        known: result of `teacher` for this window. None computes it, which is five sixths of the work for the shipped model.
        distill: share of the loss that compares with the main model's distribution, 0 to 1.

    Returns:
        Mean loss in nats, and its parts: `mtp_nll` in nats, and `agreement`, the share of rows where the block's top token
        equals the main model's. The agreement is the acceptance rate of a first greedy draft.

    Raises:
        ValueError: the model has no MTP block.

    Source: DeepSeek-V3 report (arXiv 2412.19437) §2.2; distillation as in DistillSpec (arXiv 2310.08461).
    """
    if not model.config.n_mtp:
        raise ValueError("the model has no MTP block, so there is no MTP loss")
    graph, trained, *frozen = nnx.split(model, MTP_PARAMETERS, ...)
    model = nnx.merge(graph, trained, *jax.lax.stop_gradient(frozen))
    known = jax.lax.stop_gradient(teacher(model, ids_T) if known is None else known)
    count = ids_T.shape[0] - 1
    rows = Rows.following(jnp.int32(0), count, count)
    mtp_TND, _ = model.mtp_streams(known.h_TND, ids_T[1:], rows, caches.empty_mtp(model.config, count, ring=False))
    parts = mtp_parts(known.logits_TV, model.mtp_logits(mtp_TND), ids_T, distill)
    return parts.pop("mtp_loss"), parts


def chosen_log_p(logits_TV: jax.Array, ids_T: jax.Array) -> jax.Array:
    """Log probability of each row's token, float32 [T]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_TV), ids_T[:, None], axis=-1)[:, 0]


def mtp_parts(logits_TV: jax.Array, mtp_logits_TV: jax.Array, window: jax.Array, distill: float) -> dict[str, jax.Array]:
    """The MTP loss and its parts, from the logits [T, V] of both heads and the window int32 [T + 1].

    Row t is compared with the token at t+2 and with the main model's distribution in row t+1.
    """
    teacher_TV = jax.lax.stop_gradient(logits_TV[1:])
    hard = -jnp.mean(chosen_log_p(mtp_logits_TV[:-1], window[2:]))
    soft = -jnp.mean(jnp.sum(jax.nn.softmax(teacher_TV) * jax.nn.log_softmax(mtp_logits_TV[:-1]), axis=-1))
    agreed = jnp.argmax(mtp_logits_TV[:-1], -1) == jnp.argmax(teacher_TV, -1)
    loss = (1 - distill) * hard + distill * soft
    return {"mtp_nll": hard, "mtp_loss": loss, "agreement": jnp.mean(agreed.astype(jnp.float32))}
