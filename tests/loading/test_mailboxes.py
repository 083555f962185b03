"""Who gets mailboxes, what is refused, and what a trial says; on virtual devices, no word is sent."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import executed_calls, lowered_for_cuda
from cuda import gpus as gpu_mesh
from jax.sharding import Mesh, NamedSharding
from small_models import shallow_model

from ds4jax import load
from ds4jax.bounds import EXCHANGES
from ds4jax.cli import main as cli
from ds4jax.config import Config
from ds4jax.decode.exchange import why_not_mailboxes
from ds4jax.decode.module import MAIL_SPECS
from ds4jax.errors import InputError
from ds4jax.loading import mailboxes
from ds4jax.loading.cuts import row_words
from ds4jax.loading.mailboxes import Exchange, allotted, chosen, require, require_trial
from ds4jax.model import paths
from ds4jax.model.parameters import build
from ds4jax.model.transformer import Transformer
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.linear import mailbox_gather
from pallas_kernels.linear.cut import AXIS
from pallas_kernels.linear.mailbox import size_of

H100, H200 = paths.PEERS
FLASH = dataclasses.replace(Config(), n_layers=2, n_hash_layers=1, compress_ratios=(0, 4), n_mtp=0)


def gpus(*kinds: str) -> list[Any]:
    return [types.SimpleNamespace(device_kind=kind, platform="gpu") for kind in kinds]


def flash(config: Config = FLASH, layout: str = "flash-q2") -> Transformer:
    return build(config, ((tensor.name, tensor.abstract) for tensor in synthetic.checkpoint(config, layout).tensors))


@pytest.mark.parametrize(
    ("kinds", "processes", "reason"),
    [
        ((H100, H100), 1, None),
        ((H200,) * 8, 1, None),
        ((H200,), 1, "there is one device"),
        ((H200, H200), 2, "there are several processes"),
        (("NVIDIA H100 PCIe",) * 2, 1, f"NVIDIA H100 PCIe is none of {H100}, {H200}"),
    ],
)
def test_devices_that_store_into_each_other(kinds: Sequence[str], processes: int, reason: str | None) -> None:
    assert paths.why_no_peers(kinds, processes) == reason


def test_models_whose_gathers_follow_each_other() -> None:
    assert why_not_mailboxes(flash()) is None
    assert why_not_mailboxes(shallow_model().float_model()) == "head_dim is 96, not a power of two"


@pytest.mark.parametrize(
    ("rows", "drafter", "strict", "reason"),
    [
        (1, "none", False, None),
        (STEP_ROWS, "mtp+ngram", False, None),
        (1, "mtp", True, "strict"),
        (STEP_ROWS + 1, "mtp", False, f"more than {STEP_ROWS} rows"),
        (STEP_ROWS, "dspark", False, None),
        (4, "mine.Own", False, "the gathers of mine.Own may not follow each other"),
    ],
)
def test_steps_that_use_them(rows: int, drafter: str, strict: bool, reason: str | None) -> None:
    assert paths.why_not_mail(rows, drafter, strict=strict) == reason


def test_the_environment_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS4JAX_NO_SHARE_WARP", "1")
    assert paths.why_not_mail(1, "none", strict=False) == "DS4JAX_NO_SHARE_WARP=1"


def test_what_each_word_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto is collectives everywhere, and the reason says why."""
    model, tried = flash(), []
    monkeypatch.setattr(mailboxes, "Mesh", lambda devices, axes: tuple(devices))
    monkeypatch.setattr(mailboxes, "allotted", lambda mesh, words: Exchange("mailbox", "asked for", words))
    monkeypatch.setattr(mailboxes, "require_trial", lambda exchange, mesh: tried.append((exchange.words, len(mesh))))
    found = {name: chosen(name, gpus(H200, H200), model) for name in EXCHANGES}
    assert {name: (one.name, one.words > 0) for name, one in found.items()} == {
        "auto": ("collective", False),
        "collective": ("collective", False),
        "mailbox": ("mailbox", True),
    }
    assert found["auto"].reason == paths.UNMEASURED
    assert tried == [(STEP_ROWS * FLASH.vocab_size // 2, 2)]
    assert chosen("auto", gpus(H200), model).reason == "there is one device"
    assert chosen("auto", gpus(H200, H200), shallow_model().float_model()).reason == "head_dim is 96, not a power of two"


def test_places_for_the_widest_gather() -> None:
    assert row_words(FLASH, 2) == FLASH.vocab_size // 2
    # Each device sends its guess of a whole row of the embedding.
    assert row_words(dataclasses.replace(FLASH, vocab_size=512, moe_dim=256), 8) == FLASH.dim


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": "mail"}, "exchange is 'mail'; it must be one of auto, collective, mailbox"),
        ({"exchange": "mailbox"}, "exchange is mailbox: there is one device; leave it out"),
    ],
)
def test_what_is_refused_before_weights_are_read(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds4jax.loading.placement.read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError) as caught:
        load(**options)
    assert str(caught.value) == message


def test_groups_have_none() -> None:
    devices = jax.devices()[:1] * 4
    with pytest.raises(InputError, match="exchange is mailbox: groups of devices exchange by collectives alone; leave it out"):
        require("mailbox", devices, lambda: pytest.fail("a model was made"), groups=2)


def test_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "x", "--exchange", "mailbox"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "ds4jax: error: exchange is mailbox: there is one device; leave it out"


@pytest.mark.parametrize(
    ("wrong", "missing", "message"),
    [
        ([0, 0], [[0, 0], [0, 0]], None),
        ([0, 0], [[0, 0], [7, 1]], "in its trial 7 words of device 0 did not reach device 1"),
        ([0, 3], [[0, 0], [0, 0]], "in its trial device 1 received wrong values"),
    ],
)
def test_a_trial_that_fails(
    wrong: list[int], missing: list[list[int]], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailboxes, "trial", lambda mesh, words: lambda: (jnp.array(wrong), jnp.array(missing)))
    if message is None:
        return require_trial(Exchange("mailbox", ""), None)  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        require_trial(Exchange("mailbox", ""), None)  # type: ignore[arg-type]
    assert str(caught.value) == f"exchange is mailbox: {message}; leave it out"


def test_a_device_that_refuses_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal address\nand a trace")

    monkeypatch.setattr(mailboxes, "trial", lambda mesh, words: failing)
    with pytest.raises(InputError, match=r"^exchange is mailbox: its trial failed \(INTERNAL: an illegal address\); "):
        require_trial(Exchange("mailbox", ""), None)  # type: ignore[arg-type]


def test_the_trial_lowers_for_cuda() -> None:
    mesh = gpu_mesh(**{AXIS: 2})
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(((2, 2), (2,)), MAIL_SPECS, strict=True)
    ]
    text = lowered_for_cuda(mailboxes.trial(mesh, 1 << 16), *shapes)
    assert executed_calls(text, mailbox_gather.NAME) == len(mailboxes.TRIALS)
    assert "all_gather" not in text


def test_memory_is_kept_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that need no more places have the same mailboxes. Larger ones leave the smaller where they are."""
    monkeypatch.setattr(mailboxes, "_allotted", {})
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    first = allotted(mesh, 10)
    assert allotted(mesh, 9) is first
    second = allotted(mesh, 11)
    assert (first.words, second.words) == (10, 11)
    assert second.alone is first.alone
    [(_, memory)] = mailboxes._allotted.values()
    for one, boxes in zip((first, second), memory, strict=True):
        assert boxes.size == 2 * size_of(1, one.words)
        assert not np.asarray(boxes).any()
        low, high = np.asarray(one.arrays[0])[0].view(np.uint32).tolist()
        assert high << 32 | low == boxes.addressable_shards[0].data.unsafe_buffer_pointer()
