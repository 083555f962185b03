"""Trains a draft head alone: runs the frozen model over windows once, then steps on the head's weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ds4jax.errors import InputError
from ds4jax.model.transformer import Transformer
from ds4jax.training.continuations import LONGEST, continued, lengths, text_windows
from ds4jax.training.head_recipe import HeadRecipe
from ds4jax.training.heads import Head, Loss
from ds4jax.training.loop import TrainState, averaged, initial_state
from ds4jax.training.network import Weights, names_of
from ds4jax.training.optimizer import make_optimizer

# Windows that the frozen model runs over in one call, and sequences that it continues in one call.
TOGETHER, CONTINUED = 8, 64
VALIDATION = 32

Progress = Callable[[int, int], None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lesson:
    """Windows with the frozen model's output.

    Attributes:
        windows: int32 [N, T].
        known: what the head's `teacher` gave for each, arrays [N, ...] in float16 to save memory.
    """

    windows: jax.Array
    known: Any


def written_windows(
    model: Transformer, ids_T: np.ndarray, count: int, recipe: HeadRecipe, rng: np.random.Generator, share: float,
    progress: Progress | None = None,
) -> np.ndarray:  # fmt: skip
    """Windows int32 [count, context] of a text; the model continues a share of them."""
    windows = text_windows(ids_T, count, recipe.context, model.config.bos_id, rng)
    kept = np.where(np.arange(count) < round(share * count), lengths(count, recipe.context, rng), recipe.context)
    run = jax.jit(continued)
    parts = []
    for start in range(0, round(share * count), CONTINUED):
        rows = np.arange(start, start + CONTINUED) % count
        parts.append(np.asarray(run(model, windows[rows], kept[rows].astype(np.int32))))
        if progress:
            progress(min(start + CONTINUED, count), count)
    done = np.concatenate(parts)[:count] if parts else windows[:0]
    return np.concatenate([done, windows[len(done) :]])


def lesson(head: Head, model: Transformer, windows_NT: np.ndarray, progress: Progress | None = None) -> Lesson:
    """Run the frozen model over windows int32 [N, T]."""

    def some(model: Transformer, windows: jax.Array) -> Any:
        known = jax.lax.map(lambda window: head.teacher(model, window), windows)
        return jax.tree.map(lambda array: array.astype(jnp.float16), known)

    run, parts = jax.jit(some), []
    for start in range(0, len(windows_NT), TOGETHER):
        rows = np.arange(start, start + TOGETHER) % len(windows_NT)
        parts.append(jax.tree.map(np.asarray, run(model, windows_NT[rows])))
        if progress:
            progress(min(start + TOGETHER, len(windows_NT)), len(windows_NT))
    known = jax.tree.map(lambda *arrays: jnp.asarray(np.concatenate(arrays)[: len(windows_NT)]), *parts)
    return Lesson(jnp.asarray(windows_NT), known)


def lessons(
    head: Head, model: Transformer, texts: Sequence[np.ndarray], recipe: HeadRecipe, progress: Progress | None = None
) -> list[Lesson]:
    """The windows to learn from, and those to validate on, which the model continues in every case.

    Args:
        texts: tokens int32 [T] of both texts.

    Raises:
        InputError: a text is shorter than a window.
    """
    rng, made = np.random.default_rng(recipe.seed), []
    plans = ((recipe.windows, recipe.written), (VALIDATION, 1.0))
    for ids_T, (count, share) in zip(texts, plans, strict=True):
        if len(ids_T) < recipe.context:
            raise InputError(f"{recipe.text}: {len(ids_T)} tokens; windows of {recipe.context} tokens need a longer text")
        windows = written_windows(model, ids_T, count, recipe, rng, share, progress)
        made.append(lesson(head, model, windows, progress))
    return made


class HeadTraining:
    """A run in progress.

    Attributes:
        state: weights and optimiser state.
    """

    def __init__(self, head: Head, model: Transformer, recipe: HeadRecipe, learned: Lesson, checked: Lesson):
        self._head, self.recipe, self._learned, self._checked = head, recipe, learned, checked
        self._graph, trained, *self._frozen = nnx.split(model, head.parameters, ...)
        self._names, self._structure = names_of(trained), jax.tree.structure(trained)
        weights: Weights = dict(zip(self._names, jax.tree.leaves(trained), strict=True))
        self._optimizer = make_optimizer(recipe, weights)
        self.state = initial_state(weights, self._optimizer)

    @property
    def model(self) -> Transformer:
        """The model with the averaged weights."""
        return self._with(self.state.average, self._frozen)

    def steps(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Run the remaining steps. Yields after each the steps done and its figures."""
        run = jax.jit(self._step)
        while int(self.state.step) < self.recipe.steps:
            self.state, figures = run(self.state, self._frozen, self._learned)
            yield int(self.state.step), _figures(figures)

    def validate(self) -> dict[str, float]:
        """Figures of the averaged weights on the validation windows, behind the share that is always text."""
        return _figures(self._validate(self.state.average, self._frozen, self._checked))

    @functools.cached_property
    def _validate(self) -> Callable:
        return jax.jit(self._checked_loss)

    def _with(self, weights: Weights, frozen: Any) -> Transformer:
        trained = jax.tree.unflatten(self._structure, [weights[name] for name in self._names])
        model: Transformer = nnx.merge(self._graph, trained, *frozen)
        return model

    def _loss(self, weights: Weights, frozen: Any, part: Lesson, key: jax.Array, first: int) -> Loss:
        model, keys = self._with(weights, frozen), jax.random.split(key, len(part.windows))

        def one(window: jax.Array, known: Any, key: jax.Array) -> Loss:
            known = jax.tree.map(lambda array: array.astype(jnp.float32), known)
            return self._head.loss(model, window, known, key, first, self.recipe)

        losses, parts = jax.vmap(one)(part.windows, part.known, keys)
        return jnp.mean(losses), jax.tree.map(lambda array: jnp.mean(array, axis=0), parts)

    def _step(self, state: TrainState, frozen: Any, learned: Lesson) -> tuple[TrainState, dict[str, jax.Array]]:
        row_key, key = jax.random.split(jax.random.fold_in(jax.random.key(self.recipe.seed), state.step))
        rows = jax.random.randint(row_key, (self.recipe.batch,), 0, len(learned.windows))
        part = jax.tree.map(lambda array: array[rows], learned)
        (loss, parts), gradient = jax.value_and_grad(self._loss, has_aux=True)(state.params, frozen, part, key, 0)
        # optax mixes floats with int32 counts.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = averaged(state.average, params, state.step, self.recipe.ema)
        return TrainState(state.step + 1, params, average, optimizer), parts | {"loss": loss}

    def _checked_loss(self, weights: Weights, frozen: Any, checked: Lesson) -> dict[str, jax.Array]:
        first = round(LONGEST * self.recipe.context)
        loss, parts = self._loss(weights, frozen, checked, jax.random.key(0), first)
        return parts | {"loss": loss}


def _figures(parts: dict[str, jax.Array]) -> dict[str, float]:
    """Scalars by name; a figure of each slot gets its number, from 1."""
    figures: dict[str, float] = {}
    for name, value in parts.items():
        array = np.asarray(value)
        figures |= {name: float(array)} if not array.ndim else {f"{name}_{i + 1}": float(one) for i, one in enumerate(array)}
    return figures
