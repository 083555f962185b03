"""Tensors read in pieces, and pieces fetched ahead in threads."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.errors import InputError
from ds4jax.loading import gguf_values
from ds4jax.loading.gguf_header import TENSOR_TYPES, Header, Shard, TensorInfo
from ds4jax.loading.gguf_values import reading
from ds4jax.loading.tensor_reader import AHEAD, Reading, read_ahead
from pallas_kernels.formats import FORMATS, Quantized

SHAPE = (7, 3, 256)
EXPERTS = 128
# Offset of the tensor: at this alignment a CPU always copies.
OFFSET = 96


def stored(kind: str) -> Header:
    """A tensor `t` of small values drawn at random: those of a type's high bytes are below 64, expert ids below 64."""
    _, block, block_bytes = next(row for row in TENSOR_TYPES.values() if row[0] == kind)
    count = 7 * 3 * 256 // block * block_bytes
    data = np.zeros(OFFSET + count, np.uint8)
    data[OFFSET:] = np.random.default_rng(0).integers(0, 64, count)
    if kind == "I32":
        data[OFFSET:].view("<i4")[:] &= 63
    return Header(Path("m.gguf"), {}, {"t": TensorInfo("t", kind, SHAPE, OFFSET, count)}, (Shard(Path("m.gguf"), data),))


def leaves(value: jax.Array | Quantized) -> list[np.ndarray]:
    return [np.asarray(plane) for plane in jax.tree.leaves(value)]


# These have planes of every kind, and blocks as they are stored; splitting the others takes long to compile.
USUAL = ("Q8_0", "Q2_K", "Q4_K", "MXFP4", "IQ3_S")
KINDS = [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.long) for kind in FORMATS]


@pytest.mark.parametrize("kind", [*KINDS, "F32", "F16", "BF16", "I32"])
def test_pieces_make_the_value_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = stored(kind)
    info = header.tensors["t"]
    whole = reading(header, info, EXPERTS)
    # Three pieces of three matrices: the last shares two with the one before.
    monkeypatch.setattr(gguf_values, "_PIECE", -(-info.nbytes // 3))
    monkeypatch.setattr(gguf_values, "_SMALL", 0)
    parts = reading(header, info, EXPERTS)
    assert (len(whole.pieces), len(parts.pieces)) == (1, 3)
    value, expected = parts.value(), whole.value()
    assert value.shape == SHAPE
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), leaves(value), leaves(expected))
    # Neither is a view of the file.
    header.shards[0].data[:] = 0
    assert any(plane.any() for plane in leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, leaves(value), leaves(expected))


@pytest.mark.parametrize(
    ("kind", "at", "message"),
    [
        ("Q2_K", 84 * 19 + 81, "the scale of block 19 is not finite"),
        ("F16", 2 * ((6 * 3 + 1) * 256 + 5) + 1, "value [6, 1, 5] is not finite"),
        ("I32", 4 * (6 * 3 * 256) + 3, "names expert"),
    ],
)
def test_a_broken_value_in_the_last_piece(kind: str, at: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = stored(kind)
    header.shards[0].data[OFFSET + at] = 0x7F
    monkeypatch.setattr(gguf_values, "_PIECE", 1)
    first = reading(header, header.tensors["t"], EXPERTS)
    assert len(first.pieces) == 7
    with pytest.raises(InputError) as error:
        first.value()
    assert str(error.value).startswith(f"m.gguf: t: {message}")


def added(pieces: object) -> jax.Array:
    return sum(pieces, jnp.zeros(()))  # type: ignore[call-overload]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ds4jax-read")]


def test_fetching_stays_a_little_ahead() -> None:
    fetched: list[int] = []

    def piece(number: int) -> jax.Array:
        fetched.append(number)
        return jnp.float32(number)

    readings = [Reading(tuple(functools.partial(piece, 2 * i + j) for j in range(2)), added) for i in range(3 * AHEAD)]
    readings.insert(1, Reading.at_once(lambda: jnp.float32(-1)))
    with read_ahead(readings) as values:
        found = [np.asarray(next(values))]
        time.sleep(0.05)
        # Two have been taken.
        assert len(fetched) <= AHEAD + 2
        assert threads()
        found += map(np.asarray, values)
    assert found == [1.0, -1.0, *(4.0 * i + 1 for i in range(1, 3 * AHEAD))]
    assert sorted(fetched) == list(range(6 * AHEAD))
    assert not threads()


def test_the_first_error_in_order_ends_it() -> None:
    late = threading.Event()

    def fail(message: str, wait: bool) -> jax.Array:
        if wait:
            # With two threads, the other one has failed by then.
            late.wait(0.05)
        late.set()
        raise InputError(message)

    def pieces(*calls: Callable[[], jax.Array]) -> Reading:
        return Reading(calls, added)

    def count() -> jax.Array:
        unreached.append(1)
        return jnp.float32(1)

    unreached: list[int] = []
    good = pieces(lambda: jnp.float32(1))
    broken = [pieces(functools.partial(fail, "first", True)), pieces(functools.partial(fail, "second", False))]
    rest = [pieces(count) for _ in range(3 * AHEAD)]
    with pytest.raises(InputError, match="first"), read_ahead([good, *broken, *rest]) as values:
        list(values)
    assert not threads()
    assert len(unreached) <= AHEAD


@pytest.mark.skipif(jax.device_count() < 2, reason="one device: there is no other to choose")
def test_the_device_of_the_caller() -> None:
    """`jax.default_device` as a context applies in the threads too."""
    last = jax.devices()[-1]
    with jax.default_device(last), read_ahead([Reading((lambda: jax.device_put(np.ones(2)),), next)]) as values:
        value = next(values)
    assert isinstance(value, jax.Array)
    assert value.devices() == {last}
