"""The table of what is cut over the devices of a mesh: logical axes of outputs. Needs no JAX.

A matrix is cut along its outputs, never along its inputs, so that no sum crosses devices; see `pallas_kernels.linear.cut`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

from ds4jax.config import Config
from ds4jax.loading.gguf_names import DENSE, EMBEDDING, EXPERTS, Slot, slots

# The part of a name that says which block a parameter is in.
_BLOCK = re.compile(r"^(layers|mtp|dspark\.stages)\.\d+\.")

# Products whose outputs are gathered: one for each exchange of a layer, and the two ends.
_GATHERED = tuple(f"{name}.weight" for name in ("attn.wo_a", "attn.wo_b", "ffn.experts.w1", "ffn.experts.w2", "embed", "head"))


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


def _can_be_cut(slot: Slot) -> bool:
    return slot.kind in (DENSE, EXPERTS, EMBEDDING) and slot.axes[-2] in OUTPUTS


@functools.lru_cache(16)
def cut_names(config: Config, devices: int) -> frozenset[str]:
    """Names of the parameters that are cut over this many devices. One that does not divide is whole on each."""
    if devices == 1:
        return frozenset()
    found = filter(_can_be_cut, slots(config))
    return frozenset(slot.name for slot in found if OUTPUTS[slot.axes[-2]](config) % devices == 0)


def gathers(config: Config, devices: int) -> int:
    """Gathers of a decode step by kernels: of the embedding and the logits, and of each layer's outputs that are cut."""
    return sum(name.endswith(_GATHERED) and not name.startswith(("mtp", "dspark")) for name in cut_names(config, devices))


def row_words(config: Config, devices: int) -> int:
    """Maximum words of 32 bits that a device sends for a row of a decode step in one gather."""
    # A device sends its guess of a row's embedding. Of the other gathers each device has an equal part: the hidden values of the
    # experts and of the shared one, the outputs of both, those of the attention's low-rank projection, logits, and the input of
    # the MTP block.
    whole = (
        (2 + config.n_active) * config.moe_dim,
        2 * config.dim,
        config.o_groups * config.o_lora_rank,
        config.vocab_size,
        (1 + config.hc_mult) * config.dim,
    )
    return max(config.dim, -(-max(whole) // devices))


def undivided(config: Config, devices: int) -> tuple[str, ...]:
    """Kinds of parameters, such as `attn.wq_b`, that could be cut but do not divide among this many devices."""
    cut = cut_names(config, devices)
    names = (slot.name for slot in slots(config) if devices > 1 and _can_be_cut(slot) and slot.name not in cut)
    return tuple(dict.fromkeys(_BLOCK.sub("", name).removesuffix(".weight") for name in names))
