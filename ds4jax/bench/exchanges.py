"""Measures the exchanges of a decode step alone: chains of gathers in one program, at the sizes that a step exchanges."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ds4jax.bench.whole_model import Note, Row
from ds4jax.config import Config
from ds4jax.decode.module import MAIL_SPECS
from ds4jax.loading import mailboxes
from pallas_kernels.linear.cut import AXIS, Cut, gathered
from pallas_kernels.linear.mailbox_gather import Mail

# A chain is repeated so often in a program, and a program so often.
ROUNDS = 4
RUNS = 5
CUT = PartitionSpec(None, AXIS)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a step by kernels gathers after one kind of product.

    Attributes:
        after: the products.
        floats: float32 values of one row, those of all devices together.
        layers: whether it happens in every layer, or once a step.
    """

    after: str
    floats: int
    layers: bool


def of_step(config: Config, devices: int) -> tuple[Exchange, ...]:
    """The exchanges of a step, in its order, of a model of which everything is cut that can be; see `loading.cuts.gathers`."""
    return (
        # Each device gives a row to all; one of them is the right one.
        Exchange("embedding", devices * config.dim, False),
        Exchange("first output projection", config.o_groups * config.o_lora_rank, True),
        Exchange("second output projection", config.dim, True),
        # Gate and up of the shared expert, hidden values of the routed ones.
        Exchange("gate and up", (2 + config.n_active) * config.moe_dim, True),
        Exchange("down", 2 * config.dim, True),
        Exchange("logits", config.vocab_size, False),
    )


def measure(
    config: Config, devices: Sequence[jax.Device], rows: Sequence[int], links: int, way: str, note: Note
) -> Iterator[Row]:
    """Time a gather at each size of a step with so many rows, equal sizes once, the smallest first.

    Args:
        links: gathers of a chain, one after the other.
        way: a name in `ds4jax.bounds.WAYS`.

    Yields:
        A row for each size; `right` says whether the chain brought all values to their places.

    Raises:
        InputError: the devices cannot have mailboxes, or these failed in their trial.
    """
    mailboxes.require(way, devices)
    sizes: dict[int, str] = {}
    for count in rows:
        for exchange in of_step(config, len(devices)):
            if exchange.floats % len(devices) == 0:
                sizes.setdefault(count * exchange.floats, f"{exchange.after}, {count} row{'s' * (count > 1)}")
    by_mail = mailboxes.between(devices, max(sizes) // len(devices)) if way == "mailbox" else mailboxes.COLLECTIVE
    for floats, name in sorted(sizes.items()):
        row = {"name": name, **_measured(floats, devices, links, by_mail)}
        note(f"a gather of {row['whole_bytes']:,} bytes ({name}): {row['us_per_gather']:.2f} µs")
        yield row


def chain_of(mesh: Mesh | AbstractMesh, floats: int, links: int, words: int) -> Any:
    """A program of the chain: float32 [1, floats], cut over the mesh, and the arrays of mailboxes with places for `words` words.

    Args:
        words: 0 for collectives.
    """
    count = mesh.size
    size = floats // count

    def link(y: jax.Array, from_next: jax.Array, mail: Mail | None) -> jax.Array:
        whole = gathered(y, Cut(y, count, mail))
        # Without the barrier XLA would send the part alone.
        return jax.lax.dynamic_slice_in_dim(jax.lax.optimization_barrier(whole), from_next, size, 1)

    def chain(y: jax.Array, *arrays: jax.Array) -> jax.Array:
        mail = Mail(arrays[0], arrays[1], words) if arrays else None
        from_next = (jax.lax.axis_index(AXIS) + 1) % count * size

        def once(_: jax.Array, y: jax.Array) -> jax.Array:
            for _link in range(links):
                y = link(y, from_next, mail)
            return y

        made: jax.Array = jax.lax.fori_loop(0, ROUNDS, once, y)
        return made

    specs = (CUT, *(MAIL_SPECS if words else ()))
    return jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=specs, out_specs=CUT, check_vma=False))


def _measured(floats: int, devices: Sequence[jax.Device], links: int, way: mailboxes.Exchange) -> Row:
    """Time a chain, and compare its values."""
    mesh, count = Mesh(np.array(devices), (AXIS,)), len(devices)
    values = np.arange(floats, dtype=np.float32)[None]
    placed = jax.device_put(values, NamedSharding(mesh, CUT))
    arguments = placed, *way.arrays
    executable = chain_of(mesh, floats, links, way.words).lower(*arguments).compile()
    moved = jax.block_until_ready(executable(*arguments))
    # Each gather moves every part to the device before.
    right = bool(np.array_equal(np.asarray(moved), np.roll(values, -(ROUNDS * links % count) * (floats // count), axis=1)))
    samples = []
    for _ in range(RUNS):
        began = time.perf_counter()
        jax.block_until_ready(executable(*arguments))
        samples.append(1e6 * (time.perf_counter() - began) / (ROUNDS * links))
    return {
        "whole_bytes": floats * jnp.dtype(jnp.float32).itemsize,
        "us_per_gather": round(statistics.median(samples), 3),
        "samples_us_per_gather": [round(sample, 3) for sample in samples],
        "right": right,
    }
