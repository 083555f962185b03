"""A baseline for language models: byte n-gram counts with Witten-Bell interpolation."""

from __future__ import annotations

import numpy as np

# A context and the byte after it are packed in one 64-bit integer.
MAX_ORDER = 7


def bits_per_byte(train: bytes, heldout: bytes, order: int = 6) -> float:
    """Bits per byte of `heldout` under the counts of `train`.

    P(s | h) = (c(h, s) + T(h) · P(s | h')) / (N(h) + T(h)), where c(h, s) counts byte s after context h, N(h) counts all bytes
    after h, T(h) counts the distinct bytes after h, and h' is h without its oldest byte. Contexts have 0 to `order` bytes. The
    empty context falls back to 1/256 for every byte. An unseen context keeps P(s | h'). The first bytes of a text have shorter
    contexts. Takes about 2 s for 4 MB.

    Raises:
        ValueError: `heldout` is empty, or `order` is not in 0..7.

    Source: Witten and Bell, "The zero-frequency problem: estimating the probabilities of novel events in adaptive text
    compression", IEEE Transactions on Information Theory 37(4), 1991: method C.
    """
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"order is {order}; it must be 0 to {MAX_ORDER}")
    if not heldout:
        raise ValueError("heldout is empty; there is nothing to score")
    probability = np.full(len(heldout), 1 / 256)
    # A text of n bytes has only contexts shorter than n.
    for length in range(min(order, len(train) - 1, len(heldout) - 1) + 1):
        shorter = probability[length:]
        follows, total, kinds = _lookup(_packed(train, length), _packed(heldout, length))
        mass = total + kinds
        probability[length:] = np.divide(follows + kinds * shorter, mass, out=shorter.copy(), where=mass > 0)
    return float(-np.log2(probability).mean())


def _packed(text: bytes, length: int) -> np.ndarray:
    """Each byte packed with the `length` bytes before it, uint64 [len(text) - length]. The byte itself is in the low bits."""
    symbols = np.frombuffer(text, np.uint8)
    count = len(symbols) - length
    packed = np.zeros(count, np.uint64)
    for offset in range(length + 1):
        packed = packed << np.uint64(8) | symbols[offset : offset + count]
    return packed


def _lookup(train: np.ndarray, heldout: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each packed entry of `heldout`: c(h, s), N(h) and T(h) in `train`."""
    entries, counts = np.unique(train, return_counts=True)
    contexts, starts = np.unique(entries >> np.uint64(8), return_index=True)
    totals = np.add.reduceat(counts, starts)
    kinds = np.diff(starts, append=len(entries))

    entry, known_entry = _find(entries, heldout)
    context, known_context = _find(contexts, heldout >> np.uint64(8))
    return counts[entry] * known_entry, totals[context] * known_context, kinds[context] * known_context


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each key in a sorted table, and whether the table contains it."""
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return index, table[index] == keys
