"""Memory plans against figures computed by hand for V4-Flash, and refusal before anything is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest
from gguf_files import SMALL, write_small
from q2_files import q2_checkpoint

import ds4jax
from ds4jax.bounds import WORKING_BYTES
from ds4jax.cache import state as caches
from ds4jax.config import Config
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.width import ROOM
from ds4jax.device import DeviceMemory, host_memory
from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.loading import plan as plans
from ds4jax.loading.checkpoint import Tensor

FLASH = Config(n_mtp=0)


def test_classes_of_the_published_layout() -> None:
    """Figures of the table "bytes per decoded token (q2 file)"."""
    made = plans.plan(q2_checkpoint(FLASH), 32768)
    parts = made.parts
    assert parts["dense"] == plans.Part(43 * 140_378_112, 43 * 140_378_112, 43 * 140_378_112)
    assert parts["routed experts"].file == 43 * 256 * 7_077_888
    # 70 bytes for 66 in two of three matrices, the same in the third.
    gate_or_up, down = 2048 * 4096 // 256 * 70, 2048 * 4096 // 256 * 84
    assert parts["routed experts"].device == 43 * 256 * (2 * gate_or_up + down)
    assert parts["routed experts"].token == 43 * 6 * (2 * gate_or_up + down)
    assert parts["head"].token == parts["head"].file == 129280 * 4096 // 32 * 34
    assert parts["embedding"] == plans.Part(129280 * 4096 * 2, 129280 * 4096 * 2, 4096 * 2)
    # The table's 1.132 + 0.002 GB, without the hash tables: a token reads one row of them.
    tables = 3 * 129280 * 6 * 4
    assert parts["small"].file - tables == pytest.approx(1.134e9, rel=2e-3)
    assert parts["small"].token == pytest.approx(1.134e9, rel=2e-3)
    assert parts["MTP"] == plans.Part()
    assert made.draft == 0
    assert made.file == sum(part.file for part in parts.values())
    assert made.device < 1.25 * made.file
    assert made.token - made.cache_token == sum(part.token for part in parts.values())


def test_the_mtp_block_is_read_by_drafts_alone() -> None:
    plain, with_mtp = (plans.plan(q2_checkpoint(dataclasses.replace(FLASH, n_mtp=count)), 4096) for count in (0, 1))
    assert with_mtp.token == plain.token
    assert with_mtp.parts["MTP"].file > 0
    assert with_mtp.parts["MTP"].token == 0
    assert with_mtp.parts["head"].token < with_mtp.draft < with_mtp.parts["head"].token + with_mtp.parts["MTP"].device
    # The block's own cache, and rings for two drafts.
    assert with_mtp.cache > plain.cache


@pytest.mark.parametrize("max_draft", [0, 2])
def test_cache_bytes_are_those_of_the_caches(max_draft: int) -> None:
    made = [caches.empty(SMALL, 1024, slack=ROOM)]
    made += [MTPDrafter().init(SMALL, 1024, ROOM, 1)] if max_draft else []
    assert plans.cache_bytes(SMALL, 1000, max_draft=max_draft) == sum(leaf.nbytes for leaf in jax.tree.leaves(made))


def test_cache_bytes_of_a_dspark_loop() -> None:
    """Rings have room for eight rows beyond the window, drafts or not."""
    config = dataclasses.replace(
        SMALL, n_mtp=0, compress_ratios=(0, 4, 128), n_dspark=2, dspark_layers=(0, 1, 2), dspark_noise_id=3
    )
    made = caches.empty(config, 1024, slack=8), *caches.empty_rings(config, 2, slack=8)
    assert plans.cache_bytes(config, 1000) == sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    alone = caches.empty(config, 1024, slack=8)
    assert plans.cache_bytes(config, 1000, max_draft=0) == sum(leaf.nbytes for leaf in jax.tree.leaves(alone))


def test_cache_bytes_of_slots_are_those_of_an_engine() -> None:
    for slots in (2, 4):
        made = caches.empty(SMALL, 1024, sequences=slots, slack=ROOM), MTPDrafter().init(SMALL, 1024, ROOM, slots)
        expected = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
        assert plans.cache_bytes(SMALL, 1000, max_draft=2, slots=slots) == expected
    checkpoint, memory = q2_checkpoint(FLASH), plans.DEVICES["h200"].memory
    made = plans.plan(checkpoint, 131072, slots=8)
    assert made.cache == pytest.approx(8 * plans.cache_bytes(FLASH, 131072), rel=0.01)
    assert made.needed == made.device + made.cache + WORKING_BYTES
    count = plans.most_slots(checkpoint, made.device, memory, 131072)
    assert 8 < count < 64
    fits = [plans.plan(checkpoint, 131072, slots=slots).needed <= memory for slots in (count, count + 1)]
    assert fits == [True, False]
    assert plans.most_slots(checkpoint, made.device, plans.DEVICES["h100"].memory, 131072) == 0
    assert plans.most_slots(checkpoint, made.device, memory, 512) == 64
    assert plans.largest_context(checkpoint, made.device, memory, slots=8) >= 131072


@pytest.mark.parametrize(("context", "gib"), [(32768, 0.43), (131072, 1.69), (1048576, 13.4)])
def test_cache_of_the_published_shape(context: int, gib: float) -> None:
    """float32 rows: 21 · (128 + 32) + 20 · 4 values a token and the windows."""
    assert plans.cache_bytes(FLASH, context) / 2**30 == pytest.approx(gib, rel=0.04)


def test_bytes_that_a_token_of_context_adds() -> None:
    """FP8 rows of 448 codes, 7 scales and 64 rotary channels, FP4 keys of 128 codes in 64 bytes and 4 scales."""
    values = 21 * (128 + 32) + 20 * 4
    assert values == 3440
    assert plans.cache_growth(FLASH) == (values, 4 * values)
    narrow = dataclasses.replace(FLASH, cache="narrow")
    row, key = 448 + 7 + 4 * 64, 64 + 4
    assert plans.cache_growth(narrow) == (values, 21 * (row + key) / 4 + 20 * row / 128)
    plan = plans.plan(q2_checkpoint(narrow), 1048576)
    assert plan.context_bytes < 0.31 * 4 * values
    assert plan.cache == pytest.approx(1048576 * plan.context_bytes, rel=0.02)
    keys, coarse, chosen, windows = (21 * 262144 * key, 20 * 8192 * row, 21 * 512 * row, 4 * 43 * 128 * 512)
    assert plan.cache_token == keys + coarse + chosen + windows


@pytest.mark.parametrize("context", [100, 32768, 1048576])
def test_cache_rows_of_a_token(context: int) -> None:
    keys, coarse = 21 * (context // 4) * 128, 20 * (context // 128) * 512
    chosen, windows = 21 * min(context // 4, 512) * 512, 43 * min(context, 128) * 512
    assert plans.cache_read(FLASH, context) == 4 * (keys + coarse + chosen + windows)


def test_bound_and_fit() -> None:
    checkpoint = q2_checkpoint(FLASH)
    made = plans.plan(checkpoint, 1)
    h100, h200 = plans.DEVICES["h100"], plans.DEVICES["h200"]
    # 9.56 GB as stored would be 502 tokens/s; on the device small tensors are float32.
    assert made.token == pytest.approx(9.627e9, rel=1e-3)
    assert made.bound(h200) == pytest.approx(4.8e12 / 9.627e9, rel=1e-3)
    assert made.bound(h100) == pytest.approx(made.bound(h200) * 3.35 / 4.8)
    assert made.bound(plans.Device("new", 1, None)) is None
    assert made.needed > h100.memory
    assert plans.largest_context(checkpoint, made.device, h100.memory) == 0
    assert plans.largest_context(checkpoint, made.device, h200.memory) == 1048576
    for context in (512, 32768):
        exactly = made.device + WORKING_BYTES + plans.cache_bytes(FLASH, context)
        assert plans.largest_context(checkpoint, made.device, exactly) == context
        assert plans.largest_context(checkpoint, made.device, exactly - 1) == (context // 2 if context > 512 else 0)


@pytest.mark.parametrize("context", [0, 1048577])
def test_a_context_that_the_model_does_not_have(context: int) -> None:
    with pytest.raises(InputError, match=rf"q2.gguf: context is {context}; it must be 1 to 1048576"):
        plans.plan(q2_checkpoint(FLASH), context)


def test_device_bytes_are_those_of_the_values(tmp_path: Path) -> None:
    write_small(tmp_path / "small.gguf", quantize=True)
    checkpoint = open_checkpoint(tmp_path / "small.gguf")
    assert sum(tensor.read().nbytes for tensor in checkpoint.tensors) == plans.plan(checkpoint).device


def test_too_little_memory_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.gguf"
    write_small(path, quantize=True)
    checkpoint = open_checkpoint(path)
    needed = sum(tensor.device_nbytes for tensor in checkpoint.tensors) + max(tensor.nbytes for tensor in checkpoint.tensors)
    monkeypatch.setattr(plans, "free_bytes", lambda: needed)
    assert ds4jax.load(path).config == checkpoint.config
    monkeypatch.setattr(plans, "free_bytes", lambda: None)
    plans.require_fit(checkpoint)
    monkeypatch.setattr("ds4jax.loading.gguf_read.reading", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(plans, "free_bytes", lambda: needed - 1)
    with pytest.raises(InputError) as error:
        ds4jax.load(path)
    told = f"{needed / 1e9:.2f} GB"
    assert str(error.value).startswith(
        f"{path}: memory: loading needs {told} on the {jax.default_backend()} device, {told} are free"
    )
    assert "\n" not in str(error.value)
    monkeypatch.setattr(plans, "free_bytes", lambda: -5)
    with pytest.raises(InputError, match="0.00 GB are free"):
        ds4jax.load(path)


def test_a_depth_out_of_range_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(tmp_path / "small.gguf")
    monkeypatch.setattr("ds4jax.loading.gguf_read.reading", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(InputError, match="max-draft is 5"):
        ds4jax.load(tmp_path / "small.gguf", max_draft=5)


def test_memory_of_the_host(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert host_memory(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal:       16384 kB\nMemAvailable:    8192 kB\n")
    free_host = DeviceMemory(16384 * 1024, 8192 * 1024, None)
    assert host_memory(meminfo, tmp_path) == free_host
    for name, text in (("memory.max", "5000000\n"), ("memory.current", "3000000\n"), ("memory.stat", "inactive_file 1000000\n")):
        (tmp_path / name).write_text(text)
    assert host_memory(meminfo, tmp_path) == DeviceMemory(5_000_000, 2_000_000, None)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(meminfo, tmp_path) == free_host


@pytest.mark.parametrize(
    ("platform", "stats", "free", "known"),
    [
        ("gpu", {"bytes_limit": 100, "bytes_in_use": 30}, 70, True),
        ("gpu", None, None, False),
    ],
)
def test_memory_of_a_device(
    platform: str, stats: dict[str, int] | None, free: int | None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Accelerator:
        device_kind = "NVIDIA H200"

        def memory_stats(self) -> dict[str, int] | None:
            return stats

    Accelerator.platform = platform
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [Accelerator()])
    assert plans.free_bytes() == free
    expected = plans.Device("NVIDIA H200", 100, plans.DEVICES["h200"].bandwidth) if known else None
    assert plans.present_device() == expected


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    path, seen = tmp_path / "small.gguf", []
    write_small(path)
    tensors: tuple[Tensor, ...] = open_checkpoint(path).tensors
    ds4jax.load(path, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors)
    assert len(seen) == len(tensors)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
