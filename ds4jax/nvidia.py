"""What the NVIDIA driver says of its cards."""

from __future__ import annotations

import dataclasses
import subprocess

# nvidia-smi answers within a few seconds, or hangs with the driver.
SECONDS = 20.0
QUERY = ("nvidia-smi", "--query-gpu=driver_version,memory.free,memory.total", "--format=csv,noheader,nounits")


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
