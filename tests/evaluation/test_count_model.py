"""The count baseline: by hand, against dictionaries, and on the text that ships."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ds4jax.evaluation.count_model import bits_per_byte
from ds4jax.training.corpus import split_chapters


def by_dictionaries(train: bytes, heldout: bytes, order: int) -> float:
    """The definition, recursively and in exact fractions."""
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for i, symbol in enumerate(train):
        for length in range(min(order, i) + 1):
            counts[train[i - length : i]][symbol] += 1

    def probability(context: bytes | None, symbol: int) -> Fraction:
        if context is None:
            return Fraction(1, 256)
        shorter = probability(context[1:] if context else None, symbol)
        if context not in counts:
            return shorter
        after = counts[context]
        return (after[symbol] + len(after) * shorter) / (sum(after.values()) + len(after))

    costs = [-math.log2(probability(heldout[max(i - order, 0) : i], symbol)) for i, symbol in enumerate(heldout)]
    return sum(costs) / len(costs)


def test_by_hand():
    # "aab": a twice and b once, two kinds, so no context gives (2 + 2/256)/5 for a and (1 + 2/256)/5 for b.
    # After a came one a and one b: (1 + 2·P(a))/4 and (1 + 2·P(b))/4. Nothing followed b.
    a, b = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5
    costs = [a, (1 + 2 * b) / 4, a]
    assert bits_per_byte(b"aab", b"aba", order=1) == pytest.approx(-sum(map(math.log2, costs)) / 3, rel=1e-12)


def test_without_training_every_byte_costs_eight_bits():
    assert bits_per_byte(b"", b"anything") == 8


few_bytes = st.lists(st.sampled_from(b"\x00ab\xff"), max_size=40).map(bytes)


@given(train=few_bytes, heldout=few_bytes.filter(len), order=st.integers(0, 7))
@example(train=b"abcdefgh", heldout=b"abcdefgh", order=7)
@example(train=b"\x00\x00\x00\x00", heldout=b"\x00\x00", order=6)
def test_equals_dictionaries(train, heldout, order):
    assert bits_per_byte(train, heldout, order) == pytest.approx(by_dictionaries(train, heldout, order), rel=1e-12)


def test_order_is_how_many_bytes_before_count():
    """What follows is told by the seventh byte back: of use at order 7 and of none at order 6."""
    train = b"1abcdef1 2abcdef2 " * 8
    at = {order: [bits_per_byte(train, first + b"abcdef1", order) for first in (b"1", b"2")] for order in (6, 7)}
    # The first byte itself costs the same, both follow the same contexts in training equally often but for the start.
    assert at[6][0] == pytest.approx(at[6][1], abs=1e-9)
    assert at[7][0] < at[7][1] - 0.3


def test_shipped_texts(root):
    train = (root / "ds4jax/assets/train_extract.txt").read_bytes()
    heldout = (root / "ds4jax/assets/heldout.txt").read_bytes()
    costs = [bits_per_byte(train, heldout, order) for order in range(8)]
    assert costs[6] == pytest.approx(2.592, abs=5e-4)
    assert costs[4] == min(costs)
    # A training text this small does not fill long contexts; on itself more context is always better.
    assert sorted(costs[:5], reverse=True) == costs[:5]
    itself = [bits_per_byte(train, train, order) for order in range(8)]
    assert sorted(itself, reverse=True) == itself


def test_whole_corpus(root):
    corpus = root.parent / "shared/corpus/kjv.txt"
    if not corpus.exists():
        pytest.skip(f"the whole corpus is not beside the checkout ({corpus.name})")
    train, heldout = split_chapters(corpus.read_text("ascii"))
    assert bits_per_byte(train.encode(), heldout.encode()) == pytest.approx(1.6658, abs=5e-5)


@pytest.mark.parametrize(
    ("heldout", "order", "message"), [(b"", 6, "heldout is empty"), (b"a", 8, "order is 8"), (b"a", -1, "order")]
)
def test_refuses(heldout, order, message):
    with pytest.raises(ValueError, match=message):
        bits_per_byte(b"abc", heldout, order)
