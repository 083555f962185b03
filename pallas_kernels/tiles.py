"""Which tile a share-warp launch uses: a table of measured choices by device and shape, a rule elsewhere.

The entries of tiles.json were found on the devices that they stand under; `python -m pallas_kernels.tune` finds them for another.
A tile also sets the order in which lanes are summed, so results on two devices may differ in their last bits; it never depends on
the number of rows, and so neither do the bits.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pallas_kernels.q8_matmul import Tile
from pallas_kernels.shapes import tile_key

TABLE = Path(__file__).with_name("tiles.json")
SHORT_K = 2048
MANY_ROWS = 65536

Table = dict[str, dict[str, list[int]]]


def read(path: Path) -> Table:
    """Tiles by device kind and shape key, `[rows, warps]` each.

    Raises:
        ValueError: the file is something else; the message names it.
    """
    try:
        table = json.loads(path.read_text())
        for shapes in table.values():
            for rows, warps in shapes.values():
                Tile(int(rows), int(warps))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of tiles: {error}") from None
    return dict(table)


def write(path: Path, device_kind: str, chosen: Mapping[str, Tile]) -> None:
    """Put tiles by shape key under a device kind; what the file holds beside them stays. The file changes at once or not."""
    table = read(path) if path.exists() else {}
    shapes = table.setdefault(device_kind, {})
    shapes.update({key: [tile.rows, tile.warps] for key, tile in chosen.items()})
    devices = []
    for device, entries in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(entries.items()))
        devices.append(f"  {json.dumps(device)}: {{\n{lines}\n  }}")
    trial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        trial.write_text("{\n" + ",\n".join(devices) + "\n}\n")
        os.replace(trial, path)
    finally:
        trial.unlink(missing_ok=True)


@functools.cache
def _shipped() -> Table:
    return read(TABLE)


def tile_for(sizes: tuple[int, ...], k: int, groups: int, device_kind: str) -> Tile:
    """The tile of a launch over weights of `sizes` rows of K values each, `groups` times.

    Measured choices come from tiles.json; `device_kind` is the device's name as jax gives it, such as "NVIDIA H100 80GB HBM3".
    Elsewhere a program owns two rows where a row is short or rows are many, and one row otherwise: with less to do, a program
    does not pay for its start, and with fewer programs a small launch does not fill the device.
    """
    entry = _shipped().get(device_kind, {}).get(tile_key(sizes, k, groups))
    if entry:
        rows, warps = entry
        return Tile(rows, warps)
    return Tile(rows=2 if k <= SHORT_K or groups * sum(sizes) >= MANY_ROWS else 1, warps=1)
