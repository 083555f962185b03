"""Converts a prompt, text or token ids, to the token ids that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ds4jax import bounds
from ds4jax.config import Config
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray


def encoded(prompt: Prompt, config: Config, tokenizer: Tokenizer | None, path: Path | None) -> np.ndarray:
    """Token ids int32 [T] of a prompt. A text gets the begin-of-sentence token first. Needs only the model's header.

    Args:
        path: the model's path, for messages.

    Raises:
        InputError: the prompt is empty, longer than the context or outside the vocabulary, or a text has no tokenizer.
    """
    if not isinstance(prompt, str):
        return checked(prompt, config)
    if tokenizer is None:
        raise InputError(f"{path or 'the model'}: tokenizer: none in these files; give the prompt as token ids")
    if not prompt:
        raise InputError("prompt is empty; give at least one character")
    return checked([config.bos_id, *tokenizer.encode(prompt)], config)


def checked(ids: Sequence[int] | np.ndarray, config: Config) -> np.ndarray:
    """Token ids as int32 [T].

    Raises:
        InputError: `ids` is not a list of integers, is empty or longer than the context, or an id is outside the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError):
        # Not convertible to an array, for example nested lists of different lengths.
        raise InputError(f"token ids are {bounds.shown(ids)}; they must be a list of integers") from None
    if array.size == 0:
        raise InputError("prompt is empty; give at least one token")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"token ids are {array.dtype}{list(array.shape)}; they must be a list of integers")
    if len(array) > config.max_context:
        raise InputError(f"prompt has {len(array)} tokens; the model's context is {config.max_context}")
    outside = array[(array < 0) | (array >= config.vocab_size)]
    if len(outside):
        raise InputError(f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}")
    return array.astype(np.int32)
