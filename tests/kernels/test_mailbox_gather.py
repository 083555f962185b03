"""The kernel that gathers by mailboxes: its logic on an array in place of several devices' memory, and lowered for CUDA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import assert_bits_equal

from pallas_kernels.linear.mailbox import FLAGS, next_flag, place_of, size_of
from pallas_kernels.linear.mailbox_gather import LOST_NAME, NAME, Mail, emulated, gather, lost
from pallas_kernels.linear.mailbox_words import POISON

WORDS = 700
# Rows and a device's width of each array of an exchange: less than a program, odd ends, several arrays, several programs.
EXCHANGES = ([(1, 1)], [(2, 64), (2, 64), (12, 16)], [(3, 100)])


def empty(devices: int, last: int = 0) -> jax.Array:
    """Mailboxes in which `last` is the last flag of every place."""
    boxes = np.zeros((devices, size_of(devices, WORDS), 2), np.uint32)
    for me in range(devices):
        first = place_of(0, me, 0, devices, WORDS)
        boxes[me, first : first + WORDS, 1] = last
    return jnp.asarray(boxes.view(np.int32))


def arrays(shapes: list[tuple[int, int]], device: int, number: int) -> list[jax.Array]:
    """Every bit pattern counts."""
    random = np.random.default_rng([device, number])
    return [jnp.asarray(random.integers(0, 1 << 32, shape, np.uint32).view(np.float32)) for shape in shapes]


def run(parts: list[list[jax.Array]], boxes: jax.Array, me: int, *, sends: bool) -> tuple[list[jax.Array], jax.Array]:
    return emulated(parts[me], boxes, jnp.array([me], jnp.int32), sends=sends)


def assert_whole(found: list[jax.Array], parts: list[list[jax.Array]]) -> None:
    for i, whole in enumerate(found):
        assert_bits_equal(np.asarray(whole), np.concatenate([np.asarray(own[i]) for own in parts], axis=1))


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("last", [0, FLAGS - 3])
def test_every_device_has_all_outputs(devices: int, last: int) -> None:
    """In exchanges of several sizes on the same places, while flags wrap."""
    boxes = empty(devices, last)
    for number, shapes in enumerate([*EXCHANGES, *EXCHANGES[::-1]]):
        parts = [arrays(shapes, me, number) for me in range(devices)]
        for me in range(devices):
            _, boxes = run(parts, boxes, me, sends=True)
        for me in range(devices):
            found, boxes = run(parts, boxes, me, sends=False)
            assert_whole(found, parts)
    assert not np.asarray(boxes[:, 0]).any()


def test_words_lie_where_the_protocol_says() -> None:
    """Word i of the sender, with the next flag, in the flag's half of the other's mailbox and in the sender's own first half."""
    [part] = arrays([(3, 100)], 0, 0)
    _, boxes = run([[part]], empty(2, last=5), 0, sends=True)
    words, bits = np.asarray(boxes).view(np.uint32), np.asarray(part).view(np.uint32).reshape(-1)
    flag = next_flag(5)
    for device, half in ((0, 0), (1, flag % 2)):
        first = place_of(half, 0, 0, 2, WORDS)
        np.testing.assert_array_equal(words[device, first : first + 300, 0], bits)
        np.testing.assert_array_equal(words[device, first : first + 300, 1], flag)
    assert np.count_nonzero(words[1, :, 1] == flag) == 300


@pytest.mark.parametrize("lose", ["all", "one", "stale"])
def test_a_missing_word_is_written_down_and_no_number_is_wrong(lose: str) -> None:
    """Of three devices the last one loses words. Then the reader sends nothing, so that the others miss its words."""
    devices, shapes, reader, loser = 3, [(2, 100)], 0, 2
    boxes = empty(devices, last=2)
    parts = [arrays(shapes, me, 0) for me in range(devices)]
    for me in range(devices):
        _, boxes = run(parts, boxes, me, sends=True)
    first, count = place_of(next_flag(2) % 2, loser, 0, devices, WORDS), 1 if lose == "one" else 200
    boxes = boxes.at[reader, first : first + count, 1].set(1 if lose == "stale" else 0)
    [found], boxes = run(parts, boxes, reader, sends=False)
    assert np.asarray(boxes[reader, 0]).tolist() == [count, 1 + loser]
    own = np.asarray(found).view(np.uint32).reshape(2, devices, 100)
    assert (own[:, loser].reshape(-1)[:count] == POISON).all()
    assert_bits_equal(own[:, 1].view(np.float32), np.asarray(parts[1][0]))

    for me in range(1, devices):
        found_there, boxes = run(parts, boxes, me, sends=False)
        assert_whole(found_there, parts)
    for me in range(devices):
        _, boxes = run(parts, boxes, me, sends=True)
    [found], boxes = run(parts, boxes, reader, sends=False)
    assert (np.asarray(found).view(np.uint32).reshape(2, devices, 100)[:, 1:] == POISON).all()
    assert np.asarray(boxes[reader, 0]).tolist() == [count, 1 + loser]
    _, boxes = run(parts, boxes, 1, sends=False)
    assert np.asarray(boxes[1, 0]).tolist() == [200, 1 + reader]


@pytest.mark.parametrize(
    ("part", "words", "message"),
    [
        (jax.ShapeDtypeStruct((3, 101), jnp.float32), 302, "an exchange of 303 words; the mailboxes have places for 302"),
        (jax.ShapeDtypeStruct((3, 101), jnp.bfloat16), 400, "mailboxes move float32, not bfloat16"),
        (jax.ShapeDtypeStruct((3, 101), jnp.float32), 1 << 27, "mailboxes of .* bytes; they can have .*"),
    ],
)
def test_what_does_not_fit_is_refused(part: jax.ShapeDtypeStruct, words: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}(\n|$)"):
        jax.eval_shape(lambda part, *mail: gather([part], Mail(*mail, words)), part, *mail_shapes(2))


def mail_shapes(devices: int) -> tuple[Any, ...]:
    return jax.ShapeDtypeStruct((devices, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_it_lowers_for_cuda(devices: int, rows: int) -> None:
    """The hidden values of V4-Flash, an odd width, and the look at what is missing."""

    def step(gate: jax.Array, hidden: jax.Array, odd: jax.Array, *mail: jax.Array) -> Any:
        box = Mail(*mail, 1 << 20)
        [whole] = gather([odd], box)
        return gather([gate, gate, hidden], box), whole, lost(box, whole)

    shapes = [(rows, 2048 // devices), (6 * rows, 2048 // devices), (rows, 1001)]
    parts = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = lowered_for_cuda(jax.jit(step), *parts, *mail_shapes(devices))
    assert kernel_calls(text, NAME) == 2
    assert kernel_calls(text, LOST_NAME) == 1
