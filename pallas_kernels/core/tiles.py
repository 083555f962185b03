"""The tile of a share-warp launch: from a table of measured tiles by device, shape and number of rows, otherwise by a rule.

Each entry of tiles.json was measured on the device that it is listed under; `python -m pallas_kernels.tuning.tune` measures
another device. A tile changes only the time of a launch; results have the same bits with any tile.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.formats import BLOCK
from pallas_kernels.linear.q8_matmul import Tile
from pallas_kernels.tuning.shapes import tile_key

TABLE = Path(__file__).with_name("tiles.json")
# With fewer programs a device of a hundred multiprocessors has too few loads in flight.
PROGRAMS = 2048
MAX_LOADS = 4

Table = dict[str, dict[str, dict[str, list[int]]]]


def read(path: Path) -> Table:
    """Tiles by device kind, shape key and number of rows M, `[rows, unroll, chained]` each.

    Raises:
        ValueError: the file is not such a table; the message names the file.
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
    """Write tiles by shape key and M under a device kind. Other entries of the file and other M stay. It changes atomically."""
    table = read(path) if path.exists() else {}
    shapes = table.setdefault(device_kind, {})
    for key, tiles in chosen.items():
        measured = {int(m): entry for m, entry in shapes.get(key, {}).items()}
        measured |= {m: [tile.rows, tile.unroll, int(tile.chained)] for m, tile in tiles.items()}
        shapes[key] = {str(m): measured[m] for m in sorted(measured)}
    devices = []
    for device, entries in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(entries.items()))
        devices.append(f"  {json.dumps(device)}: {{\n{lines}\n  }}")
    trial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        trial.write_text("{\n" + ",\n".join(devices) + "\n}\n")
        os.replace(trial, path)
    finally:
        trial.unlink(missing_ok=True)


@functools.cache
def _shipped() -> Table:
    return read(TABLE)


def tile_for(sizes: tuple[int, ...], k: int, groups: int, m: int, device_kind: str) -> Tile:
    """The tile of a launch.

    tiles.json has measured tiles. An M that was not measured uses the tile of the next larger measured M, or of the largest.
    Without an entry, a program loads four chunks before it multiplies the first. They come from up to four rows, which share the
    activations, and from fewer rows if there would otherwise be too few programs.

    Args:
        sizes: rows of each weight.
        k: values of a row.
        groups: groups of a grouped product, 1 otherwise.
        m: rows of activations.
        device_kind: the device's name in JAX, such as "NVIDIA H100 80GB HBM3".
    """
    entries = _shipped().get(device_kind, {}).get(tile_key(sizes, k, groups))
    if entries:
        measured = sorted(map(int, entries))
        rows, unroll, chained = entries[str(next((known for known in measured if known >= m), measured[-1]))]
        return Tile(rows, unroll, bool(chained))
    rows = MAX_LOADS
    while rows > 1 and groups * sum(sizes) < rows * PROGRAMS:
        rows //= 2
    chunks = -(-k // (BLOCK * LANES))
    return Tile(rows, min(chunks, MAX_LOADS // rows))
