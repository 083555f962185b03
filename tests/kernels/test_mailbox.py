"""Mailboxes in threads: late, missing and stale words, and flags that wrap."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numerics import assert_bits_equal

from pallas_kernels.linear.mailbox import FLAGS, Mailboxes, MissingWordError, flag_of, packed, place_of

WORDS = 3


def boxes(devices: int) -> list[np.ndarray]:
    return [np.zeros(2 * devices * WORDS, np.uint64) for _ in range(devices)]


def values(device: int, exchange: int) -> np.ndarray:
    """Every bit pattern counts: there are NaNs, zeros of both signs and the flags of other exchanges among them."""
    random = np.random.default_rng([device, exchange])
    drawn = random.integers(0, 1 << 32, WORDS, np.uint32)
    special = np.array([0, 0x80000000, 0x7FC00001, flag_of(exchange), flag_of(exchange - 1 if exchange else 0)], np.uint32)
    return np.where(random.random(WORDS) < 0.5, random.choice(special, WORDS), drawn).view(np.float32)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("first", [0, FLAGS - 5, 2 * FLAGS - 6])
def test_every_device_has_all_values(devices: int, first: int) -> None:
    """With devices that are late by turns, one exchange ahead at the most, and flags that wrap in the middle."""
    shared = boxes(devices)

    def run(me: int) -> list[np.ndarray]:
        random, own = np.random.default_rng(me), Mailboxes(shared, me, WORDS, first)
        found = []
        for exchange in range(first, first + 40):
            time.sleep(random.choice([0, 0, 0.002]))
            found.append(own.gather(values(me, exchange)))
        return found

    with ThreadPoolExecutor(devices) as pool:
        made = list(pool.map(run, range(devices)))
    for i, exchange in enumerate(range(first, first + 40)):
        expected = np.stack([values(device, exchange) for device in range(devices)])
        for found in made:
            assert_bits_equal(found[i], expected)


def test_flags_are_never_that_of_an_empty_box_and_differ_where_a_half_is_used_again() -> None:
    for exchange in (0, 1, 2, FLAGS - 2, FLAGS - 1, FLAGS, FLAGS + 1, 2 * FLAGS, 2**63):
        assert 1 <= flag_of(exchange) <= FLAGS < 2**32
        assert flag_of(exchange) not in (flag_of(exchange + 1), flag_of(exchange + 2))
    places = {place_of(exchange, sender, 4, WORDS) for exchange in (FLAGS, FLAGS + 1) for sender in range(4)}
    assert places == set(range(0, 2 * 4 * WORDS, WORDS))


def test_a_late_word_is_waited_for() -> None:
    shared = boxes(2)
    one, other = (Mailboxes(shared, me, WORDS) for me in range(2))
    timer = threading.Timer(0.2, other.gather, [values(1, 0)])
    timer.start()
    assert_bits_equal(one.gather(values(0, 0)), np.stack([values(0, 0), values(1, 0)]))
    timer.join()


@pytest.mark.parametrize("written", [0, 2])
def test_a_missing_word_is_an_error(written: int) -> None:
    """Of a device that sent nothing, or that was lost between two words."""
    shared = boxes(2)
    place = place_of(0, 1, 2, WORDS)
    shared[0][place : place + written] = packed(values(1, 0), 0)[:written]
    with pytest.raises(MissingWordError, match=f"^exchange 0: word {written} of device 1 did not come to device 0$"):
        Mailboxes(shared, 0, WORDS, looks=50).gather(values(0, 0))


@pytest.mark.parametrize("exchange", [2, 7, FLAGS, FLAGS + 1, 2 * FLAGS])
def test_a_stale_word_is_not_taken(exchange: int) -> None:
    """Of the exchange before last, which used the same half, also where the flags wrap in between."""
    shared = boxes(2)
    place = place_of(exchange - 2, 1, 2, WORDS)
    assert place == place_of(exchange, 1, 2, WORDS)
    shared[0][place : place + WORDS] = packed(values(1, exchange - 2), exchange - 2)
    with pytest.raises(MissingWordError, match=f"exchange {exchange}: word 0 of device 1"):
        Mailboxes(shared, 0, WORDS, exchange, looks=50).gather(values(0, exchange))
