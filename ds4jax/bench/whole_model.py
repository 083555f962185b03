"""Setup and checks shared by the whole-model benchmarks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.bench import environment, profile
from ds4jax.config import Config
from ds4jax.decode.module import Graph, flat
from ds4jax.device import device_memory
from ds4jax.engine.prefill import nbytes
from ds4jax.loading import mailboxes
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.placement import Devices, abstract, chosen
from ds4jax.model.parameters import build
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models.layouts import LAYOUTS

Row = dict[str, Any]
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """A model with random weights on one or several devices.

    Attributes:
        layout: a name in `LAYOUTS`.
        graph, weights: the Flax module, split into its graph and a tuple of arrays.
        bandwidth: copy bandwidth in GB/s, measured before the model is in memory; None without a GPU.
        seconds: time of making the weights.
    """

    layout: str
    config: Config
    checkpoint: Checkpoint
    graph: Graph
    weights: tuple[jax.Array, ...]
    bandwidth: float | None
    seconds: float

    @classmethod
    def make(cls, layout: str, layers: int | None, note: Note, devices: Devices = None, exchange: str = "auto") -> WholeModel:
        """Make a model with all layers, or only the first `layers`.

        Args:
            devices, exchange: what the weights are cut over, and how outputs are gathered, as for `ds4jax.load`.

        Raises:
            InputError: there are not so many devices, the weights do not fit on them, or the exchange cannot be used.
        """
        present = chosen(devices)
        bandwidth = environment.copy_gbps() if jax.default_backend() == "gpu" else None
        config = synthetic.config_of(layout, layers)
        checkpoint = synthetic.checkpoint(config, layout)
        mailboxes.require(exchange, present, lambda: build(config, abstract(checkpoint, present)))
        began = time.perf_counter()
        model = synthetic.synthetic(checkpoint, present)
        way = mailboxes.chosen(exchange, present, model)
        graph, split = Graph.split(model, words=way.words)
        weights = jax.block_until_ready(flat(split, way.arrays))
        made = cls(layout, config, checkpoint, graph, weights, bandwidth, time.perf_counter() - began)
        note(f"{made.nbytes / 1e9:.1f} GB of weights made in {made.seconds:.1f} s")
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return nbytes(self.weights)

    def fields(self) -> Row:
        """The fields of a result file about device, versions and model."""
        layers = LAYOUTS[self.layout].config.n_layers
        return {
            **environment.describe(),
            "copy_gbps": round(self.bandwidth, 1) if self.bandwidth else None,
            "layout": self.layout,
            "layers": self.config.n_layers,
            "slice": self.config.n_layers < layers,
            "whole_layers": layers,
        }


def finite(cache: Any) -> bool:
    """Whether all float32 values of a cache are finite."""
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(cache) if leaf.dtype == jnp.float32)


def peak_bytes() -> int | None:
    """Peak device memory of this process in bytes; None if the device does not report it."""
    memory = device_memory()
    return memory.peak if memory else None


def longest(found: Sequence[tuple[str, float]], runs: int, count: int) -> list[Row]:
    """The `count` longest kernels of a trace: name, calls and microseconds per run, and share of the time."""
    keys = ("name", "calls", "us", "share")
    return [{key: row[key] for key in keys} for row in profile.rows(found, runs, None)[:count]]


def good(content: Row) -> bool:
    """Whether the run had no problems."""
    return not content["problems"]
