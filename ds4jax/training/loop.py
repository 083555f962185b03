"""The compiled programs of a training run: several steps in one call, and the evaluation of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ds4jax.model.forward import score
from ds4jax.training.data import Evaluation, Mixture, Streams, sample_windows
from ds4jax.training.loss import Objective, move_router_biases
from ds4jax.training.network import Network, Weights
from ds4jax.training.optimizer import learning_rate
from ds4jax.training.recipe import Phase, Recipe

METRICS = ("loss", "nll", "mtp_nll", "agreement", "index", "imbalance", "gradient")
EVALUATION_BATCH = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes during a run. Random draws depend only on the recipe's seed and `step`.

    Attributes:
        step: int32, steps done.
        params: float32 weights.
        average: exponential moving average of the weights, for evaluation and export.
        optimizer: the optimiser's state.
    """

    step: jax.Array
    params: Weights
    average: Weights
    optimizer: Any


def initial_state(params: Weights, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    average = {name: jnp.array(value, copy=True) for name, value in params.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))


def averaged(average: Weights, params: Weights, step: jax.Array, ema: float) -> Weights:
    """The moving average after one more step; early ones count more, so that it does not keep the initial weights."""
    decay = jnp.minimum(ema, (1 + step) / (10 + step)).astype(jnp.float32)
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)


Step = Callable[[TrainState, Streams, Weights, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_steps(network: Network, recipe: Recipe, phase: Phase, optimizer: optax.GradientTransformation) -> Step:
    """A function that runs training steps; compile it with the state donated.

    It takes state, streams, tables and a traced number of steps, and returns the new state and the sum of each metric. One
    executable runs any number of steps, so a pause does not change the bits of a run.
    """
    objective = Objective(network, recipe)
    gradient = jax.value_and_grad(objective, has_aux=True)
    rate = learning_rate(recipe)

    def one_step(state: TrainState, streams: Streams, tables: Weights) -> tuple[TrainState, dict[str, jax.Array]]:
        window_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(recipe.seed), state.step))
        late = _fade(state.step, recipe)
        mixture = Mixture(recipe.canonical + (1 - recipe.canonical) * late, recipe.line_starts, recipe.bos)
        windows = sample_windows(window_key, streams, mixture, phase.batch, phase.context)
        noise = recipe.token_noise * (1 - late)
        loss, parts, loads, grads = batch_gradients(
            gradient, recipe.microbatches, state.params, tables, windows, noise, noise_key
        )
        # optax mixes floats with int32 counts.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            # The step of the router biases follows the learning rate.
            balance = recipe.balance_rate * rate(state.step) / recipe.learning_rate
        params = move_router_biases(optax.apply_updates(state.params, updates), loads, balance)
        average = averaged(state.average, params, state.step, recipe.ema)
        metrics = dict.fromkeys(METRICS, jnp.zeros((), jnp.float32)) | parts
        metrics |= {"loss": loss, "imbalance": _imbalance(loads), "gradient": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, average, optimizer_state), metrics

    def steps(state: TrainState, streams: Streams, tables: Weights, count: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        def body(_: jax.Array, carry: tuple[TrainState, dict[str, jax.Array]]) -> tuple[TrainState, dict[str, jax.Array]]:
            state, sums = carry
            state, metrics = one_step(state, streams, tables)
            return state, jax.tree.map(jnp.add, sums, metrics)

        return jax.lax.fori_loop(0, count, body, (state, dict.fromkeys(METRICS, jnp.zeros((), jnp.float32))))

    return steps


def _fade(step: jax.Array, recipe: Recipe) -> jax.Array:
    """0 until the anneal phase, then rising linearly to 1 at the end of the run."""
    length = recipe.steps * recipe.anneal
    if not length:
        return jnp.zeros((), jnp.float32)
    return jnp.clip((step.astype(jnp.float32) - (recipe.steps - length)) / length, 0.0, 1.0)


def _imbalance(loads: Weights) -> jax.Array:
    """Maximum over layers of an expert's maximum load divided by the layer's mean load."""
    if not loads:
        return jnp.zeros((), jnp.float32)
    return jnp.max(jnp.stack([jnp.max(load) / jnp.mean(load) for load in loads.values()]))


def batch_gradients(
    gradient: Callable, parts: int, params: Weights, tables: Weights, windows: jax.Array, noise: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], Weights, Weights]:
    """Loss, its parts, expert loads and gradient of a batch, computed in `parts` sequential pieces to save memory.

    Loss, parts and gradient are means over the pieces; loads are sums.

    Args:
        gradient: an `Objective` under `jax.value_and_grad`.
        windows: int32 [B, T + 1]; B is a multiple of `parts`.
    """
    if parts == 1:
        (loss, (figures, loads)), grads = gradient(params, tables, windows, noise, key)
        return loss, figures, loads, grads
    split = windows.reshape(parts, -1, windows.shape[-1])
    keys = jax.random.split(key, parts)

    def one_part(total: Any, item: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, tables, item[0], noise, item[1])), None

    first = jax.eval_shape(gradient, params, tables, split[0], noise, keys[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    total, _ = jax.lax.scan(one_part, zeros, (split, keys))
    (loss, (figures, loads)), grads = total
    loss, figures, grads = jax.tree.map(lambda leaf: leaf / parts, (loss, figures, grads))
    return loss, figures, loads, grads


def make_scorer(network: Network) -> Callable[[Weights, Weights, jax.Array, jax.Array], dict[str, jax.Array]]:
    """A function that scores windows and returns sums over all of them.

    It takes params, tables, windows int32 [n, T + 1] and a float32 mask [n, T] of the predictions that count. The sums are
    `nats`, and with an MTP block `agreed` and `drafted`.
    """

    def one(params: Weights, tables: Weights, window: jax.Array, scored: jax.Array) -> dict[str, jax.Array]:
        logits_TV, mtp_TV = score(network.model(params, tables), window[:-1])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_TV), window[1:, None], axis=-1)[:, 0]
        sums = {"nats": -jnp.sum(chosen * scored)}
        if mtp_TV is not None:
            agreed = jnp.argmax(mtp_TV[:-1], -1) == jnp.argmax(logits_TV[1:], -1)
            sums |= {"agreed": jnp.sum(agreed.astype(jnp.float32) * scored[1:]), "drafted": jnp.sum(scored[1:])}
        return sums

    def scorer(params: Weights, tables: Weights, windows: jax.Array, scored: jax.Array) -> dict[str, jax.Array]:
        sums = jax.vmap(one, in_axes=(None, None, 0, 0))(params, tables, windows, scored)
        return jax.tree.map(jnp.sum, sums)

    return scorer


def evaluate(scorer: Callable, params: Weights, tables: Weights, text: Evaluation) -> dict[str, float]:
    """Bits per byte of a text, and `agreement`: the share of positions where the MTP block's top token equals the model's."""
    padding = -len(text.windows) % EVALUATION_BATCH
    windows = np.pad(text.windows, ((0, padding), (0, 0)))
    scored = np.pad(text.scored, ((0, padding), (0, 0)))
    totals: dict[str, float] = {}
    for start in range(0, len(windows), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        for name, value in scorer(params, tables, windows[part], scored[part]).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    result = {"bits_per_byte": totals["nats"] / float(np.log(2)) / text.n_bytes}
    if totals.get("drafted"):
        result["agreement"] = totals["agreed"] / totals["drafted"]
    return result
