"""Mailboxes in threads: late, missing and stale words, exchanges of several sizes, and flags that wrap."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numerics import assert_bits_equal

from pallas_kernels.linear.mailbox import FLAGS, HEADER, Mailboxes, MissingWordError, next_flag, place_of, size_of

WORDS = 3


def boxes(devices: int, last: int = 0) -> list[np.ndarray]:
    """Mailboxes in which `last` is the last flag of every place."""
    made = [np.zeros(size_of(devices, WORDS), np.uint64) for _ in range(devices)]
    for me, box in enumerate(made):
        box[place_of(0, me, 0, devices, WORDS) :][:WORDS] = last << 32
    return made


def values(device: int, number: int, count: int = WORDS) -> np.ndarray:
    """Every bit pattern counts: there are NaNs, zeros of both signs and flags among them."""
    random = np.random.default_rng([device, number])
    drawn = random.integers(0, 1 << 32, count, np.uint32)
    special = np.array([0, 0x80000000, 0x7FC00001, number + 1, number, FLAGS], np.uint32)
    return np.where(random.random(count) < 0.5, random.choice(special, count), drawn).view(np.float32)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("last", [0, FLAGS - 5, FLAGS - 6])
def test_every_device_has_all_values(devices: int, last: int) -> None:
    """With devices that are late by turns, exchanges of other sizes that share places, and flags that wrap in the middle."""
    shared, sizes = boxes(devices, last), np.random.default_rng(0).integers(1, WORDS + 1, 40)

    def run(me: int) -> list[np.ndarray]:
        random, own = np.random.default_rng(me), Mailboxes(shared, me, WORDS)
        found = []
        for number, size in enumerate(sizes):
            time.sleep(random.choice([0, 0, 0.002]))
            found.append(own.gather(values(me, number, size)))
        return found

    with ThreadPoolExecutor(devices) as pool:
        made = list(pool.map(run, range(devices)))
    for number, size in enumerate(sizes):
        expected = np.stack([values(device, number, size) for device in range(devices)])
        for found in made:
            assert_bits_equal(found[number], expected)


@pytest.mark.parametrize("flag", [0, 1, 2, FLAGS - 2, FLAGS - 1, FLAGS])
def test_the_next_flag_is_in_the_other_half_and_never_that_of_an_empty_box(flag: int) -> None:
    after = next_flag(flag)
    assert 1 <= after <= FLAGS < 2**32
    assert after % 2 != flag % 2
    assert next_flag(after) not in (flag, after)


def test_every_word_has_a_place_of_its_own() -> None:
    places = [place_of(half, sender, i, 4, WORDS) for half in (0, 1) for sender in range(4) for i in range(WORDS)]
    assert sorted(places) == list(range(HEADER, size_of(4, WORDS)))


def test_a_late_word_is_waited_for() -> None:
    shared = boxes(2)
    one, other = (Mailboxes(shared, me, WORDS) for me in range(2))
    timer = threading.Timer(0.2, other.gather, [values(1, 0)])
    timer.start()
    assert_bits_equal(one.gather(values(0, 0)), np.stack([values(0, 0), values(1, 0)]))
    timer.join()


@pytest.mark.parametrize("written", [0, 2])
def test_a_missing_word_is_an_error_and_ends_the_mailbox(written: int) -> None:
    """Of a device that sent nothing, or that was lost between two words. Then the device sends nothing, and the other fails."""
    shared, flag = boxes(2), next_flag(0)
    for i in range(written):
        shared[0][place_of(flag % 2, 1, i, 2, WORDS)] = flag << 32
    one, other = (Mailboxes(shared, me, WORDS, looks=50) for me in range(2))
    with pytest.raises(MissingWordError, match=f"^word {written} of device 1 did not come to device 0$"):
        one.gather(values(0, 0))
    other.gather(values(1, 0))
    with pytest.raises(MissingWordError, match="^device 0 has missed words before$"):
        one.gather(values(0, 1))
    with pytest.raises(MissingWordError, match="^word 0 of device 0 did not come to device 1$"):
        other.gather(values(1, 1))


@pytest.mark.parametrize("last", [2, 7, FLAGS - 1, FLAGS, 1])
def test_a_stale_word_is_not_taken(last: int) -> None:
    """Of the exchange before last, which used the same half, also where the flags wrap in between."""
    shared = boxes(2, last)
    stale = last - 1 if last > 1 else FLAGS
    place = place_of(stale % 2, 1, 0, 2, WORDS)
    assert place == place_of(next_flag(last) % 2, 1, 0, 2, WORDS)
    shared[0][place : place + WORDS] = stale << 32
    with pytest.raises(MissingWordError, match="^word 0 of device 1"):
        Mailboxes(shared, 0, WORDS, looks=50).gather(values(0, 0))
