"""Gathers outputs of all devices of a process by direct stores: the kernel of the protocol in `pallas_kernels.linear.mailbox`.

It only moves bits. Each thread has one word: it stores it into the mailboxes of the others and then reads theirs, so that no
thread waits for one of its own device. Programs of a grid start in order, so the devices' first unfinished programs always run.

The gathers of a device must follow each other: each has to depend on the outputs of the one before.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.linear.mailbox import place_of, size_of
from pallas_kernels.linear.mailbox_words import Remote, Twin

NAME, LOST_NAME = "mailbox_gather", "mailbox_lost"
# Words of a program, one for each of its threads; see `mailbox_words`.
WARPS = 8
PROGRAM = 32 * WARPS
# A program's offsets into a mailbox are 32 bits wide.
MAX_BYTES = 2**31


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mail:
    """The mailboxes of P devices, as an argument of programs on each of them, inside `jax.shard_map`.

    Attributes:
        addresses: int32 [P, 2], low and high half of each mailbox's address.
        me: int32 [1], this device.
        words: static; maximum words that a device sends in an exchange.
    """

    addresses: jax.Array
    me: jax.Array
    words: int = dataclasses.field(metadata={"static": True})


def words_of(arrays: Sequence[Any]) -> int:
    """Words that a device sends in an exchange of these arrays."""
    return sum(math.prod(array.shape) for array in arrays)


def gather(parts: Sequence[jax.Array], mail: Mail, after: jax.Array | None = None) -> list[jax.Array]:
    """Outputs [T, n] of all devices from each one's parts [T, n/P] of type float32, of any numbers of rows, in one exchange.

    Args:
        after: what the gather before led to, if no part depends on it; is not read.

    Raises:
        ValueError: another type, or more words than a mailbox has places.
    """
    devices, work = len(mail.addresses), _work(parts, len(mail.addresses), mail.words)
    made: list[jax.Array] = pl.pallas_call(
        functools.partial(_on_gpu, work=work),
        out_shape=_shapes(parts, devices),
        grid=(-(-work.total // PROGRAM),),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"{NAME}_{work.total}",
    )(*parts, mail.addresses, mail.me, *(() if after is None else (after,)))
    return made


def lost(mail: Mail, after: jax.Array) -> jax.Array:
    """Whether words were missing on this device: their number, and 1 + the device that did not send the last one; int32 [2].

    Args:
        after: what the last gather led to; is not read.
    """

    def kernel(addresses: Any, me: Any, _: Any, out: Any) -> None:
        lane = jnp.arange(32, dtype=jnp.int32)
        word = jnp.minimum(lane, 1)
        plt.store(out.at[word], _remote(addresses, me[0], lane).look(word), mask=lane < 2)

    found: jax.Array = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((2,), jnp.int32),
        grid=(1,),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        name=LOST_NAME,
    )(mail.addresses, mail.me, after)
    return found


@functools.partial(jax.jit, static_argnames="sends")
def emulated(parts: Sequence[jax.Array], boxes: jax.Array, me: jax.Array, *, sends: bool) -> tuple[list[jax.Array], jax.Array]:
    """`gather` of one device in interpret mode, on an array in place of mailboxes: first all devices send, then each receives.

    Args:
        boxes: int32 [P, words, 2], values and flags of all mailboxes.
        me: int32 [1], the device.
        sends: static; whether it sends its parts or receives those of the others.

    Returns:
        The outputs, undefined if it sends, and the mailboxes.
    """
    devices, inputs = boxes.shape[0], len(parts)
    work = _work(parts, devices, (boxes.shape[1] - size_of(devices, 0)) // (2 * devices))
    *made, boxes = pl.pallas_call(
        functools.partial(_on_array, work=work, sends=sends),
        out_shape=[*_shapes(parts, devices), jax.ShapeDtypeStruct(boxes.shape, boxes.dtype)],
        grid=(-(-work.total // PROGRAM),),
        input_output_aliases={inputs: inputs},
        interpret=True,
    )(*parts, boxes, me)
    return made, boxes


@dataclasses.dataclass(frozen=True)
class _Work:
    """An exchange: rows and width of each part, and the sizes of the mailboxes."""

    shapes: tuple[tuple[int, int], ...]
    devices: int
    words: int

    @property
    def total(self) -> int:
        return sum(rows * width for rows, width in self.shapes)

    def place(self, half: jax.Array | int, sender: jax.Array | int, word: jax.Array) -> jax.Array:
        return place_of(half, sender, word, self.devices, self.words)  # type: ignore[arg-type, return-value]

    def inside(self, word: jax.Array) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """For each part: which words are in it, and their rows and columns; other words have a row that does not exist."""
        found, first = [], 0
        for rows, width in self.shapes:
            mask = (word >= first) & (word < first + rows * width)
            index = jnp.where(mask, word - first, rows * width)
            found.append((mask, index // width, index % width))
            first += rows * width
        return found


def _work(parts: Sequence[jax.Array], devices: int, words: int) -> _Work:
    if any(part.dtype != jnp.float32 for part in parts):
        raise ValueError(f"mailboxes move float32, not {', '.join(str(part.dtype) for part in parts)}")
    if words_of(parts) > words:
        raise ValueError(f"an exchange of {words_of(parts)} words; the mailboxes have places for {words}")
    if size_of(devices, words) * 8 > MAX_BYTES:
        raise ValueError(f"mailboxes of {size_of(devices, words) * 8} bytes; they can have {MAX_BYTES}")
    return _Work(tuple((part.shape[0], part.shape[1]) for part in parts), devices, words)


def _shapes(parts: Sequence[jax.Array], devices: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((part.shape[0], part.shape[1] * devices), part.dtype) for part in parts]


def _remote(addresses: Any, device: jax.Array, like: jax.Array) -> Remote:
    low, high = (jnp.broadcast_to(addresses[device, half], like.shape) for half in range(2))
    return Remote(low, high)


def _on_gpu(*refs: Any, work: _Work) -> None:
    count = len(work.shapes)
    parts, (addresses, me_ref), made = refs[:count], refs[count : count + 2], refs[-count:]
    word = pl.program_id(0) * PROGRAM + jnp.arange(PROGRAM, dtype=jnp.int32)
    me = me_ref[0]
    flag, value = _begun(lambda place, value, live: _remote(addresses, me, word).take(place, value, live), parts, me, word, work)
    sent = _sent(lambda device: _remote(addresses, device, word), value, flag, me, word, work)
    _received(_remote(addresses, me, word), made, sent, flag, me, word, work)


def _on_array(*refs: Any, work: _Work, sends: bool) -> None:
    count = len(work.shapes)
    parts, me_ref, made, boxes = refs[:count], refs[count + 1], refs[count + 2 : -1], refs[-1]
    word = pl.program_id(0) * PROGRAM + jnp.arange(PROGRAM, dtype=jnp.int32)
    me = me_ref[0]
    own = Twin(boxes, me)
    if sends:
        flag, value = _begun(own.take, parts, me, word, work)
        _sent(lambda device: Twin(boxes, device), value, flag, me, word, work)
    else:
        flag, value = _begun(lambda place, _, live: own.held(place, live), parts, me, word, work)
        _received(own, made, value, flag, me, word, work)


def _begun(
    flags: Callable[..., jax.Array], parts: Sequence[Any], me: jax.Array, word: jax.Array, work: _Work
) -> tuple[jax.Array, jax.Array]:
    """The flags of this program's words, and their values' bits."""
    value = jnp.zeros(word.shape, jnp.int32)
    for part, (mask, row, column) in zip(parts, work.inside(word), strict=True):
        loaded = plt.load(part.at[row, column], mask=mask, other=0.0)
        value = jnp.where(mask, jax.lax.bitcast_convert_type(loaded, jnp.int32), value)
    live = word < work.total
    # Words of other programs' places are not touched: a place that does not exist has the index of one that does.
    return flags(work.place(0, me, jnp.where(live, word, 0)), value, live), value


def _sent(
    box_of: Callable[[jax.Array], Any], value: jax.Array, flag: jax.Array, me: jax.Array, word: jax.Array, work: _Work
) -> jax.Array:
    """Store the words into the mailboxes of the other devices, the next one first."""
    for step in range(1, work.devices):
        value = box_of((me + step) % work.devices).send(work.place(flag & 1, me, word), value, flag)
    return value


def _received(
    own: Any, made: Sequence[Any], sent: jax.Array, flag: jax.Array, me: jax.Array, word: jax.Array, work: _Work
) -> None:
    """Store the outputs of this device, and those of the others when they come."""

    def store(sender: jax.Array, bits: jax.Array) -> None:
        values = jax.lax.bitcast_convert_type(bits, jnp.float32)
        for out, (_, width), (mask, row, column) in zip(made, work.shapes, work.inside(word), strict=True):
            plt.store(out.at[row, sender * width + column], values, mask=mask)

    store(me, sent)
    for step in range(1, work.devices):
        sender = (me + step) % work.devices
        store(sender, own.wait(work.place(flag & 1, sender, word), flag, sender, sent))
