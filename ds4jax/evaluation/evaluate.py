"""Scores a text with a model: bits per byte and MTP agreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from ds4jax.engine.loaded import Loaded
from ds4jax.errors import InputError

WINDOW = 1024
ROWS = 128


@dataclasses.dataclass(frozen=True)
class Score:
    """Result of `evaluate`.

    Attributes:
        tokens, bytes: size of the text, without the begin-of-sentence token.
        bits_per_byte: sum of -log2 p(token) over the text's tokens, divided by its bytes in UTF-8.
        mtp_agreement: share of positions where the MTP block's top token, predicted one token earlier, equals the model's; None
            without an MTP block or for a text of one token.
    """

    tokens: int
    bytes: int
    bits_per_byte: float
    mtp_agreement: float | None


def windows(count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut a sequence of one begin-of-sentence token and `count` tokens into overlapping windows.

    Yields:
        start, stop, first: tokens start..stop-1 are the input, and the predictions of tokens first+1..stop count. Every token
        counts once. Windows have `size` tokens; a shorter sequence has one shorter window. Each window after the first counts
        at most its last `size // 2` predictions, so each of these has at least `size // 2` tokens before it.
    """
    first = 0
    while first < count:
        stop = min(max(first + size // 2, size), count)
        yield max(stop - size, 0), stop, first
        first = stop


def evaluate(model: Loaded, text: str, *, progress: Callable[[int, int], None] | None = None) -> Score:
    """Score a text, teacher forced, in overlapping windows (see `windows`) of at most 1024 tokens.

    The sequence is the begin-of-sentence token and the text's tokens. The model's logits at t predict token t+1.
    MTP agreement: the share of positions where the MTP block's top token equals the model's. The block's logits at t-1 also
    predict token t+1; their inputs are the streams at t-1 and token t.

    Args:
        progress: called after each window with the windows scored and their total.

    Raises:
        InputError: the model has no tokenizer, or the text has no tokens.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.path or 'the model'}: tokenizer: none in these files; a text needs one")
    ids = np.array([model.config.bos_id, *model.tokenizer.encode(text)], np.int32)
    count = len(ids) - 1
    if count == 0:
        raise InputError("the text is empty; there is nothing to score")
    mtp = bool(model.config.n_mtp)
    bits, agreed = 0.0, 0
    cuts = list(windows(count, min(model.config.max_context, WINDOW)))
    for done, (start, stop, first) in enumerate(cuts, 1):
        # Strict: the few rows at the end of a window take the same path as the others, with the stored weights.
        arrays = model.logits(ids[start:stop], mtp=mtp, strict=True)
        logits_TV = arrays["logits"]
        bits += _bits(logits_TV[first - start :], ids[first + 1 : stop + 1])
        if mtp:
            before = max(first - start, 1)
            agreed += int(np.sum(logits_TV[before:].argmax(-1) == arrays["mtp_logits"][before - 1 :].argmax(-1)))
        if progress:
            progress(done, len(cuts))
    size = len(text.encode())
    return Score(count, size, bits / size, agreed / (count - 1) if mtp and count > 1 else None)


def _bits(logits_TV: np.ndarray, ids_T: np.ndarray) -> float:
    """Sum of -log2 p over rows, in float64. Works on a few rows at a time, because a vocabulary can be large."""
    total = 0.0
    for start in range(0, len(ids_T), ROWS):
        part = logits_TV[start : start + ROWS].astype(np.float64)
        part -= part.max(-1, keepdims=True)
        chosen = np.take_along_axis(part, ids_T[start : start + ROWS, None].astype(np.int64), -1)[:, 0]
        total += float(np.sum(np.log(np.sum(np.exp(part), -1)) - chosen))
    return total / np.log(2.0)
