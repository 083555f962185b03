"""Memory of the default device and of the host, and what the host's processor can do."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a memory.

    Attributes:
        limit: maximum that this process may use.
        used: bytes in use now; on a host by all processes.
        peak: maximum use so far; None where it is not counted.
    """

    limit: int
    used: int
    peak: int | None


def device_memory() -> DeviceMemory | None:
    """Memory of the default device; None on a CPU, and where the device does not report it."""
    # Late: `ds4jax doctor` reads the host's memory where JAX does not start.
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return None
    return DeviceMemory(stats["bytes_limit"], stats.get("bytes_in_use", 0), stats.get("peak_bytes_in_use"))


def host_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> DeviceMemory | None:
    """Memory of the host, within a container's limit; None where the system does not report it.

    What is not `used` can be allocated without swapping.

    Source: Linux documentation, proc(5) and "Control Group v2".
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # Cached pages of files count as used, but the system frees them on demand.
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cached.get("inactive_file", 0)))
        total = min(total, limit)
    except (OSError, ValueError):
        # No limit ("max" is not a number), or no control groups.
        pass
    return DeviceMemory(total, total - free, None)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What decides the instructions that XLA compiles for a CPU: its model and features, where the system lists them.

    Source: Linux documentation, proc(5).
    """
    with contextlib.suppress(OSError):
        lines = dict.fromkeys(cpuinfo.read_text().splitlines())
        named = [line for line in lines if line.lower().startswith(("model", "stepping", "flags", "features", "cpu part"))]
        return "\n".join(named) or platform.machine()
    return platform.machine()
