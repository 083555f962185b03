"""Memory plan of a model from its headers: bytes in the file and on the device, bytes read per token, largest context."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax

from ds4jax.bounds import DEVICES, SLOTS, WORKING_BYTES, Device, drafts_of, own_drafter
from ds4jax.cache import state as caches
from ds4jax.cache.capacity import MIN_CAPACITY, capacity_for
from ds4jax.cache.state import OVERLAP_RATIO, Cache
from ds4jax.cache.stored_rows import Stored
from ds4jax.config import Config
from ds4jax.decode.drafters.named import named
from ds4jax.decode.width import ROOM
from ds4jax.device import device_memory, host_memory
from ds4jax.errors import InputError
from ds4jax.loading import gguf_names
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.cuts import cut_names, gathers
from ds4jax.loading.gguf_names import DENSE

GB = 1e9
# A gather of 16 KB to 2 MB by XLA (NCCL) in a decode loop of two H200s of one host, NVLink multicast off: 17 to 20 us, measured
# once. More cards, and cards of several hosts, were not measured; they take longer.
GATHER_SECONDS = 18.5e-6
# The default context.
USUAL_CONTEXT = 32768
CLASSES = ("routed experts", "dense", "embedding", "head", "small", "MTP", "DSpark")


@dataclasses.dataclass(frozen=True)
class Part:
    """A class of tensors: bytes in the file, bytes on the device, and bytes that one decoded token reads."""

    file: int = 0
    device: int = 0
    token: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.file + other.file, self.device + other.device, self.token + other.token)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory that a model takes with a context.

    Attributes:
        parts: the bytes of each of `CLASSES`. Drafts read the MTP block or the DSpark drafter, tokens do not.
        draft: bytes that one draft of the MTP block, or all drafts of a DSpark block read, including the head; 0 without both.
        context: tokens.
        slots: S, the number of sequences at once.
        capacity: rows of each sequence's cache for this context.
        cache: bytes of the cache of all sequences.
        cache_token: bytes of the cache that the context's last token reads.
        context_values, context_bytes: values and bytes that a token of context adds to the cache. Windows do not grow.
        cut: by number of cards, the bytes of all tensors that are cut over them.
        gathers: by number of cards, how often they exchange outputs in a decode step.
    """

    parts: dict[str, Part]
    draft: int
    context: int
    slots: int
    capacity: int
    cache: int
    cache_token: int
    context_values: float
    context_bytes: float
    cut: dict[int, Part]
    gathers: dict[int, int]

    @property
    def file(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(part.file for part in self.parts.values())

    @property
    def device(self) -> int:
        """Bytes of all tensors on the device."""
        return sum(part.device for part in self.parts.values())

    @property
    def token(self) -> int:
        """Bytes that the context's last token reads, cache included."""
        return sum(part.token for part in self.parts.values()) + self.cache_token

    @property
    def needed(self) -> int:
        """Bytes of device memory for decoding."""
        return self.device + self.cache + WORKING_BYTES

    def weights_on(self, device: Device) -> int:
        """Bytes of weights on each of the device's cards: its part of what is cut, see `loading.cuts`, and all of the rest.

        Cache and temporary arrays are whole on each card, since all heads share one row of keys.
        """
        cut = self.cut[device.cards].device
        return self.device - cut + -(-cut // device.cards)

    def needed_on(self, device: Device) -> int:
        """Bytes of memory for decoding on each of the device's cards, as by `weights_on`."""
        return self.weights_on(device) + self.cache + WORKING_BYTES

    def bound(self, device: Device) -> float | None:
        """Maximum tokens/s by the device's bandwidth, without drafts, at the context's last token; None if it is unknown.

        Several cards read their parts at once, and then wait for each other at every exchange.
        """
        if not device.bandwidth:
            return None
        cut = self.cut[device.cards].token
        return 1 / ((self.token - cut + cut / device.cards) / device.bandwidth + self.exchange_seconds(device))

    def exchange_seconds(self, device: Device) -> float:
        """Seconds of the exchanges of a decode step."""
        return self.gathers[device.cards] * GATHER_SECONDS

    def line(self) -> str:
        """The plan as one line of text."""
        return (
            f"{self.file / GB:.1f} GB of weights, {self.device / GB:.1f} GB on the device; "
            f"{self.cache / GB:.2f} GB of cache for {self.context:,} tokens, "
            f"{self.context_bytes:,.0f} bytes each; {self.token / GB:.2f} GB read per decoded token"
        )


def plan(checkpoint: Checkpoint, context: int | None = None, *, max_draft: int | None = None, slots: int = 1) -> Plan:
    """Plan the memory of a model with a context; nothing is read or allocated.

    Args:
        context: tokens, 1 to the model's maximum; None is the smaller of 32,768 and that maximum.
        slots: S, the number of sequences at once, each with this context.
        max_draft: as for `ds4jax.load`. The cache's rings grow by it, and drafts have their own cache.

    Raises:
        InputError: a context beyond the model's maximum, or below 1.
    """
    config = checkpoint.config
    context = min(USUAL_CONTEXT, config.max_context) if context is None else context
    if not 1 <= context <= config.max_context:
        raise InputError(f"{checkpoint.path}: context is {context}; it must be 1 to {config.max_context}")
    dense = {slot.name for slot in gguf_names.slots(config) if slot.kind is DENSE}
    parts = dict.fromkeys(CLASSES, Part())
    cut = dict.fromkeys(sorted({device.cards for device in DEVICES.values()}), Part())
    draft = 0
    for tensor in checkpoint.tensors:
        name, read = _class(tensor, dense), token_bytes(tensor, config)
        if name in ("MTP", "DSpark"):
            draft += read if name == "MTP" else dspark_bytes(tensor, config)
            read = 0
        parts[name] += Part(tensor.nbytes, tensor.device_nbytes, read)
        for cards in cut:
            if tensor.name in cut_names(config, cards):
                cut[cards] += Part(tensor.nbytes, tensor.device_nbytes, read)
    return Plan(
        parts=parts,
        draft=draft + parts["head"].token if draft else 0,
        context=context,
        slots=slots,
        capacity=capacity_for(context, config.max_context),
        cache=cache_bytes(config, context, max_draft=max_draft, slots=slots),
        cache_token=cache_read(config, context),
        context_values=cache_growth(config)[0],
        context_bytes=cache_growth(config)[1],
        cut=cut,
        gathers={cards: gathers(config, cards) for cards in cut},
    )


def _class(tensor: Tensor, dense: set[str]) -> str:
    if tensor.name.startswith(("mtp.", "dspark.")):
        return "MTP" if tensor.name.startswith("mtp.") else "DSpark"
    if ".ffn.experts." in tensor.name:
        return "routed experts"
    if tensor.name in ("embed.weight", "head.weight"):
        return "embedding" if tensor.name == "embed.weight" else "head"
    return "dense" if tensor.name in dense else "small"


def token_bytes(tensor: Tensor, config: Config) -> int:
    """Bytes that one token reads of a tensor on the device: a row of a table, the chosen experts of a stack, else all."""
    if tensor.name == "embed.weight" or tensor.name.endswith("tid2eid"):
        return tensor.device_nbytes // config.vocab_size
    if ".ffn.experts." in tensor.name:
        return tensor.device_nbytes // config.n_experts * config.n_active
    return tensor.device_nbytes


def dspark_bytes(tensor: Tensor, config: Config) -> int:
    """Bytes that a block of DSpark drafts reads of one of the drafter's tensors on the device.

    Each row of the block chooses its own experts; the count of distinct ones is the mean for independent uniform choices. The
    second Markov table is read once a draft, of the first a row a draft.
    """
    rows = config.dspark_block
    if ".ffn.experts." in tensor.name:
        return round(tensor.device_nbytes * (1 - (1 - config.n_active / config.n_experts) ** rows))
    if tensor.name == "dspark.markov_w1.weight":
        return rows * (tensor.device_nbytes // config.vocab_size)
    return tensor.device_nbytes * (rows if tensor.name == "dspark.markov_w2.weight" else 1)


def _cache(config: Config, capacity: int, max_draft: int | None, slots: int = 1) -> tuple[Cache, Any]:
    """Shapes of the decode loop's caches, and of the state of the weights' own drafter; None without drafts."""
    name = own_drafter(config)
    depth = drafts_of(name, config)[0] if max_draft is None else max_draft
    drafter = named(name) if depth else None

    def made() -> tuple[Cache, Any]:
        drafting = drafter.init(config, capacity, ROOM, slots) if drafter else None
        return caches.empty(config, capacity, sequences=slots, slack=ROOM), drafting

    return jax.eval_shape(made)


def _nbytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@functools.lru_cache(256)
def cache_bytes(config: Config, context: int, *, max_draft: int | None = None, slots: int = 1) -> int:
    """Bytes of the caches of `slots` sequences with a context of `context` tokens each."""
    return _nbytes(jax.tree.leaves(_cache(config, capacity_for(context, config.max_context), max_draft, slots)))


def cache_read(config: Config, context: int) -> int:
    """Bytes of cache rows that the context's last token reads: windows, indexer keys and compressed rows.

    With an indexer, only the chosen compressed rows count. The compressors' pending inputs, a few rows that are read when a block
    closes, do not count.
    """
    cache, _ = _cache(config, capacity_for(context, config.max_context), 0)
    total = 0
    for layer, ratio in zip(cache.layers, config.layer_ratios, strict=True):
        total += _rows(layer.window, min(context, config.window))
        if layer.compressor is not None:
            finished = context // ratio
            chosen = min(finished, config.index_topk) if ratio == OVERLAP_RATIO else finished
            total += _rows(layer.compressor.rows, chosen)
            total += _rows(layer.indexer.rows, finished) if layer.indexer is not None else 0
    return total


def cache_growth(config: Config) -> tuple[float, float]:
    """Values and bytes that a token of context adds to the layers' caches, on average over a block.

    A block of the layer's ratio adds a row of Q values, and a key where there is an indexer: 3,440 values a token for V4-Flash.
    """
    cache, _ = _cache(config, 1, 0)
    values = nbytes = 0.0
    for layer, ratio in zip(cache.layers, config.layer_ratios, strict=True):
        for part in (layer.compressor, layer.indexer):
            if part is not None:
                values += part.rows.shape[-1] / ratio
                nbytes += _rows(part.rows, 1) / ratio
    return values, nbytes


def _rows(rows: Stored | jax.ShapeDtypeStruct, count: int) -> int:
    """Bytes of `count` rows of [B, S, w], float32 or narrow."""
    return sum(count * array.shape[-1] * array.dtype.itemsize for array in jax.tree.leaves(rows))


def most_slots(checkpoint: Checkpoint, weights: int, memory: int, context: int) -> int:
    """Maximum number of sequences with `context` tokens each whose caches and `weights` bytes fit in `memory` bytes; up to 64."""
    left = memory - weights - WORKING_BYTES
    counts = range(1, 1 + (SLOTS.largest or 1))
    return bisect.bisect_right(counts, left, key=lambda slots: cache_bytes(checkpoint.config, context, slots=slots))


def largest_context(checkpoint: Checkpoint, weights: int, memory: int, *, max_draft: int | None = None, slots: int = 1) -> int:
    """Maximum tokens for which caches and `weights` bytes fit in `memory` bytes; 0 if the smallest cache does not fit."""
    config, left = checkpoint.config, memory - weights - WORKING_BYTES
    best, capacity = 0, min(MIN_CAPACITY, config.max_context)
    while cache_bytes(config, capacity, max_draft=max_draft, slots=slots) <= left:
        best = capacity
        if capacity == config.max_context:
            break
        capacity = min(2 * capacity, config.max_context)
    return best


def present_device() -> Device | None:
    """The default device with its memory; None on a CPU, and where the memory is unknown."""
    memory = device_memory()
    if memory is None:
        return None
    kind = jax.devices()[0].device_kind
    known = next((one for name, one in DEVICES.items() if name in kind.lower()), None)
    return Device(kind, memory.limit, known.bandwidth if known else None)


def free_bytes() -> int | None:
    """Free bytes of the default device, on a CPU of the host; None where they are unknown."""
    memory = host_memory() if jax.devices()[0].platform == "cpu" else device_memory()
    return memory.limit - memory.used if memory else None


def share_bytes(checkpoint: Checkpoint, devices: int) -> int:
    """Bytes of weights on each of several devices, of a group: its part of what is cut over them, and all of what is not."""
    cut = cut_names(checkpoint.config, devices)
    return sum(tensor.device_nbytes // (devices if tensor.name in cut else 1) for tensor in checkpoint.tensors)


def require_fit(checkpoint: Checkpoint, devices: int = 1, groups: int = 1) -> None:
    """Refuse a model with more bytes of weights than the default device has free, or of which a device's share does not fit.

    Each group of devices has all weights.

    Raises:
        InputError: the message gives both numbers.
    """
    # While a tensor is split, the device also holds its stored bytes: all of a matrix, a few pieces of a stack.
    needed = share_bytes(checkpoint, devices // groups) + max(tensor.nbytes for tensor in checkpoint.tensors)
    # Devices of a CPU share its memory, those of this process.
    needed *= min(devices, jax.local_device_count()) if jax.default_backend() == "cpu" else 1
    free = free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{checkpoint.path}: memory: loading needs {needed / GB:.2f} GB on the {jax.default_backend()} device, "
            f"{max(free, 0) / GB:.2f} GB are free; take a device with more, or weights with fewer bits"
        )
