"""The table of what is cut over the devices of a mesh: logical axes of outputs. Needs no JAX.

A matrix is cut along its outputs, never along its inputs, so that no sum crosses devices; see `pallas_kernels.linear.cut`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from ds4jax.config import Config
from ds4jax.loading.gguf_names import DENSE, EMBEDDING, EXPERTS, Slot, slots


def _by_heads(config: Config) -> int:
    # A device's heads are whole groups of the output projection.
    return math.gcd(config.n_heads, config.o_groups)


# Logical axes of outputs, see `gguf_names`, that are cut over the mesh, and into how many equal parts each can be cut at the
# most. Other axes are whole: low-rank queries, rows of the cache, compressors and the indexer, which every device needs at once
# and which are small.
OUTPUTS: dict[str, Callable[[Config], int]] = {
    "V": lambda config: config.vocab_size,
    "D": lambda config: config.dim,
    "F": lambda config: config.moe_dim,
    "HQ": _by_heads,
    "O": _by_heads,
}


def is_cut(config: Config, slot: Slot, devices: int) -> bool:
    """Whether a parameter is cut over this many devices. One that does not divide is whole on each."""
    if devices == 1 or slot.kind not in (DENSE, EXPERTS, EMBEDDING) or slot.axes[-2] not in OUTPUTS:
        return False
    return OUTPUTS[slot.axes[-2]](config) % devices == 0


@functools.lru_cache(16)
def cut_names(config: Config, devices: int) -> frozenset[str]:
    """Names of the parameters that are cut over this many devices."""
    return frozenset(slot.name for slot in slots(config) if is_cut(config, slot, devices))
