"""Mailboxes between two GPUs: the bits of collectives, of one GPU, and an end where a word is missing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numerics import assert_bits_equal

from ds4jax.language_model import from_checkpoint
from ds4jax.loading import mailboxes
from ds4jax.loading.mailboxes import allotted, require_trial, why_not
from ds4jax.random_models import checkpoint as random_models
from ds4jax.random_models import layouts
from pallas_kernels.linear.cut import AXIS, Cut, gathered, gathered_together
from pallas_kernels.linear.mailbox_gather import Mail, gather, lost

CARDS, STEPS, WORDS = 2, 50, 1 << 20
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.device_count() < CARDS, reason=f"needs {CARDS} GPUs; there are {jax.device_count()} devices"),
]
CUT = PartitionSpec(AXIS)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """Two GPUs with mailboxes of their own for each test, since some tests end them."""
    reason = why_not(jax.devices()[:CARDS])
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(mailboxes, "_allotted", {})
    return Mesh(np.array(jax.devices()[:CARDS]), (AXIS,))


def on_cards(mesh: Mesh, function: Any, *arrays: Any) -> Any:
    """A function of mailboxes and of each card's part of arrays, which are cut along their columns."""
    exchange = allotted(mesh, WORDS)

    def run(addresses: jax.Array, me: jax.Array, *own: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[None], function(Mail(addresses, me, exchange.words), *own))

    columns = PartitionSpec(None, AXIS)
    arrays = tuple(jax.device_put(array, NamedSharding(mesh, columns)) for array in arrays)
    specs = (PartitionSpec(), CUT, *[columns] * len(arrays))
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=CUT, check_vma=False))(*exchange.arrays, *arrays)
    return jax.tree.map(np.asarray, found)


def chain(mail: Mail | None, x: jax.Array, y: jax.Array) -> jax.Array:
    """Gathers of two sizes that follow each other, in a loop; x keeps its part of what was gathered last."""
    weight = Cut(x, CARDS, mail)

    def step(i: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = both
        whole = gathered(x, weight) * (1 + 0.01 * i.astype(jnp.float32))
        x = jnp.roll(whole, 1, axis=1)[:, : x.shape[1]]
        one, other = gathered_together([x, y + x[:1, :1]], weight)
        return jnp.roll(one, 3, axis=1)[:, : x.shape[1]], jnp.roll(other, 1, axis=1)[:, : y.shape[1]]

    last = gathered_together(jax.lax.fori_loop(0, STEPS, step, (x, y)), weight)
    return jnp.concatenate([whole.reshape(-1) for whole in last])


@pytest.mark.parametrize("rows", [1, 3, 8, 32])
@pytest.mark.parametrize("width", [4 * 77, 4096])
def test_a_chain_in_a_loop_has_the_bits_of_collectives(rows: int, width: int, mesh: Mesh) -> None:
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape, np.float32) for shape in ((rows, width), (3 * rows, width // 2))]
    expected = on_cards(mesh, lambda mail, x, y: chain(None, x, y), *arrays)
    found, missing = on_cards(mesh, lambda mail, x, y: (done := chain(mail, x, y), lost(mail, done)), *arrays)
    assert not missing.any(), f"{rows} rows of {width}: missing words {missing.tolist()}"
    assert_bits_equal(found, expected)


def test_addresses_are_those_of_the_memory(mesh: Mesh) -> None:
    exchange = allotted(mesh, WORDS)
    [boxes] = mailboxes._allotted[tuple(mesh.devices.flat)][1]
    for shard in boxes.addressable_shards:
        assert shard.data.unsafe_buffer_pointer() == _address(exchange.arrays[0], shard.device, mesh)


def _address(addresses: jax.Array, device: jax.Device, mesh: Mesh) -> int:
    low, high = np.asarray(addresses).view(np.uint32)[list(mesh.devices.flat).index(device)].tolist()
    return high << 32 | low


def test_a_card_that_does_not_send_ends_the_other(mesh: Mesh) -> None:
    """It waits, writes down what is missing and goes on, and its output is NaN; after that both miss words."""
    x = np.ones((1, 2 * 64), np.float32)

    def once(mail: Mail, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = jax.lax.cond(mail.me[0] == 0, lambda: gather([x], mail)[0], lambda: jnp.zeros((1, 128), jnp.float32))
        return whole, lost(mail, whole)

    whole, missing = on_cards(mesh, once, x)
    assert missing.tolist() == [[64, 2], [0, 0]]
    assert np.isnan(whole[0, :, 64:]).all()

    def again(mail: Mail, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        [whole] = gather([x], mail)
        return whole, lost(mail, whole)

    whole, missing = on_cards(mesh, again, x)
    assert (missing[:, 0] > 0).all()
    assert np.isnan(whole[0, :, 64:]).all()


def test_the_trial(mesh: Mesh) -> None:
    exchange = allotted(mesh, WORDS)
    require_trial(exchange, mesh)
    assert allotted(mesh, WORDS // 2) is exchange


@functools.cache
def small() -> Any:
    return random_models.checkpoint(layouts.SMALL_Q2, "small-q2")


@pytest.mark.parametrize("draft", [0, 2])
def test_a_model_has_the_bits_of_collectives_and_of_one_card(draft: int) -> None:
    ids = np.random.default_rng(1).integers(0, 640, 40)
    made = {}
    for devices, exchange in ((1, "auto"), (CARDS, "collective"), (CARDS, "mailbox")):
        model = from_checkpoint(small(), max_draft=2, devices=devices, exchange=exchange)
        result = model.generate(ids, max_new_tokens=64, draft=draft, ignore_eos=True)
        made[devices, exchange] = result.ids, result.fingerprints.tolist()
    assert made[CARDS, "mailbox"] == made[CARDS, "collective"]
    assert made[CARDS, "mailbox"] == made[1, "auto"]
