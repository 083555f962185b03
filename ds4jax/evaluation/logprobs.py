"""Log probabilities of a given text's tokens, teacher forced, unfiltered, at temperature 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from ds4jax.cache import state as caches
from ds4jax.cache.capacity import capacity_for, chunks, padded
from ds4jax.decode.scoring import extend
from ds4jax.engine.loaded import Loaded


@dataclasses.dataclass(frozen=True)
class Scored:
    """One token of a text.

    Attributes:
        id: the token.
        logprob: natural logarithm of its probability.
        top: the most likely tokens and their log probabilities, best first; equal ones by id.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def following(
    model: Loaded, prompt: Sequence[int] | np.ndarray, forced: Sequence[int], *, strict: bool = False
) -> Iterator[np.ndarray]:
    """Yield log probabilities float64 [V] after the prompt, then after each forced token except the last.

    The prompt's last token and the forced tokens are decode steps of one row; the other tokens are prefill. One row of logits
    is in memory at a time.

    Raises:
        InputError: the prompt is empty, the text is longer than the context, or an id is outside the vocabulary.
    """
    known = len(prompt) - 1
    ids_T = model.checked([*map(int, prompt), *forced])[: known + len(forced)]
    cache = caches.empty(model.config, capacity_for(len(ids_T), model.config.max_context))
    for start, width, count in chunks(len(ids_T), known):
        wanted = start >= known
        cache, _, logits_TV, *_ = extend(
            model.graph,
            model.arrays,
            cache,
            None,
            padded(ids_T, start, width),
            padded(ids_T, start + 1, width),
            np.int32(count),
            np.int32(0),
            strict=strict,
            want_logits=wanted,
        )
        if logits_TV is not None:
            yield log_softmax(np.asarray(logits_TV)[0])


def score(
    model: Loaded, prompt: Sequence[int] | np.ndarray, forced: Sequence[int], top: int, *, strict: bool = False
) -> list[Scored]:
    """Score each forced token: its log probability and the `top` most likely tokens, which may include it.

    Raises:
        InputError: as `following`.
    """
    rows = following(model, prompt, forced, strict=strict)
    return [Scored(token, float(row_V[token]), best(row_V, top)) for token, row_V in zip(forced, rows, strict=True)]


def best(logprobs_V: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens and their log probabilities, best first; equal ones by id."""
    order = np.argsort(-logprobs_V, kind="stable")[:count]
    return tuple((int(i), float(logprobs_V[i])) for i in order)


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """Log probabilities float64 [V] of logits [V] of any float type."""
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())
