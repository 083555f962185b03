"""The cache of compiled programs, and the free memory of host and device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds4jax.bounds import WORKING_BYTES
from ds4jax.device import DeviceMemory
from ds4jax.doctor.row import Row, size_text
from ds4jax.nvidia import Card
from ds4jax.runtime import programs_folder, require_writable


def cache() -> Row:
    """A row for the folder of compiled programs: whether it can be written, and its size. Creates it if it is missing."""
    folder = programs_folder()
    if "://" in str(folder):
        return Row("cache", f"{folder}, of jax; not looked at")
    try:
        require_writable(Path(folder))
    except (OSError, RuntimeError) as error:
        todo = f"compiled programs cannot be kept ({error}): set DS4JAX_CACHE to a folder that can be written"
        return Row("cache", f"{folder}, cannot be written", todo, {"folder": str(folder), "writable": False})
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    text = f"{folder}, writable, {len(sizes)} files of {size_text(sum(sizes))}"
    return Row("cache", text, None, {"folder": str(folder), "writable": True, "files": len(sizes), "size": sum(sizes)})


def host(memory: DeviceMemory | None) -> Row:
    """A row for the host's memory, as by `ds4jax.device.host_memory`."""
    if memory is None:
        return Row("host", "free memory unknown")
    return _memory("host", memory.limit - memory.used, memory.limit, "end other programs, or raise the container's limit")


def device(cards: Sequence[Card]) -> list[Row]:
    """A row for each card's memory."""
    names = [f"GPU {i}" if len(cards) > 1 else "GPU" for i in range(len(cards))]
    remedy = "end the programs that nvidia-smi shows, or choose another card with CUDA_VISIBLE_DEVICES"
    return [
        Row(name, "free memory unknown")
        if card.free is None or card.total is None
        else _memory(name, card.free, card.total, remedy)
        for name, card in zip(names, cards, strict=True)
    ]


def _memory(name: str, free: int, total: int, remedy: str) -> Row:
    """A row for a memory. Without room for one program's temporary arrays no model runs."""
    text = f"{size_text(free)} of {size_text(total)} free"
    todo = f"only {size_text(free)} of memory are free, {size_text(WORKING_BYTES)} are needed: {remedy}"
    return Row(name, text, todo if free < WORKING_BYTES else None, {"free": free, "total": total})
