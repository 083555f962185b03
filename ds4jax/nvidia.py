"""What the NVIDIA driver says of its cards, and which versions of NVIDIA's software this process has."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path

# nvidia-smi answers within a few seconds, or hangs with the driver.
SECONDS = 20.0
QUERY = ("nvidia-smi", "--query-gpu=driver_version,memory.free,memory.total", "--format=csv,noheader,nounits")
# Folders of installed packages: NVIDIA's libraries, and JAX's plugins with the compiler.
PACKAGES = ("nvidia_*.dist-info", "jax_cuda*.dist-info")


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        driver: the driver's version, such as 580.82.07.
        free, total: bytes of memory; None if the card does not report them.
    """

    driver: str
    free: int | None
    total: int | None


def cards() -> tuple[Card, ...]:
    """The GPUs of this machine, in the driver's order; none without a driver that answers."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return tuple(_card(line) for line in lines if line.strip())


def _card(line: str) -> Card:
    driver, free, total = (word.strip() for word in line.split(","))
    # The driver's unit is MiB. Some cards share the host's memory and say "[N/A]".
    mebibytes = [int(word) << 20 if word.isdigit() else None for word in (free, total)]
    return Card(driver, *mebibytes)


def installed(kernel: Path = Path("/proc/driver/nvidia/version")) -> list[str | int]:
    """The driver and the packages of NVIDIA's libraries, with their versions. Takes milliseconds, unlike `cards`.

    The driver's two parts, the system's and the process's, may come from different places.

    Source: CUDA driver API, cuDriverGetVersion.
    """
    system, version = "", ctypes.c_int(0)
    with contextlib.suppress(OSError):
        system = kernel.read_text(errors="replace")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    found = {path.name for entry in sys.path for pattern in PACKAGES for path in Path(entry or ".").glob(pattern)}
    return [system, version.value, *sorted(found)]
