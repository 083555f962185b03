"""A whole model of random weights for a benchmark: how it is made, what every result says of it, and what is asked of any run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.bench import environment, profile, synthetic
from ds4jax.config import Config
from ds4jax.generation import nbytes
from ds4jax.loading import Checkpoint

Row = dict[str, Any]
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A model on the default device.

    Attributes:
        layout: a name in `synthetic.LAYOUTS`.
        graph, weights: the Flax module split.
        bandwidth: of a copy in GB/s, measured before the model took the memory; None where the device is no GPU.
        seconds: that making the weights took.
    """

    layout: str
    config: Config
    checkpoint: Checkpoint
    graph: nnx.GraphDef
    weights: nnx.State
    bandwidth: float | None
    seconds: float

    @classmethod
    def make(cls, layout: str, layers: int | None, note: Note) -> Whole:
        """Make it, of the first layers alone where `layers` says so.

        Raises:
            InputError: the device has no room for the weights.
        """
        bandwidth = environment.copy_gbps() if jax.default_backend() == "gpu" else None
        config = synthetic.config_of(layout, layers)
        checkpoint = synthetic.checkpoint(config, layout)
        began = time.perf_counter()
        graph, weights = nnx.split(synthetic.synthetic(checkpoint))
        jax.block_until_ready(weights)
        made = cls(layout, config, checkpoint, graph, weights, bandwidth, time.perf_counter() - began)
        note(f"{made.nbytes / 1e9:.1f} GB of weights made in {made.seconds:.1f} s")
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return nbytes(self.weights)

    def fields(self) -> Row:
        """What a result file says of device, versions and model."""
        layers = synthetic.LAYOUTS[self.layout].n_layers
        return {
            **environment.describe(),
            "copy_gbps": round(self.bandwidth, 1) if self.bandwidth else None,
            "layout": self.layout,
            "layers": self.config.n_layers,
            "slice": self.config.n_layers < layers,
            "whole_layers": layers,
        }


def finite(cache: Any) -> bool:
    """Whether every float32 number of a cache is one."""
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(cache) if leaf.dtype == jnp.float32)


def peak_bytes() -> int | None:
    """The most device memory that the process has had so far, at any time; None where the device does not tell."""
    peak: int | None = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak


def longest(found: Sequence[tuple[str, float]], runs: int, most: int) -> list[Row]:
    """The kernels of a trace that took longest: name, calls, microseconds and share, a run each."""
    keys = ("name", "calls", "us", "share")
    return [{key: row[key] for key in keys} for row in profile.rows(found, runs, None)[:most]]


def good(content: Row) -> bool:
    """Whether everything was measured."""
    return not content["problems"]
