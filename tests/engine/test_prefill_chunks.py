"""Prompts in calls of any size: what each call takes, what it may take, and that it says the same."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import END_TO_END, arrays, assert_bits_equal, assert_close, golden_model, short_model
from small_models import roomy_model

import ds4jax
from ds4jax.cache.capacity import KERNEL_PREFILL, PREFILL, chunks, cut, needed, widths
from ds4jax.config import Config
from ds4jax.device import DeviceMemory
from ds4jax.engine import prefill
from ds4jax.engine.options import Options
from ds4jax.engine.prefill import MAX_BYTES, call_bytes, chunk_for
from ds4jax.engine.shape import Shape
from ds4jax.errors import InputError

SIZES = (1, 7, 128, 512, 4096)


@given(st.integers(1, 20_000), st.integers(1, 5000))
def test_calls_take_every_row_once_and_pad_little(total, chunk):
    calls = list(chunks(total, total, chunk))
    counts = [count for _, _, count in calls]
    assert [start for start, _, _ in calls] == [0, *itertools.accumulate(counts)][:-1]
    assert sum(counts) == total
    for _, width, count in calls:
        assert 1 <= count <= min(chunk, width)
        assert width in widths(chunk)
        assert width <= max(chunk, PREFILL[0])
        assert width <= max(4 * count, PREFILL[0]) or width == min(widths(chunk))


@pytest.mark.parametrize(
    ("total", "chunk", "expected"),
    [
        (300, 512, [(512, 300)]),
        (600, 512, [(512, 512), (128, 88)]),
        (3000, 4096, [(4096, 3000)]),
        (600, 4096, [(512, 512), (128, 88)]),
        (1000, 4096, [(512, 512), (512, 488)]),
        (2000, 4096, [(4096, 2000)]),
        (20, 7, [(32, 7), (32, 7), (32, 6)]),
        (250, 100, [(100, 100), (100, 100), (100, 50)]),
    ],
)
def test_widths_of_calls(total, chunk, expected):
    assert [(width, count) for _, width, count in chunks(total, total, chunk)] == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (16, [(64, 16)]),
        (65, [(256, 65)]),
        (300, [(1024, 300)]),
        (2000, [(1024, 1024), (1024, 976)]),
        (3000, [(4096, 3000)]),
        (5000, [(4096, 4096), (1024, 904)]),
        (9000, [(4096, 4096), (4096, 4096), (1024, 808)]),
    ],
)
def test_calls_by_kernels(rows, expected):
    """A short prompt pays for no wide call, and a long one for few calls."""
    assert list(cut(rows, KERNEL_PREFILL)) == expected


@given(st.integers(1, 20_000), st.sampled_from([PREFILL, KERNEL_PREFILL]))
def test_no_prompt_needs_a_width_that_is_left_out(rows, allowed):
    assert {width for width, _ in cut(rows, allowed)} <= {*needed(allowed, rows)}


def test_widths_that_a_context_needs():
    assert needed(KERNEL_PREFILL, 4096) == KERNEL_PREFILL
    assert needed(KERNEL_PREFILL, 2048) == KERNEL_PREFILL[:3]
    assert needed(KERNEL_PREFILL, 100) == KERNEL_PREFILL[:2]
    assert needed(KERNEL_PREFILL, 1) == KERNEL_PREFILL[:1]


def test_the_plan_bounds_a_call_of_v4_flash():
    config = Config()
    assert chunk_for(config, 32768, None) == 1024
    assert chunk_for(config, 32768, None, kernels=False) == PREFILL[-1]
    assert chunk_for(config, 32768, 45_000_000_000) == 4096
    assert chunk_for(config, 2048, 45_000_000_000) == 1024
    assert chunk_for(config, 1 << 20, 45_000_000_000) == 4096
    assert chunk_for(config, 32768, 3_000_000_000) == 1024
    assert chunk_for(config, 32768, 0) == KERNEL_PREFILL[0]
    for rows in KERNEL_PREFILL:
        assert call_bytes(config, rows, 1 << 20, logits=True) > call_bytes(config, rows, 1 << 20)
    assert call_bytes(config, 4096, 1 << 20, logits=True) < MAX_BYTES


@functools.cache
def scored(chunk: int | None) -> np.ndarray:
    return short_model().logits(arrays("golden")["ids"], chunk=chunk, strict=True)["logits"]


@pytest.mark.long
@pytest.mark.parametrize("chunk", [pytest.param(n, marks=[] if n in (7, 128) else pytest.mark.slow) for n in SIZES])
def test_chunks_of_any_size_say_the_same(chunk):
    assert_close(scored(chunk), scored(None), END_TO_END / 3)
    assert_bits_equal(short_model().logits(arrays("golden")["ids"], chunk=chunk, strict=True)["logits"], scored(chunk))


@pytest.mark.slow
def test_chunks_of_any_size_say_the_golden_numbers():
    golden = arrays("golden")
    for chunk in SIZES:
        assert_close(golden_model().logits(golden["ids"], chunk=chunk, strict=True)["logits"], golden["prefill_logits"])


@pytest.mark.slow
def test_chunks_with_simulated_rounding():
    golden = arrays("golden")
    assert_close(golden_model(True).logits(golden["qat_ids"], chunk=7, strict=True)["logits"], golden["qat_logits"], 1e-3)


@pytest.mark.slow
def test_how_a_sequence_is_cut_matters_as_documented():
    model = ds4jax.load()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 128)
    whole, half, short, shorter = (model.logits(ids, chunk=chunk)["logits"] for chunk in (128, 64, 32, 16))
    assert np.abs(half - whole).max() < 1e-3
    # The rounding is no matter of last bits; if these were equal, the documentation would have to change.
    assert np.abs(short - whole).max() > 1e-2
    assert np.abs(shorter - short).max() > 1e-2
    strict = [model.logits(ids, chunk=chunk, strict=True)["logits"] for chunk in (128, 32)]
    assert np.abs(strict[0] - strict[1]).max() < 1e-3


def test_a_generation_in_chunks_tells_how_far_it_is():
    told: list[tuple[int, int]] = []
    prompt, options = arrays("golden")["greedy_prompt"], {"max_new_tokens": 4, "ignore_eos": True, "strict": True}
    whole = golden_model().generate(prompt, **options)
    result = golden_model().generate(prompt, chunk=9, progress=lambda *rows: told.append(rows), **options)
    assert result.ids == whole.ids
    missing = len(prompt) - 1
    assert told == [(min(done, missing), missing) for done in range(9, missing + 9, 9)]


def test_a_chunk_holds_at_least_a_token():
    with pytest.raises(InputError, match="chunk is 0; it must be at least 1"):
        Options(chunk=0)
    with pytest.raises(InputError, match="chunk is -1"):
        golden_model().logits([1, 2], chunk=-1)


def test_the_widths_of_a_gpu_do_not_depend_on_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a prompt would have other calls, and other bits, in an engine of more slots."""
    model = roomy_model()
    capacity = Shape.of(model, context=8192)[0].capacity
    room = model.nbytes + call_bytes(model.config, KERNEL_PREFILL[-1], capacity) + 1
    monkeypatch.setattr(prefill, "device_memory", lambda: DeviceMemory(room, 0, None))
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])
    found = {slots: Shape.of(model, slots=slots, context=8192)[0].widths for slots in (1, 8, 64)}
    assert found == dict.fromkeys(found, KERNEL_PREFILL)
