"""The training loss: next-token and MTP cross entropy, the indexer's divergence, and noise against overfitting."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.model.forward import score
from ds4jax.training.data import FIRST_SPECIALS, LAST_SPECIALS
from ds4jax.training.mtp import chosen_log_p, mtp_parts
from ds4jax.training.network import Network, Weights
from ds4jax.training.optimizer import is_dropped_matrix, is_dropped_norm
from ds4jax.training.recipe import Recipe

INVISIBLE = -1e30
SCORE, MASS, CHOSEN = "indexer.score", "compressed_weights", "ffn.chosen"


def replace_tokens(key: jax.Array, ids_BT: jax.Array, share: jax.Array, vocab_size: int) -> jax.Array:
    """Replace a share of the inputs with random ordinary tokens; the first token of each window stays."""
    where_key, token_key = jax.random.split(key)
    replaced = jax.random.uniform(where_key, ids_BT.shape) < share
    replaced = replaced.at[:, 0].set(False)
    ordinary = (len(FIRST_SPECIALS), vocab_size - len(LAST_SPECIALS))
    return jnp.where(replaced, jax.random.randint(token_key, ids_BT.shape, *ordinary, jnp.int32), ids_BT)


def _kept(key: jax.Array, shapes: dict[str, tuple[int, ...]], rate: float) -> dict[str, jax.Array]:
    """Dropout masks by name, true where an element stays. One draw serves all: a draw for each dominated compile time."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    bits = jax.random.bits(key, (sum(sizes),), jnp.uint16) >= jnp.uint16(round(rate * 2**16))
    parts = jnp.split(bits, list(itertools.accumulate(sizes))[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def drop_weights(key: jax.Array, params: Weights, rate: float) -> Weights:
    """Zero a share of the elements of the attention and expert matrices; the others are scaled to keep the mean."""
    if not rate:
        return params
    shapes = {name: params[name].shape for name in sorted(params) if is_dropped_matrix(name, params[name].ndim)}
    kept = _kept(key, shapes, rate)
    return params | {name: jnp.where(kept[name], params[name] / (1 - rate), jnp.float32(0)) for name in shapes}


def drop_channels(key: jax.Array, params: Weights, rate: float, batch: int) -> tuple[Weights, dict[str, int | None]]:
    """Zero random channels of the norms, with one mask for all tokens of a window.

    Returns:
        The weights, with the norms as [batch, D], and for each weight the axis that `jax.vmap` maps.

    Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks".
    """
    axes: dict[str, int | None] = dict.fromkeys(params)
    if not rate:
        return params, axes
    shapes = {name: (batch, *params[name].shape) for name in sorted(params) if is_dropped_norm(name)}
    kept = _kept(key, shapes, rate)
    dropped = {name: jnp.where(kept[name], params[name] / (1 - rate), jnp.float32(0)) for name in shapes}
    return params | dropped, axes | dict.fromkeys(shapes, 0)


def index_divergence(score_TS: jax.Array, weights_THS: jax.Array) -> jax.Array:
    """The indexer's loss: KL divergence from attention's weights on compressed rows to the softmax of the index scores.

    The choice of the best rows has no gradient, so the indexer learns from this loss. Attention's weights are averaged over
    heads. Only rows that a query attends to count: all visible rows while attention is dense, the chosen rows later.

    Args:
        score_TS: float32 [T, S], index scores of the compressed rows.
        weights_THS: float32 [T, H, S], attention's weights on them.

    Returns:
        The mean over queries, in nats.

    Source: DeepSeek-V3.2 technical report, §2.1, dense warm-up and sparse training of the lightning indexer.
    """
    mass_TS = jax.lax.stop_gradient(jnp.mean(weights_THS, axis=1))
    attended = mass_TS > 0
    total = jnp.sum(mass_TS, axis=-1, keepdims=True)
    target = mass_TS / jnp.where(total > 0, total, jnp.float32(1))
    log_p = jax.nn.log_softmax(jnp.where(attended, score_TS, jnp.float32(INVISIBLE)), axis=-1)
    log_target = jnp.log(jnp.where(attended, target, jnp.float32(1)))
    return jnp.mean(jnp.sum(jnp.where(attended, target * (log_target - log_p), jnp.float32(0)), axis=-1))


def _window(
    network: Network, recipe: Recipe, params: Weights, tables: Weights, window: jax.Array, inputs: jax.Array
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Weights]]:
    tape: dict[str, jax.Array] = {}
    logits_TV, mtp_TV = score(network.model(params, tables), inputs, tape=tape)
    parts = {"nll": -jnp.mean(chosen_log_p(logits_TV, window[1:]))}
    loss = parts["nll"]
    if mtp_TV is not None:
        parts |= mtp_parts(logits_TV, mtp_TV, window, recipe.mtp_distill)
        loss += recipe.mtp_weight * parts.pop("mtp_loss")
    divergences = [
        index_divergence(value, tape[name.removesuffix(SCORE) + MASS]) for name, value in tape.items() if name.endswith(SCORE)
    ]
    if divergences:
        parts["index"] = jnp.mean(jnp.stack(divergences))
        loss += recipe.index_weight * jnp.sum(jnp.stack(divergences))
    loads = {}
    for name, chosen_TK in tape.items():
        bias = name.removesuffix("chosen") + "gate.bias"
        if name.endswith(CHOSEN) and bias in params:
            chosen = chosen_TK[..., None] == jnp.arange(network.config.n_experts, dtype=chosen_TK.dtype)
            loads[bias] = jnp.sum(chosen.astype(jnp.float32), axis=(0, 1))
    return loss, (parts, loads)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a batch of windows, as a function of the weights."""

    network: Network
    recipe: Recipe

    def __call__(
        self, params: Weights, tables: Weights, windows_BT: jax.Array, noise: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Weights]]:
        """Mean loss in nats of windows int32 [B, T + 1].

        Args:
            noise: share of the input tokens to replace.

        Returns:
            The loss, its parts, and expert loads [E] by the name of the router's bias.
        """
        token_key, weight_key, channel_key = jax.random.split(key, 3)
        inputs_BT = windows_BT[:, :-1]
        if self.recipe.token_noise:
            inputs_BT = replace_tokens(token_key, inputs_BT, noise, self.network.config.vocab_size)
        params = drop_weights(weight_key, params, self.recipe.weight_dropout)
        params, axes = drop_channels(channel_key, params, self.recipe.dropout, windows_BT.shape[0])

        def one(params: Weights, window: jax.Array, inputs: jax.Array) -> Any:
            return _window(self.network, self.recipe, params, tables, window, inputs)

        losses, (parts, loads) = jax.vmap(one, in_axes=(axes, 0, 0))(params, windows_BT, inputs_BT)
        return jnp.mean(losses), (jax.tree.map(jnp.mean, parts), jax.tree.map(lambda load: jnp.sum(load, axis=0), loads))


def move_router_biases(params: Weights, loads: Weights, rate: jax.Array) -> Weights:
    """Raise the bias of each expert below the mean load by `rate`, and lower the bias of each expert above it.

    Source: DeepSeek-V3 report (arXiv 2412.19437) §2.1.2, load balancing without an auxiliary loss.
    """
    moved = dict(params)
    for name, load_E in loads.items():
        moved[name] = params[name] + rate * jnp.sign(jnp.mean(load_E) - load_E)
    return moved
