"""What a drafter's own file holds: an MTP block or a DSpark drafter, by its tensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ds4jax.loading.dspark_file import read_dspark
from ds4jax.loading.dspark_names import Dspark
from ds4jax.loading.gguf_header import Header, shown
from ds4jax.loading.gguf_match import require_tensors
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.mtp_file import architecture, is_dspark, side_block


def describe(path: Path) -> dict[str, Any] | None:
    """The content of a drafter's file; None for a file of another kind.

    Returns:
        path, kind ("drafter"), drafter ("mtp" or "dspark"), architecture, name (None where the file has none), layers, tensors
        (stored type -> count), bytes, usable; for an MTP block layer (N of its names `blk.N`, or None); for DSpark block_size,
        target_layers (counted from 0), noise_token and markov_rank.

    Raises:
        InputError: the file cannot be read, or it is a DSpark drafter that no model could use.
    """
    header = open_set(path)
    block = side_block(header)
    if block is not None:
        return _common(header, "mtp", layers=1) | {"layer": block.layer, "usable": True}
    if not is_dspark(header):
        return None
    found = read_dspark(header)
    return _common(header, "dspark", found.numbers.stages) | _dspark(found) | {"usable": True}


def _common(header: Header, drafter: str, layers: int) -> dict[str, Any]:
    name = header.metadata.get("general.name")
    return {
        "path": str(header.path),
        "kind": "drafter",
        "drafter": drafter,
        "architecture": shown(architecture(header)),
        "name": shown(str(name.value)) if name is not None else None,
        "layers": layers,
        "tensors": dict(sorted(Counter(info.type for info in header.tensors.values()).items())),
        "bytes": sum(info.nbytes for info in header.tensors.values()),
    }


def _dspark(found: Dspark) -> dict[str, Any]:
    """The drafter's numbers.

    Raises:
        InputError: a tensor is missing, or has a type that cannot be read. Shapes need the model.
    """
    require_tensors(found)
    numbers = found.numbers
    return {
        "block_size": numbers.block,
        "target_layers": list(numbers.layers),
        "noise_token": numbers.noise_id,
        "markov_rank": numbers.rank,
    }
