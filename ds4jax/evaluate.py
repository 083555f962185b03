"""How well a model predicts a text: bits per byte, and how often its MTP block agrees with it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

WINDOW = 1024
ROWS = 128


@dataclasses.dataclass(frozen=True)
class Score:
    """What `evaluate` returns.

    Attributes:
        tokens, bytes: of the text, without the begin-of-sentence token.
        bits_per_byte: sum of -log2 p(token) over the text's tokens, divided by its bytes in UTF-8.
        mtp_agreement: fraction of tokens for which the MTP block, one token earlier, named the same most likely token as the
            model; None without an MTP block or where the text has a single token.
    """

    tokens: int
    bytes: int
    bits_per_byte: float
    mtp_agreement: float | None


def windows(count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """How a sequence of begin-of-sentence and `count` tokens is cut into inputs of at most `size`.

    Yields:
        start, stop, first: tokens start..stop-1 go in, and the predictions of tokens first+1..stop count. Every token counts
        once. All windows but a lone short one are `size` long; each after the first counts its last `size // 2` predictions at
        most, so that every counted one has at least that many tokens before it.
    """
    first = 0
    while first < count:
        stop = min(max(first + size // 2, size), count)
        yield max(stop - size, 0), stop, first
        first = stop


def evaluate(model: LanguageModel, text: str, *, progress: bool = False) -> Score:
    """Score a text with a model, teacher forced, in overlapping windows (see `windows`) of at most 1024 tokens.

    The sequence is the begin-of-sentence token and the text's tokens. The prediction of token t+1 comes from the model's
    logits at t in its window; the MTP block's logits at t-1 are made from the streams at t-1 and token t, and agree when their
    argmax is that of the model's logits at t.

    Args:
        progress: show a bar on stderr.

    Raises:
        InputError: the model has no tokenizer, or the text no tokens.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.path or 'the model'}: tokenizer: none in these files; a text needs one")
    ids = np.array([model.config.bos_id, *model.tokenizer.encode(text)], np.int32)
    count = len(ids) - 1
    if count == 0:
        raise InputError("the text is empty; there is nothing to score")
    mtp = bool(model.config.n_mtp)
    bits, agreed = 0.0, 0
    for start, stop, first in _shown(list(windows(count, min(model.config.max_context, WINDOW))), progress):
        # Strict: the few rows at a window's end are scored like the rest, with the weights as they are stored.
        arrays = model.logits(ids[start:stop], mtp=mtp, strict=True)
        logits_TV = arrays["logits"]
        bits += _bits(logits_TV[first - start :], ids[first + 1 : stop + 1])
        if mtp:
            before = max(first - start, 1)
            agreed += int(np.sum(logits_TV[before:].argmax(-1) == arrays["mtp_logits"][before - 1 :].argmax(-1)))
    size = len(text.encode())
    return Score(count, size, bits / size, agreed / (count - 1) if mtp and count > 1 else None)


def _bits(logits_TV: np.ndarray, ids_T: np.ndarray) -> float:
    """Sum of -log2 p over rows, in float64, a few rows at a time because a vocabulary can be large."""
    total = 0.0
    for start in range(0, len(ids_T), ROWS):
        part = logits_TV[start : start + ROWS].astype(np.float64)
        part -= part.max(-1, keepdims=True)
        chosen = np.take_along_axis(part, ids_T[start : start + ROWS, None].astype(np.int64), -1)[:, 0]
        total += float(np.sum(np.log(np.sum(np.exp(part), -1)) - chosen))
    return total / np.log(2.0)


def _shown(cuts: list[tuple[int, int, int]], progress: bool) -> Iterator[tuple[int, int, int]]:
    if not (progress and sys.stderr and sys.stderr.isatty()):
        yield from cuts
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(cuts, "scoring", console=Console(stderr=True), transient=True)
