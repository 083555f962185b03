"""Which parameters are cut over devices, how their parts are read, and which devices a user can name."""

from __future__ import annotations

import types
from typing import Any

import jax
import numpy as np
import pytest
from gguf_files import GOLDEN
from numerics import assert_bits_equal

from ds4jax.bounds import SHIPPED
from ds4jax.cli import main as cli
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.loading.cuts import cut_names, undivided
from ds4jax.loading.placement import checked_groups, chosen
from ds4jax.loading.plan import share_bytes
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.formats import Quantized

HUB = GOLDEN.parent / "hub"


def test_what_is_cut() -> None:
    """Of V4-Flash every large matrix on 2, 4 and 8 devices; 16 do not divide the groups of the output projection."""
    flash = Config()
    for devices in (2, 4, 8):
        assert undivided(flash, devices) == ()
        assert {"embed.weight", "head.weight", "layers.3.attn.wo_b.weight", "mtp.0.ffn.experts.w2.weight"} <= cut_names(
            flash, devices
        )
    assert undivided(flash, 16) == ("attn.wq_b", "attn.wo_a")
    assert cut_names(flash, 1) == frozenset() == frozenset(undivided(flash, 1))
    small = {"layers.3.attn.wq_a.weight", "layers.3.ffn.gate.weight", "layers.4.attn.indexer.wq_b.weight"}
    assert not small & cut_names(flash, 2)
    # Nothing is refused: 2^n widths on three devices are whole on each.
    assert "ffn.experts.w1" in undivided(flash, 3)


def test_share() -> None:
    checkpoint = synthetic.checkpoint(Config(), "flash-q2")
    whole = share_bytes(checkpoint, 1)
    assert share_bytes(checkpoint, 2) < 0.51 * whole
    assert share_bytes(checkpoint, 8) < 0.14 * whole


@pytest.mark.parametrize("path", [SHIPPED, HUB], ids=["gguf", "hub"])
def test_rows_of_tensors(path: Any) -> None:
    """Rows that are read alone have the bits of these rows of the whole, in every form and number of axes."""
    seen = set()
    for tensor in open_checkpoint(path).tensors:
        kind = tensor.form, len(tensor.shape), tensor.name.startswith("mtp.")
        if len(tensor.shape) < 2 or kind in seen:
            continue
        seen.add(kind)
        whole, size = tensor.read(), tensor.shape[-2]
        for rows in (slice(0, size // 2), slice(size // 2, size)):
            found = tensor.start(rows).value()
            if isinstance(whole, Quantized):
                expected: Any = whole.change_rows(lambda plane, axis, rows=rows: plane[(*[slice(None)] * axis, rows)])
            else:
                expected = whole[..., rows, :]
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                assert_bits_equal(one, other)
    assert len(seen) >= 4


def test_devices() -> None:
    first = jax.devices()[0]
    assert chosen(None) == chosen(1) == chosen(np.int64(1)) == chosen([0]) == chosen([first]) == (first,)
    assert chosen("all") == tuple(jax.devices())


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "devices is 0; it must be at least 1"),
        (True, "devices is True, which is no integer"),
        (10**6, "devices is 1000000; there are"),
        ("two", "devices is 'two'; it must be"),
        ([10**6], "devices names device 1000000; there are devices 0 to"),
        ([0, 0], "devices names 2 devices, 1 of them different"),
        ([], "devices names 0 devices; name at least one"),
        (["a"], "devices names 'a'; it must list devices or their indices"),
    ],
)
def test_devices_that_cannot_be_used(devices: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        chosen(devices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "groups", "message"),
    [
        (1, 2, "groups is 2; it must divide the number of devices, 1"),
        (8, 3, "groups is 3; it must divide the number of devices, 8"),
        (2, 4, "groups is 4; it must divide the number of devices, 2"),
        (2, 0, "groups is 0; it must be at least 1"),
        (2, True, "groups is True, which is no integer"),
    ],
)
def test_groups_that_cannot_be_made(devices: int, groups: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        checked_groups(groups, jax.devices()[:1] * devices)
    assert "\n" not in str(caught.value)


def test_several_processes_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="groups is 2; several processes are one group, so leave it out"):
        checked_groups(2, jax.devices()[:1] * 2)


@pytest.mark.parametrize(
    ("word", "message"),
    [("1000000", "devices is 1000000; there are"), ("0", "0 is out of range"), ("two", "'two' is not an integer")],
)
def test_the_option(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["generate", "--devices", word, "x"])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert message in said.splitlines()[-1]


def test_unlike_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [types.SimpleNamespace(device_kind=kind, platform="gpu") for kind in ("H100", "H200")]
    monkeypatch.setattr(jax, "devices", lambda: two)
    for devices in (2, "all", [0, 1]):
        with pytest.raises(InputError, match="several kinds, H100 and H200; take equal ones"):
            chosen(devices)
    with pytest.raises(InputError, match="one device must be the first"):
        chosen([1])
