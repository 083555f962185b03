"""The loss for training the DSpark block alone, with everything else frozen.

The main model does not change, so its output does not change; only the number of accepted drafts does. Any optimiser that updates
a pytree of arrays works.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache import state as caches
from ds4jax.cache.state import LayerCache, Rows
from ds4jax.config import Config
from ds4jax.decode.drafters.dspark import DSparkState, block_of, slots_of
from ds4jax.model.dspark import DSPARK_PARAMETERS, DSpark
from ds4jax.model.transformer import Transformer
from pallas_kernels.attention.meaning import in_window

# Confidences are kept this far from 0 and 1, so that their logarithms are finite.
MARGIN = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DSparkTeacher:
    """The frozen model's output for a window: the DSpark block's input and its target.

    Attributes:
        means: float32 [T - 1, D] for each of the config's `dspark_layers`, the mean of the streams after it, at every position
            except the window's last.
        logits_TV: float32 [T - 1, V], logits at the same positions.
    """

    means: tuple[jax.Array, ...]
    logits_TV: jax.Array


def dspark_teacher(model: Transformer, ids_T: jax.Array) -> DSparkTeacher:
    """Run the main model over a window of tokens int32 [T] from position 0. Works under `jax.vmap` and `jax.lax.map`."""
    count = ids_T.shape[0] - 1
    rows = Rows.following(jnp.int32(0), count, count)
    cache = caches.empty(model.config, count, ring=False)
    h_TND, _, means = model.tapped(ids_T[:-1], rows, cache, model.config.dspark_layers)
    return DSparkTeacher(tuple(means), model.logits(h_TND))


def dspark_loss(
    model: Transformer, ids_T: jax.Array, draft_at_S: jax.Array | None = None, *, known: DSparkTeacher | None = None,
    distill: float = 0.5, decay: float = 0.8,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Loss of the DSpark block on a window of tokens, with everything else frozen. Differentiable; works under `jax.vmap`.

    A block drafts after a position p: the model has seen the tokens up to p, and the token at p+1, the anchor, is committed.
    Slot k predicts the token at p+2+k. The loss compares this prediction with the token and with the main model's distribution
    at p+1+k. The correction by the token before a slot takes the window's token, as if the drafts before had been accepted. The
    confidence learns whether the slot's top token equals the main model's; this teaches the confidence's own weights alone. All
    weights outside the block have gradient zero, including the shared embedding and head.

    Args:
        model: has float32 weights (`LanguageModel.float_model`); a product with quantised weights has no gradient.
        ids_T: int32 [T] from position 0, at least K + 2 tokens for blocks of K drafts.
        draft_at_S: int32 [S], positions after which a block drafts, each 0 to T - K - 2; None takes all of these.
        known: result of `dspark_teacher` for this window. None computes it.
        distill: share of the loss that compares with the main model's distribution, 0 to 1.
        decay: weight of a slot's loss relative to the slot before it.

    Returns:
        Mean loss in nats, and its parts: `nll` in nats; `agreement` [K], the share of blocks where a slot's top token equals the
        main model's; `accepted`, the mean number of slots before the first where it does not; `confidence`, the cross entropy of
        the confidence in nats. On text that the model wrote by greedy choice, 1 + `accepted` is the tokens of a greedy step.

    Raises:
        ValueError: the model has no DSpark block.

    Source: `DSparkBlock` of the published 0731 inference code; distillation as in DistillSpec (arXiv 2310.08461).
    """
    if not model.config.n_dspark:
        raise ValueError("the model has no DSpark block, so there is no DSpark loss")
    graph, trained, *frozen = nnx.split(model, DSPARK_PARAMETERS, ...)
    model = nnx.merge(graph, trained, *jax.lax.stop_gradient(frozen))
    block = block_of(model)
    known = jax.lax.stop_gradient(dspark_teacher(model, ids_T) if known is None else known)
    size = model.config.dspark_block
    draft_at_S = jnp.arange(ids_T.shape[0] - size - 1, dtype=jnp.int32) if draft_at_S is None else draft_at_S
    place_SK = draft_at_S[:, None] + 1 + jnp.arange(size, dtype=jnp.int32)
    next_SK = ids_T[place_SK + 1]

    def forced(i: jax.Array | int, logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return next_SK[:, i], logits_SV

    last_S = ids_T[draft_at_S + 1]
    block_ids_T = block.block_ids(last_S).reshape(-1)
    rows = _rows(model.config, draft_at_S, len(ids_T) - 1)
    made = list(slots_of(model, _rings(block, known.means), block_ids_T, rows, last_S, size, forced))
    logits_SKV, sure_SK = (jnp.stack([getattr(slot, name) for slot in made], axis=1) for name in ("logits", "confidence"))
    return _parts(logits_SKV, sure_SK, next_SK, known.logits_TV[place_SK], distill, decay)


def _rings(block: DSpark, means: tuple[jax.Array, ...]) -> DSparkState:
    """Rings with a row for every position of a window, from means [T, D]."""
    count = means[0].shape[0]
    x_TD = block.main_rows(list(means), strict=False)
    rows = Rows.following(jnp.int32(0), count, count)
    none = jnp.zeros((1, count, block.config.head_dim), jnp.float32)
    return DSparkState(tuple(LayerCache(stage.attn.keep(x_TD, rows, none)) for stage in block.stages))


def _rows(config: Config, draft_at_S: jax.Array, count: int) -> Rows:
    """The rows of every block, in one call after `count` rows of the window.

    A block sees what it sees when it drafts: the rows of the window before its anchor, and its own. One call for all blocks saves
    a ring for each.
    """
    size = config.dspark_block
    last_T = jnp.repeat(draft_at_S, size)
    position_T = last_T + 1 + jnp.tile(jnp.arange(size, dtype=jnp.int32), len(draft_at_S))
    block_T = jnp.repeat(jnp.arange(len(draft_at_S)), size)
    before = in_window(last_T, jnp.arange(count, dtype=jnp.int32)[None, :], config.window)
    sees = jnp.concatenate([before, block_T[:, None] == block_T], axis=1)
    start = jnp.full(1, count, jnp.int32)
    every = jnp.ones(len(position_T), bool)
    none = jnp.zeros(len(position_T), jnp.int32)
    return Rows(position_T, none, every, start, start, False, len(position_T), sees=sees)


def _parts(
    logits_SKV: jax.Array, sure_SK: jax.Array, next_SK: jax.Array, teacher_SKV: jax.Array, distill: float, decay: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its parts, from the slots' logits and confidences and what each slot should predict."""
    log_q_SKV = jax.nn.log_softmax(logits_SKV)
    hard_SK = -jnp.take_along_axis(log_q_SKV, next_SK[..., None], axis=-1)[..., 0]
    soft_SK = -jnp.sum(jax.nn.softmax(teacher_SKV) * log_q_SKV, axis=-1)
    stands_SK = (jnp.argmax(logits_SKV, -1) == jnp.argmax(teacher_SKV, -1)).astype(jnp.float32)
    weight_K = decay ** jnp.arange(next_SK.shape[1], dtype=jnp.float32)
    sure_SK = jnp.clip(sure_SK, MARGIN, 1 - MARGIN)
    confidence = -jnp.mean(stands_SK * jnp.log(sure_SK) + (1 - stands_SK) * jnp.log(1 - sure_SK))
    drafts_SK = (1 - distill) * hard_SK + distill * soft_SK
    loss = jnp.mean(drafts_SK @ (weight_K / jnp.sum(weight_K))) + confidence
    return loss, {
        "nll": jnp.mean(hard_SK),
        "agreement": jnp.mean(stands_SK, axis=0),
        "accepted": jnp.mean(jnp.sum(jnp.cumprod(stands_SK, axis=1), axis=1)),
        "confidence": confidence,
    }
