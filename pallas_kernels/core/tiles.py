"""The kernel and the tile of a Q8_0 product: measured ones by device, shape and number of rows, otherwise by a rule.

Each entry of tiles.json was measured on the device that it is listed under; `python -m pallas_kernels.tuning.tune` measures
another device. A tile changes only the time of a launch; results have the same bits with any tile of either kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pallas_kernels.core import batches
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.formats import BLOCK
from pallas_kernels.linear import q8_mma
from pallas_kernels.linear.q8_matmul import Tile
from pallas_kernels.linear.q8_mma import MmaTile
from pallas_kernels.tuning.shapes import tile_key

TABLE = Path(__file__).with_name("tiles.json")
# With fewer programs a device of a hundred multiprocessors has too few loads in flight.
PROGRAMS = 2048
MAX_LOADS = 4

Table = dict[str, dict[str, dict[str, Any]]]
Measured = TypeVar("Measured")


def read(path: Path) -> Table:
    """Tiles by device kind, shape key and number of rows M: `[rows, unroll, chained]`, or an object of the fields of `MmaTile`.

    Raises:
        ValueError: the file is not such a table; the message names the file.
    """
    try:
        table = json.loads(path.read_text())
        for shapes in table.values():
            for entries in shapes.values():
                for m, entry in entries.items():
                    _tile(entry)
                    if int(m) < 1:
                        raise ValueError("a number is out of range")
                if not entries:
                    raise ValueError("a shape has no entry")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of tiles: {error}") from None
    return dict(table)


def _tile(entry: Any) -> Tile | MmaTile:
    """The tile of an entry."""
    if isinstance(entry, dict):
        tile: Tile | MmaTile = MmaTile(**entry)
    else:
        rows, unroll, chained = entry
        if chained not in (0, 1):
            raise ValueError("a number is out of range")
        tile = Tile(rows, unroll, bool(chained))
    numbers = [tile.rows, tile.unroll] if isinstance(tile, Tile) else [tile.warps // tile.split, tile.split, tile.ahead]
    if min(numbers) < 1:
        raise ValueError("a number is out of range")
    return tile


def _entry(tile: Tile | MmaTile) -> Any:
    """The inverse of `_tile`."""
    return [tile.rows, tile.unroll, int(tile.chained)] if isinstance(tile, Tile) else dataclasses.asdict(tile)


def write(path: Path, device_kind: str, chosen: Mapping[str, Mapping[int, Tile | MmaTile]]) -> None:
    """Write tiles by shape key and M under a device kind. Other entries of the file stay. The file changes atomically."""
    table = read(path) if path.exists() else {}
    shapes = table.setdefault(device_kind, {})
    for key, tiles in chosen.items():
        known = shapes.get(key, {}) | {str(m): _entry(tile) for m, tile in tiles.items()}
        shapes[key] = dict(sorted(known.items(), key=lambda entry: int(entry[0])))
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


def tile_for(sizes: tuple[int, ...], k: int, groups: int, m: int, device_kind: str) -> Tile | MmaTile:
    """The tile of a launch, of the kernel that computes it.

    tiles.json has measured tiles. An M that was not measured uses the tile of the next larger measured M, or of the largest. If
    that is one of the tensor cores and their kernel takes the product, it is the launch's: only a measurement chooses that
    kernel. All else is the share-warp kernel's, with the tile of a batch (`core.batches`). Without an entry, a program of that
    kernel loads four chunks before it multiplies the first. They come from up to four rows, which share the activations, and
    from fewer rows if there would otherwise be too few programs.

    Args:
        sizes: rows of each weight.
        k: values of a row.
        groups: groups of a grouped product, 1 otherwise.
        m: rows of activations.
        device_kind: the device's name in JAX, such as "NVIDIA H100 80GB HBM3".
    """
    entries = _shipped().get(device_kind, {}).get(tile_key(sizes, k, groups), {})
    known = {int(rows): _tile(entry) for rows, entry in entries.items()}
    tile = _measured(known, m)
    if isinstance(tile, MmaTile) and q8_mma.why_not(k) is None:
        return tile
    of_a_batch = {rows: tile for rows, tile in known.items() if isinstance(tile, Tile)}
    return _measured(of_a_batch, batches.rows_of(m)) or _by_rule(groups * sum(sizes), k)


def _measured(known: Mapping[int, Measured], m: int) -> Measured | None:
    """The tile of the next larger number of rows, or of the largest; None if there is none."""
    larger = [rows for rows in known if rows >= m]
    return known[min(larger) if larger else max(known)] if known else None


def _by_rule(n: int, k: int) -> Tile:
    """A tile of the share-warp kernel for n rows of k values, all weights of the launch together."""
    rows = MAX_LOADS
    while rows > 1 and n < rows * PROGRAMS:
        rows //= 2
    chunks = -(-k // (BLOCK * LANES))
    return Tile(rows, min(chunks, MAX_LOADS // rows))
