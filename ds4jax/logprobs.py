"""What a model would have said instead: distributions at temperature 1, without filters, one known token after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from ds4jax import cache as caches
from ds4jax.buckets import capacity_for, chunks, padded
from ds4jax.scoring import extend

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Scored:
    """One token of a text.

    Attributes:
        id: the token.
        logprob: natural logarithm of its probability.
        top: the most likely tokens with theirs, best first; of equals the lower id.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def following(
    model: LanguageModel, prompt: Sequence[int] | np.ndarray, forced: Sequence[int], *, strict: bool = False
) -> Iterator[np.ndarray]:
    """Log-probabilities float64 [V] of the token after the prompt, then after each forced token but the last.

    The prompt's last token and the forced ones are decode steps of one row, the rest is prefill. One row of logits at a time
    is in memory.

    Raises:
        InputError: an empty prompt, a text longer than the context, or an id outside the vocabulary.
    """
    known = len(prompt) - 1
    ids_T = model.checked([*map(int, prompt), *forced])[: known + len(forced)]
    cache = caches.empty(model.config, capacity_for(len(ids_T), model.config.max_context))
    for start, width, count in chunks(len(ids_T), known):
        wanted = start >= known
        cache, _, logits_TV, _ = extend(
            model.graph,
            model.weights,
            cache,
            None,
            padded(ids_T, start, width),
            padded(ids_T, start + 1, width),
            jnp.int32(count),
            jnp.int32(0),
            strict=strict,
            want_logits=wanted,
        )
        if logits_TV is not None:
            yield log_softmax(np.asarray(logits_TV)[0])


def score(
    model: LanguageModel, prompt: Sequence[int] | np.ndarray, forced: Sequence[int], top: int, *, strict: bool = False
) -> list[Scored]:
    """Each forced token with its log-probability and the `top` best alternatives, itself among them where it is one.

    Raises:
        InputError: as `following`.
    """
    rows = following(model, prompt, forced, strict=strict)
    return [Scored(token, float(row_V[token]), best(row_V, top)) for token, row_V in zip(forced, rows, strict=True)]


def best(logprobs_V: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens and their log-probabilities; of equals the lower id first."""
    order = np.argsort(-logprobs_V, kind="stable")[:count]
    return tuple((int(i), float(logprobs_V[i])) for i in order)


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """Float64, whatever the logits are."""
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())
