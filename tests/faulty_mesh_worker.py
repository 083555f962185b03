"""A process of `bench mesh` whose gathers change one value. Usage as for `ds4jax.bench.mesh_worker`."""

from __future__ import annotations

import sys
from typing import Any

import jax

from pallas_kernels.linear import cut

right = cut.gathered


def wrong(y: jax.Array, weight: Any) -> jax.Array:
    """What `gathered` returns, with its first column doubled if it is from several devices."""
    whole = right(y, weight)
    return whole.at[..., 0].multiply(2) if isinstance(weight, cut.Cut) else whole


# Before the model's modules take the name.
cut.gathered = wrong

from ds4jax.bench import mesh_worker  # noqa: E402

if __name__ == "__main__":
    mesh_worker.main(sys.argv[1])
