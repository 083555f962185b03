"""What a model will take, from its headers alone: bytes in the file and on the device, bytes a token reads, and what fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax

from ds4jax import cache as caches
from ds4jax.buckets import LEAST_CAPACITY, capacity_for
from ds4jax.cache import OVERLAP_RATIO, Cache, LayerCache
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.language_model import DEFAULT_DRAFTS
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_names import DENSE, slots
from ds4jax.row_store import Stored

GB = 1e9
# Left free beside weights and cache for what a program computes with: the logits of a prefill of 512 rows are 0.3 GB, the rest is
# rows of activations, experts while they are decoded, and the program itself.
WORKING_BYTES = 2_000_000_000
# The context of a plan that nobody chose one for.
USUAL_CONTEXT = 32768
CLASSES = ("routed experts", "dense", "embedding", "head", "small", "MTP")


@dataclasses.dataclass(frozen=True)
class Device:
    """Memory in bytes and bandwidth in bytes/s of an accelerator; None for a bandwidth that is not known."""

    name: str
    memory: int
    bandwidth: float | None


# Source: NVIDIA's data sheets of H100 SXM and H200.
DEVICES = {
    "h100": Device("h100", 80_000_000_000, 3.35e12),
    "h200": Device("h200", 141_000_000_000, 4.8e12),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A class of tensors: bytes in the file, on the device, and of those what one decoded token reads."""

    file: int = 0
    device: int = 0
    token: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.file + other.file, self.device + other.device, self.token + other.token)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model takes with a context.

    Attributes:
        parts: every class of `CLASSES` with its bytes. A token reads nothing of the MTP block: a draft does.
        draft: bytes that one draft of the MTP block reads, the head included; 0 without the block.
        context: tokens that the cache is for.
        capacity: rows that it is made with.
        cache: its bytes.
        cache_token: bytes of it that the context's last token reads.
        context_values, context_bytes: values that a token of context adds to the cache, and bytes; windows do not grow.
    """

    parts: dict[str, Part]
    draft: int
    context: int
    capacity: int
    cache: int
    cache_token: int
    context_values: float
    context_bytes: float

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

    def bound(self, device: Device) -> float | None:
        """Tokens/s that the device's bandwidth allows without drafts, at the context's last token."""
        return device.bandwidth / self.token if device.bandwidth else None

    def line(self) -> str:
        """The plan in a line, for a person."""
        return (
            f"{self.file / GB:.1f} GB of weights, {self.device / GB:.1f} GB on the device; "
            f"{self.cache / GB:.2f} GB of cache for {self.context:,} tokens, "
            f"{self.context_bytes:,.0f} bytes each; {self.token / GB:.2f} GB read per decoded token"
        )


def plan(checkpoint: Checkpoint, context: int | None = None, *, max_draft: int | None = None) -> Plan:
    """Work out what a model takes with a context; nothing is read or allocated.

    Args:
        context: tokens, 1 to the model's own limit; None takes 32,768 or that limit.
        max_draft: as for `ds4jax.load`; the cache's rings are that much longer, and drafts have a cache of their own.

    Raises:
        InputError: a context that the model does not have.
    """
    config = checkpoint.config
    context = min(USUAL_CONTEXT, config.max_context) if context is None else context
    if not 1 <= context <= config.max_context:
        raise InputError(f"{checkpoint.path}: context is {context}; it must be 1 to {config.max_context}")
    dense = {slot.name for slot in slots(config) if slot.types is DENSE}
    parts = dict.fromkeys(CLASSES, Part())
    draft = 0
    for tensor in checkpoint.tensors:
        name, read = _class(tensor, dense), _token_bytes(tensor, config)
        if name == "MTP":
            draft += read
            read = 0
        parts[name] += Part(tensor.nbytes, tensor.device_nbytes, read)
    return Plan(
        parts=parts,
        draft=draft + parts["head"].token if draft else 0,
        context=context,
        capacity=capacity_for(context, config.max_context),
        cache=cache_bytes(config, context, max_draft=max_draft),
        cache_token=cache_read(config, context),
        context_values=cache_growth(config)[0],
        context_bytes=cache_growth(config)[1],
    )


def _class(tensor: Tensor, dense: set[str]) -> str:
    if tensor.name.startswith("mtp."):
        return "MTP"
    if ".ffn.experts." in tensor.name:
        return "routed experts"
    if tensor.name in ("embed.weight", "head.weight"):
        return "embedding" if tensor.name == "embed.weight" else "head"
    return "dense" if tensor.name in dense else "small"


def _token_bytes(tensor: Tensor, config: Config) -> int:
    """Bytes of a tensor on the device that one token reads: a row of a table, the chosen experts of a stack, else all."""
    if tensor.name == "embed.weight" or tensor.name.endswith("tid2eid"):
        return tensor.device_nbytes // config.vocab_size
    if ".ffn.experts." in tensor.name:
        return tensor.device_nbytes // config.n_experts * config.n_active
    return tensor.device_nbytes


def _cache(config: Config, capacity: int, max_draft: int | None) -> tuple[Cache, LayerCache | None]:
    """The decode loop's caches without their values."""
    depth = (DEFAULT_DRAFTS if config.n_mtp else 0) if max_draft is None else max_draft

    def made() -> tuple[Cache, LayerCache | None]:
        mtp = caches.empty_mtp(config, capacity, slack=1 + depth) if config.n_mtp and depth else None
        return caches.empty(config, capacity, slack=1 + depth), mtp

    return jax.eval_shape(made)


def _nbytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def cache_bytes(config: Config, context: int, *, max_draft: int | None = None) -> int:
    """Bytes of the caches that a context of so many tokens gets."""
    return _nbytes(jax.tree.leaves(_cache(config, capacity_for(context, config.max_context), max_draft)))


def cache_read(config: Config, context: int) -> int:
    """Bytes of cache rows that the context's last token has to look at: windows, indexer keys, and compressed rows.

    Where the indexer chooses, only as many compressed rows count as it takes. The pending inputs of compressors, a few rows that
    are read when a block closes, are left out.
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
    """Bytes of so many rows of [B, S, w], however they are kept."""
    return sum(count * array.shape[-1] * array.dtype.itemsize for array in jax.tree.leaves(rows))


def largest_context(checkpoint: Checkpoint, weights: int, memory: int, *, max_draft: int | None = None) -> int:
    """The most tokens whose cache fits beside `weights` bytes into `memory` bytes, 0 when not even the smallest cache does."""
    config, left = checkpoint.config, memory - weights - WORKING_BYTES
    best, capacity = 0, min(LEAST_CAPACITY, config.max_context)
    while cache_bytes(config, capacity, max_draft=max_draft) <= left:
        best = capacity
        if capacity == config.max_context:
            break
        capacity = min(2 * capacity, config.max_context)
    return best


def present_device() -> Device | None:
    """The default device with its memory, where it says how much it has; None on a CPU."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    if limit is None:
        return None
    kind = device.device_kind
    known = next((one for name, one in DEVICES.items() if name in kind.lower()), None)
    return Device(kind, limit, known.bandwidth if known else None)


def free_bytes() -> int | None:
    """Bytes that the default device has left, on a CPU those of the host; None where nobody says."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _host_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _host_bytes(meminfo: Path, group: Path) -> int | None:
    """Bytes of host memory that can be had without swapping, and within a container's limit.

    Source: Linux documentation, proc(5) and "Control Group v2".
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # Pages of files count as used and are given up when memory is asked for.
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):
        # No such limit ("max" is no number), or no control groups.
        return free


def require_fit(checkpoint: Checkpoint) -> None:
    """Refuse a model whose weights the default device has no room for.

    Raises:
        InputError: the numbers.
    """
    # While a tensor is split, stored bytes lie on the device beside its planes: all of a matrix, of a stack a few pieces.
    needed = sum(tensor.device_nbytes for tensor in checkpoint.tensors) + max(tensor.nbytes for tensor in checkpoint.tensors)
    free = free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{checkpoint.path}: memory: loading needs {needed / GB:.2f} GB on the {jax.default_backend()} device, "
            f"{max(free, 0) / GB:.2f} GB are free; take a device with more, or weights with fewer bits"
        )
