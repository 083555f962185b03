"""Beginnings of prompts that an engine keeps, in memory and on disk: what they give has the bits of computing it."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from engines import CHUNK, CONTEXT, alone, assert_same, engine
from numerics import assert_bits_equal
from small_models import shallow_model, text

from ds4jax.cache import capacity
from ds4jax.cache.capacity import cut
from ds4jax.engine import shape as shape_module
from ds4jax.engine.chunk_state import ChunkState
from ds4jax.engine.intake import Intake
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.prefix import PrefixCache
from ds4jax.engine.prefix_folder import PrefixFolder
from ds4jax.engine.request import Request
from ds4jax.engine.shape import Shape
from ds4jax.engine.slots import Slots
from ds4jax.engine.wish import Wish
from ds4jax.errors import InputError


@pytest.fixture
def cut_tightly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prompts are cut with as little padding as possible, so that narrow calls are full."""
    monkeypatch.setattr(capacity, "CALL_ROWS", 0)
    capacity._tail.cache_clear()
    yield
    capacity._tail.cache_clear()


@pytest.mark.parametrize("widths", [(CHUNK,), pytest.param((CHUNK // 2, CHUNK), marks=pytest.mark.long)])
@pytest.mark.usefixtures("cut_tightly")
def test_a_warm_state_is_the_cold_one(widths: tuple[int, ...]) -> None:
    """All that a hit writes into a slot are the bits that computing the prompt gives."""
    with engine() as one:
        slots = Slots(shallow_model(), dataclasses.replace(one.shape, widths=widths))
    prefix = PrefixCache(ahead=1, maximum=10**9)
    states = []
    # Four calls: the last is full if it is a narrow one.
    full, rest = (3 * CHUNK, 7) if len(widths) == 1 else (3 * CHUNK + widths[0], 1)
    for slot, (length, reused) in enumerate([(full + rest, 0), (full + rest, full), (2 * CHUNK + 1, 2 * CHUNK)]):
        ids = text(0, length)
        wish = Wish.of(shallow_model(), CONTEXT - length, max_new_tokens=1)
        request = Request(shallow_model(), ids, wish, drafter="mtp", strict=False, wake=lambda: None)
        intake = Intake(slots, prefix, slot, request)
        turns = 1
        while not intake.turn():
            turns += 1
        assert (request.reused, turns) == (reused, turns if reused else 4)
        states.append([np.asarray(leaf)[slot : slot + 1] for leaf in jax.tree.leaves(slots.state)])
    for cold, warm in zip(*states[:2], strict=True):
        assert_bits_equal(warm, cold)


@pytest.mark.long
@pytest.mark.usefixtures("cut_tightly")
def test_prompts_in_calls_of_two_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """They reuse the full calls that they have in common, and have the bits that they have alone in a new engine."""

    def two(model: Loaded, shape: Shape, context: int, chunk: int | None) -> Shape:
        return dataclasses.replace(shape, widths=(CHUNK // 2, CHUNK))

    monkeypatch.setattr(shape_module, "with_widths", two)
    fields = {"max_new_tokens": 8, "ignore_eos": True}
    short, long = (text(0, length) for length in (CHUNK + CHUNK // 2 + 1, CHUNK + CHUNK // 2 + 14))
    with engine() as one:
        one.submit(short, **fields).result()
        again, longer = one.submit(short, **fields).result(), one.submit(long, **fields).result()
    assert (again.reused, longer.reused) == (CHUNK + CHUNK // 2, CHUNK)
    for ids, result in ((short, again), (long, longer)):
        with engine() as one:
            assert_same(result, one.submit(ids, **fields).result())


def keys(prefix: PrefixCache, ids: np.ndarray, width: int) -> list[str]:
    """The keys of a prompt's calls of one width."""
    return prefix.keys(ids, list(cut(len(ids) - 1, (width,))))


def test_keys_of_calls() -> None:
    prefix = PrefixCache(ahead=1, maximum=10**9)
    known = keys(prefix, text(0, 3 * CHUNK + 7), CHUNK)
    assert len(known) == 3
    assert keys(prefix, text(0, 2 * CHUNK + 1), CHUNK) == known[:2]
    other = text(0, 3 * CHUNK + 7)
    other[2 * CHUNK] += 1
    assert keys(prefix, other, CHUNK)[0] == known[0]
    assert not {*keys(prefix, other, CHUNK)[1:]} & {*known[1:]}, "a drafter reads the token after each row"
    assert not {*keys(prefix, text(0, 3 * CHUNK + 7), CHUNK // 2)} & {*known}, "calls of another width give other bits"


def prefix_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.prefix"))


def test_a_folder_keeps_beginnings_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if files are damaged in any way: such a file is put aside, and its chunk is computed."""
    monkeypatch.setattr(shallow_model(), "fingerprint", "weights", raising=False)
    fields = (("max_new_tokens", 8), ("ignore_eos", True))
    wanted = alone(None, 0, 3 * CHUNK + 7, fields)

    def said(reused: int) -> None:
        with engine(prefix_folder=tmp_path, prefix_bytes=0) as one:
            result = one.submit(text(0, 3 * CHUNK + 7), **dict(fields)).result()
        assert_same(result, wanted)
        assert result.reused == reused

    said(0)
    files = prefix_files(tmp_path)
    assert len(files) == 3
    said(3 * CHUNK)
    lengths = []
    for i, path in enumerate(files):
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] if i == 0 else whole[:-1] + bytes([whole[-1] ^ 1]) if i == 1 else b"")
        with engine(prefix_folder=tmp_path, prefix_bytes=0) as one:
            result = one.submit(text(0, 3 * CHUNK + 7), **dict(fields)).result()
        assert_same(result, wanted)
        lengths.append(result.reused)
        assert prefix_files(tmp_path) == files, "it was computed and written again"
        assert path.read_bytes() == whole
    assert sorted(lengths) == [0, CHUNK, 2 * CHUNK]
    assert len(list((tmp_path / "bad").iterdir())) == 3
    shutil.copy(files[0], files[1])
    said(lengths[1])


def test_a_state_is_copied_to_the_host_while_others_work() -> None:
    """Nobody waits for the copy but who needs the state, and then the device's arrays are let go."""
    rings = np.arange(1000, dtype=np.int32)
    state = ChunkState((), jax.device_put(rings))
    prefix = PrefixCache(ahead=0, maximum=10**9)
    prefix.put("one", state)
    assert isinstance(prefix._states["one"].rings, jax.Array), "the copy has not begun"
    prefix.go_on()
    while isinstance(prefix._states["one"].rings, jax.Array):
        time.sleep(0.001)
        prefix.go_on()
    assert_bits_equal(prefix._states["one"].rings, rings)
    prefix.put("two", state)
    found = prefix.get("two")
    assert found is not None
    assert isinstance(found.rings, np.ndarray), "it is waited for"
    prefix.close()


def test_the_least_recently_used_beginnings_go_first(tmp_path: Path) -> None:
    state = ChunkState((), np.zeros(1000, np.int32))
    prefix = PrefixCache(ahead=0, maximum=3 * state.nbytes)
    one, two = (keys(prefix, np.arange(first, first + 9), 4) for first in (0, 20))
    for key in (*one, *two):
        prefix.put(key, state)
    assert [prefix.get(key) is not None for key in (*one, *two)] == [False, True, True, True]
    assert prefix.nbytes == 3 * state.nbytes
    prefix.used(two)
    prefix.put("new", state)
    prefix.put("newer", state)
    assert [prefix.get(key) is not None for key in (*one, *two)] == [False, False, True, False], "the end before the beginning"
    assert not PrefixCache(ahead=0, maximum=0).wants("any")

    folder = PrefixFolder(tmp_path, identity="x", likes=[state], maximum=2 * state.nbytes + 2000)
    for key in ("a", "b", "c"):
        folder.put(key, state)
        while not folder.get(key):
            time.sleep(0.01)
    folder.close()
    assert len(prefix_files(tmp_path)) == 2
    (tmp_path / ".a.prefix.1-1-00000000.unfinished").touch()
    again = PrefixFolder(tmp_path, identity="x", likes=[state], maximum=10**6)
    assert [again.get(key) is not None for key in ("a", "b", "c")] == [False, True, True]
    assert prefix_files(tmp_path) == sorted(tmp_path.iterdir()), "what a killed process left is gone"
    other = PrefixFolder(tmp_path, identity="y", likes=[state], maximum=10**6)
    assert other.get("c") is None
    again.close()
    other.close()
    with pytest.raises(InputError, match="/dev/null: cannot be made"):
        PrefixFolder(Path("/dev/null"), identity="x", likes=[state], maximum=1)
