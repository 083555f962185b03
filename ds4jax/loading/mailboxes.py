"""Mailboxes of a model's devices: whether a model gets them, their memory, and a trial before the first use.

The protocol is in `pallas_kernels.linear.mailbox`. Its memory is an ordinary array on each device that no program has as an
argument: programs have its addresses. So it is never given to another program, and this process never frees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ds4jax.bounds import EXCHANGES
from ds4jax.config import Config
from ds4jax.decode.exchange import why_not_mailboxes
from ds4jax.errors import InputError
from ds4jax.loading.cuts import row_words
from ds4jax.model import paths
from ds4jax.model.transformer import Transformer
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.linear.cut import AXIS
from pallas_kernels.linear.mailbox import size_of
from pallas_kernels.linear.mailbox_gather import Mail, gather, lost

# Rows and widths of a device's part in the trial, and how often each is gathered: sizes that share places, an odd one among them.
TRIALS = ((1, 8), (3, 1001), (5, 2048), (1, 8))
TRIAL_STEPS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """How the devices of a loaded model exchange outputs in decode steps. Both ways only move bits.

    Attributes:
        name: "collective" or "mailbox".
        reason: why, in a few words.
        words: places of a device in its mailboxes; 0 without mailboxes.
        arrays: their addresses int32 [P, 2] and the devices' own numbers int32 [P]; empty without mailboxes.
        alone: to be held while a program with mailboxes is started, so that all devices run such programs in the same order.
    """

    name: str
    reason: str
    words: int = 0
    arrays: tuple[jax.Array, ...] = ()
    alone: AbstractContextManager[Any] = dataclasses.field(default_factory=contextlib.nullcontext)


COLLECTIVE = Exchange("collective", "asked for")


def require(name: str, devices: Sequence[jax.Device], model: Callable[[], Transformer] | None = None, groups: int = 1) -> None:
    """Refuse an exchange before weights are read.

    Args:
        model: makes the model without weights; called only where the answer depends on it. None asks about the devices alone.
        groups: number of groups of the devices.

    Raises:
        InputError: there is no such exchange, or this model cannot have mailboxes on these devices.
    """
    if name not in EXCHANGES:
        raise InputError(f"exchange is {name!r}; it must be one of {', '.join(EXCHANGES)}")
    if name != "mailbox":
        return
    if reason := why_not(devices, groups) or (why_not_mailboxes(model()) if model else None):
        raise InputError(f"exchange is mailbox: {reason}; leave it out")


def chosen(name: str, devices: Sequence[jax.Device], model: Transformer, groups: int = 1) -> Exchange:
    """The exchange that a user names, or the one that "auto" means; arguments as for `require`, which has let them pass.

    Raises:
        InputError: the trial of mailboxes failed.
    """
    if name == "collective":
        return COLLECTIVE
    if name == "auto":
        return Exchange("collective", why_not(devices, groups) or why_not_mailboxes(model) or paths.UNMEASURED)
    return between(devices, places(model.config, len(devices)))


def between(devices: Sequence[jax.Device], words: int) -> Exchange:
    """Mailboxes between devices that can have them, with places for `words` words of each; tried before they are used.

    Raises:
        InputError: the trial failed.
    """
    mesh = Mesh(np.array(devices), (AXIS,))
    exchange = allotted(mesh, words)
    require_trial(exchange, mesh)
    return exchange


def why_not(devices: Sequence[jax.Device], groups: int = 1) -> str | None:
    """Why these devices cannot have mailboxes, see `paths.why_no_peers`; None if they can."""
    if groups > 1:
        return "groups of devices exchange by collectives alone"
    return paths.why_no_peers([device.device_kind for device in devices], jax.process_count())


def places(config: Config, devices: int) -> int:
    """Places of a device in mailboxes: for the widest gather of a decode step with the most rows."""
    return STEP_ROWS * row_words(config, devices)


# Of each mesh: the exchange, and its memory.
_allotted: dict[tuple[jax.Device, ...], tuple[Exchange, list[jax.Array]]] = {}


def allotted(mesh: Mesh, words: int) -> Exchange:
    """Mailboxes with places for `words` words of each device; those of an earlier model on this mesh if they are large enough.

    Models share them, since the programs of all models run one after the other.
    """
    key = tuple(mesh.devices.flat)
    exchange, memory = _allotted.get(key, (COLLECTIVE, []))
    if exchange.words >= words:
        return exchange
    shape = (mesh.size, size_of(mesh.size, words) * 2)
    cut = NamedSharding(mesh, PartitionSpec(AXIS))
    boxes = jax.block_until_ready(jax.jit(lambda: jnp.zeros(shape, jnp.int32), out_shardings=cut)())
    at = {shard.device: shard.data.unsafe_buffer_pointer() for shard in boxes.addressable_shards}
    halves = np.array([[at[device] & 0xFFFFFFFF, at[device] >> 32] for device in key], np.uint32).view(np.int32)
    addresses = jax.device_put(halves, NamedSharding(mesh, PartitionSpec()))
    numbers = jax.device_put(np.arange(mesh.size, dtype=np.int32), cut)
    alone = threading.Lock() if exchange is COLLECTIVE else exchange.alone
    made = Exchange("mailbox", "asked for", words, (addresses, numbers), alone)
    # Programs of an earlier model may still use its smaller mailboxes.
    _allotted[key] = made, [*memory, boxes]
    return made


def require_trial(exchange: Exchange, mesh: Mesh) -> None:
    """Gather known values a few times.

    Raises:
        InputError: an output is wrong, a word is missing, or a device cannot store into another's memory.
    """
    try:
        with exchange.alone:
            wrong_P, missing_P2 = map(np.asarray, trial(mesh, exchange.words)(*exchange.arrays))
    except jax.errors.JaxRuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"exchange is mailbox: its trial failed ({first}); leave it out") from error
    if missing_P2[:, 0].any():
        reader = int(missing_P2[:, 0].argmax())
        count, sender = missing_P2[reader].tolist()
        raise InputError(
            f"exchange is mailbox: in its trial {count} words of device {sender - 1} did not reach device {reader}; leave it out"
        )
    if wrong_P.any():
        raise InputError(f"exchange is mailbox: in its trial device {int(wrong_P.argmax())} received wrong values; leave it out")


def trial(mesh: Mesh, words: int) -> Any:
    """A program of an exchange's arrays: each device's number of wrong outputs, int32 [P], and missing words, int32 [P, 2]."""

    def on_each(addresses: jax.Array, me: jax.Array) -> tuple[jax.Array, jax.Array]:
        mail = Mail(addresses, me, words)

        def one(step: jax.Array, wrong: jax.Array) -> jax.Array:
            for i, (rows, width) in enumerate(TRIALS):
                # The values depend on what the gather before found, so that the gathers follow each other.
                start = (len(TRIALS) * step + i + wrong).astype(jnp.float32)
                expected = _known(rows, width * mesh.size) + start
                own = jax.lax.dynamic_slice_in_dim(expected, me[0] * width, width, 1)
                [whole] = gather([own], mail)
                wrong += jnp.sum(whole != expected, dtype=jnp.int32)
            return wrong

        wrong = jax.lax.fori_loop(0, TRIAL_STEPS, one, jnp.int32(0))
        return wrong[None], lost(mail, wrong[None])[None]

    cut = PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=(PartitionSpec(), cut), out_specs=(cut, cut), check_vma=False))


def _known(rows: int, columns: int) -> jax.Array:
    """Another value at every place; whole numbers, so that adding a step is exact."""
    return jnp.arange(rows * columns, dtype=jnp.float32).reshape(rows, columns)
