"""Which tile a share-warp launch uses: a table of measured choices by device, shape and number of rows, a rule elsewhere.

The entries of tiles.json were found on the devices that they stand under; `python -m pallas_kernels.tune` finds them for another.
A tile sets the time of a launch alone: results have the same bits with any.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pallas_kernels.arithmetic import LANES
from pallas_kernels.formats import BLOCK
from pallas_kernels.q8_matmul import Tile
from pallas_kernels.shapes import tile_key

TABLE = Path(__file__).with_name("tiles.json")
# With fewer programs than this a device of a hundred multiprocessors has not enough loads on their way.
PROGRAMS = 2048
MOST_LOADS = 4

Table = dict[str, dict[str, dict[str, list[int]]]]


def read(path: Path) -> Table:
    """Tiles by device kind, shape key and number of rows M, `[rows, unroll, chained]` each.

    Raises:
        ValueError: the file is something else; the message names it.
    """
    try:
        table = json.loads(path.read_text())
        for shapes in table.values():
            for entries in shapes.values():
                for m, (rows, unroll, chained) in entries.items():
                    if min(int(m), int(rows), int(unroll)) < 1 or chained not in (0, 1):
                        raise ValueError("a number is out of range")
                if not entries:
                    raise ValueError("a shape has no entry")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of tiles: {error}") from None
    return dict(table)


def write(path: Path, device_kind: str, chosen: Mapping[str, Mapping[int, Tile]]) -> None:
    """Put tiles by shape key and M under a device kind; what the file holds beside them stays. It changes at once or not."""
    table = read(path) if path.exists() else {}
    shapes = table.setdefault(device_kind, {})
    for key, tiles in chosen.items():
        shapes[key] = {str(m): [tile.rows, tile.unroll, int(tile.chained)] for m, tile in sorted(tiles.items())}
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


def tile_for(sizes: tuple[int, ...], k: int, groups: int, m: int, device_kind: str) -> Tile:
    """The tile of a launch of M activation rows over weights of `sizes` rows of K values each, `groups` times.

    Measured choices come from tiles.json, where an M that was not measured takes the choice of the next larger one that was;
    `device_kind` is the device's name as jax gives it, such as "NVIDIA H100 80GB HBM3". Elsewhere a program loads four chunks
    before it multiplies the first, from up to four rows, since these share the activations, but from fewer where there would be
    too few programs for the device.
    """
    entries = _shipped().get(device_kind, {}).get(tile_key(sizes, k, groups))
    if entries:
        measured = sorted(map(int, entries))
        rows, unroll, chained = entries[str(next((known for known in measured if known >= m), measured[-1]))]
        return Tile(rows, unroll, bool(chained))
    rows = MOST_LOADS
    while rows > 1 and groups * sum(sizes) < rows * PROGRAMS:
        rows //= 2
    chunks = -(-k // (BLOCK * LANES))
    return Tile(rows, min(chunks, MOST_LOADS // rows))
