"""What the benchmark of several devices measures, and in which order; importing it starts no device."""

from __future__ import annotations

import dataclasses

from ds4jax.bounds import MESH_PIECES, SLOTS, WAYS
from ds4jax.errors import InputError
from ds4jax.random_models import checkpoint as synthetic

# Pieces that need no model, and that a run of several processes stands for.
GATHERS, PROCESSES = "gathers", "processes"
MOST_SLOTS = SLOTS.largest or 1
# Processes of that run.
COUNT = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layouts: names in `LAYOUT_NAMES`; the most important first.
        layers: number of first layers; None for all.
        devices: the largest number of devices; None for all that there are.
        exchanges: names in `WAYS`. Each is measured in every model and in chains of its own. Without any, those of `WAYS` that
            the devices can have.
        pieces: names in `MESH_PIECES`.
        context, long_context: rows in the caches before the first step; the second for the piece "long".
        slots: numbers of sequences of the piece "slots".
        prompt: tokens of one call of a prompt.
        steps: tokens of each sequence in a run.
        acceptance: assumed acceptance of an MTP block's drafts, for tokens/s that are labelled simulated.
        per_step: assumed tokens of a step with DSpark's drafts, likewise; 0 for none.
        links: gathers of a chain.
        limit_seconds: time of a process; 0 for no limit. One that takes longer is ended, and its next pieces are missing.
        all_seconds: time of everything, likewise.

    Raises:
        InputError: the options cannot be measured; the message names the option.
    """

    layouts: tuple[str, ...] = ("mxfp4-layout", "flash-q2")
    layers: int | None = None
    devices: int | None = None
    exchanges: tuple[str, ...] = WAYS[:1]
    pieces: tuple[str, ...] = MESH_PIECES
    context: int = 2048
    long_context: int = 131_072
    slots: tuple[int, ...] = (8, 32)
    prompt: int = 4096
    steps: int = 64
    acceptance: tuple[float, ...] = ()
    per_step: float = 0
    links: int = 86
    limit_seconds: int = 0
    all_seconds: int = 0

    def __post_init__(self) -> None:
        needed = {"context": ("plain", "drafts", "slots", PROCESSES), "long": ("long",), "prompt": ("prefill",)}
        rows = {"context": self.context, "long": self.long_context, "prompt": self.prompt}
        for layout in self.layouts:
            end = synthetic.config_of(layout, self.layers).max_context
            for name, count in rows.items():
                if count + self.steps > end and set(needed[name]) & set(self.pieces):
                    raise InputError(
                        f"{name} is {count} and steps {self.steps}; {layout} ends at {end}, so give a smaller {name}"
                    )
        if max(self.slots) > MOST_SLOTS:
            raise InputError(f"slots is {max(self.slots)}; a step has at most {MOST_SLOTS}")


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process measures, or several that work together.

    Attributes:
        layout: the model; None for chains of gathers.
        devices: number of devices, those of all processes together.
        exchange: how they exchange outputs; "none" on one device.
        pieces: names in `MESH_PIECES`, in order.
        processes: their number.
    """

    layout: str | None
    devices: int
    exchange: str
    pieces: tuple[str, ...]
    processes: int = 1

    @property
    def name(self) -> str:
        """For notes and problems."""
        count = f"{self.devices} device{'s' * (self.devices > 1)}"
        parts = [self.layout or "gathers", count]
        parts += [self.exchange] if self.devices > 1 else []
        return ", ".join([*parts, *([f"{self.processes} processes"] if self.processes > 1 else [])])


def runs(options: Options, devices: int) -> list[Run]:
    """All runs, the most important first: gathers, all devices, one, two processes, other numbers of devices."""
    pieces = tuple(piece for piece in MESH_PIECES if piece in options.pieces and piece not in (GATHERS, PROCESSES))
    powers = [1 << i for i in range(1, devices.bit_length()) if 1 << i < devices]
    found = [Run(None, devices, exchange, (GATHERS,)) for exchange in options.exchanges if GATHERS in options.pieces]
    for count in (devices, 1, *powers) if pieces else ():
        exchanges = options.exchanges if count > 1 else ("none",)
        found += [Run(layout, count, exchange, pieces) for layout in options.layouts for exchange in exchanges]
        if count == 1 and PROCESSES in options.pieces and devices % COUNT == 0:
            found.append(Run(options.layouts[-1], devices, options.exchanges[0], pieces[:1], processes=COUNT))
    return found
