"""Beginnings of prompts that an engine keeps, in memory and on disk: what they give has the bits of computing it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from engines import CHUNK, CONTEXT, alone, assert_same, engine
from numerics import assert_bits_equal
from small_models import shallow_model, text

from ds4jax.engine.chunk_state import ChunkState
from ds4jax.engine.intake import Intake
from ds4jax.engine.prefix import PrefixCache
from ds4jax.engine.prefix_folder import PrefixFolder
from ds4jax.engine.request import Request
from ds4jax.engine.slots import Slots
from ds4jax.engine.wish import Wish
from ds4jax.errors import InputError


def test_a_warm_state_is_the_cold_one() -> None:
    """All that a hit writes into a slot are the bits that computing the prompt gives."""
    with engine() as one:
        slots = Slots(shallow_model(), one.shape)
    prefix = PrefixCache(chunk=CHUNK, ahead=1, maximum=10**9)
    states = []
    for slot, (length, reused) in enumerate([(3 * CHUNK + 7, 0), (3 * CHUNK + 7, 3 * CHUNK), (2 * CHUNK + 1, 2 * CHUNK)]):
        ids = text(0, length)
        wish = Wish.of(shallow_model(), CONTEXT - length, max_new_tokens=1)
        request = Request(shallow_model(), ids, wish, drafter="mtp", strict=False, wake=lambda: None)
        intake = Intake(slots, prefix, slot, request)
        turns = 1
        while not intake.turn():
            turns += 1
        assert (request.reused, turns) == (reused, 4 if not reused else turns)
        states.append([np.asarray(leaf)[slot : slot + 1] for leaf in jax.tree.leaves(slots.state)])
    for cold, warm in zip(*states[:2], strict=True):
        assert_bits_equal(warm, cold)
    keys = prefix.keys(text(0, 3 * CHUNK + 7))
    assert prefix.keys(text(0, 2 * CHUNK + 1)) == keys[:2]
    other = text(0, 3 * CHUNK + 7)
    other[2 * CHUNK] += 1
    assert prefix.keys(other)[0] == keys[0]
    assert not {*prefix.keys(other)[1:]} & {*keys[1:]}, "a drafter reads the token after each row"


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


def test_the_least_recently_used_beginnings_go_first(tmp_path: Path) -> None:
    state = ChunkState((), np.zeros(1000, np.int32))
    prefix = PrefixCache(chunk=4, ahead=0, maximum=3 * state.nbytes)
    one, two = prefix.keys(np.arange(9)), prefix.keys(np.arange(20, 29))
    for key in (*one, *two):
        prefix.put(key, state)
    assert [prefix.get(key) is not None for key in (*one, *two)] == [False, True, True, True]
    assert prefix.nbytes == 3 * state.nbytes
    prefix.used(two)
    prefix.put("new", state)
    prefix.put("newer", state)
    assert [prefix.get(key) is not None for key in (*one, *two)] == [False, False, True, False], "the end before the beginning"
    assert not PrefixCache(chunk=4, ahead=0, maximum=0).wants("any")

    folder = PrefixFolder(tmp_path, identity="x", like=state, maximum=2 * state.nbytes + 2000)
    for key in ("a", "b", "c"):
        folder.put(key, state)
        while not folder.get(key):
            time.sleep(0.01)
    folder.close()
    assert len(prefix_files(tmp_path)) == 2
    (tmp_path / ".a.prefix.1-1-00000000.unfinished").touch()
    again = PrefixFolder(tmp_path, identity="x", like=state, maximum=10**6)
    assert [again.get(key) is not None for key in ("a", "b", "c")] == [False, True, True]
    assert prefix_files(tmp_path) == sorted(tmp_path.iterdir()), "what a killed process left is gone"
    other = PrefixFolder(tmp_path, identity="y", like=state, maximum=10**6)
    assert other.get("c") is None
    again.close()
    other.close()
    with pytest.raises(InputError, match="/dev/null: cannot be made"):
        PrefixFolder(Path("/dev/null"), identity="x", like=state, maximum=1)
