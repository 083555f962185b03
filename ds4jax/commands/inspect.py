"""`ds4jax inspect`: what a file or checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options
from ds4jax.commands import model as models

if TYPE_CHECKING:
    from ds4jax.loading.checkpoint import Checkpoint

DESCRIPTION = """\
Print a model's configuration, its tensors by stored type, and their sizes. Only headers are read, so this takes a moment for a
file of any size; every tensor's name, type and shape is checked against the configuration on the way."""

EXAMPLES = """\
examples:
  ds4jax inspect
  ds4jax inspect model.gguf --json
  ds4jax inspect model.gguf --dispatch"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "inspect", help="print a model's configuration and sizes", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument(
        "path",
        nargs="?",
        type=cli_options.model_path,
        metavar="PATH",
        help="a GGUF file or a checkpoint directory (the tiny model)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--dispatch", action="store_true", help="also print which path each product takes, and why")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0.

    Raises:
        InputError: the files are not a model that can be loaded.
    """
    with models.status("reading headers"):
        from ds4jax.language_model import SHIPPED
        from ds4jax.loading import open_checkpoint

        checkpoint = open_checkpoint(options.path or SHIPPED)
        found = summary(checkpoint) | ({"dispatch": dispatch(checkpoint)} if options.dispatch else {})
    print(json.dumps(found, ensure_ascii=False) if options.json else as_text(found))
    return 0


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers say.

    Returns:
        path, kind, config (every field of `Config`), tensors (stored type → count, values, bytes), values and bytes in all,
        vocabulary (None without a tokenizer), and metadata (numbers and short texts; lists and long texts are left out).
    """
    count: Counter[str] = Counter()
    values: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors:
        count[tensor.stored] += 1
        values[tensor.stored] += math.prod(tensor.shape)
        nbytes[tensor.stored] += tensor.nbytes
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "config": dataclasses.asdict(checkpoint.config),
        "tensors": {kind: {"count": count[kind], "values": values[kind], "bytes": nbytes[kind]} for kind in sorted(count)},
        "values": values.total(),
        "bytes": nbytes.total(),
        "vocabulary": checkpoint.tokenizer.vocab_size if checkpoint.tokenizer else None,
        "metadata": {key: value for key, value in checkpoint.metadata.items() if _short(value)},
    }


def dispatch(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The path of every kind of product, layers with the same shape and type taken together.

    Returns:
        Rows with product, shape, stored, count, and for one decode step, a prefill and strict mode the path on CUDA, the path
        elsewhere and the reason.
    """
    from ds4jax.buckets import PREFILL
    from pallas_kernels.dispatch import choose

    calls = {"decode": (1, False), "prefill": (PREFILL[-1], False), "strict": (1, True)}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for tensor in checkpoint.tensors:
        if len(tensor.shape) != 2 or not tensor.name.endswith(".weight") or tensor.name == "embed.weight":
            continue
        product = re.sub(r"^(layers|mtp)\.\d+\.", "", tensor.name).removesuffix(".weight")
        # The router's product is part of choosing experts and always float32.
        if product == "ffn.gate":
            continue
        key = (product, tensor.shape, tensor.stored)
        if key not in rows:
            choices = {name: choose(m, tensor.stored == "Q8_0", strict=strict) for name, (m, strict) in calls.items()}
            paths = {name: {"cuda": c.cuda, "default": c.default, "reason": c.reason} for name, c in choices.items()}
            rows[key] = {"product": product, "shape": list(tensor.shape), "stored": tensor.stored, "count": 0, **paths}
        rows[key]["count"] += 1
    return list(rows.values())


def _short(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 500)


def as_text(found: dict[str, Any]) -> str:
    """`summary` for a person."""
    lines = [f"{found['path']}: {found['kind']}, {found['values']:,} values in {found['bytes'] / 1e6:,.1f} MB", "", "config"]
    lines += [f"  {name:<22} {_value(value)}" for name, value in found["config"].items()]
    lines += ["", f"tensors      {'count':>8} {'values':>18} {'bytes':>18}"]
    for kind, row in found["tensors"].items():
        lines.append(f"  {kind:<10} {row['count']:>8,} {row['values']:>18,} {row['bytes']:>18,}")
    lines += ["", f"tokenizer    {found['vocabulary']:,} tokens" if found["vocabulary"] else "tokenizer    none"]
    # What made the file; the rest of the metadata is the configuration over again.
    origin = {key: value for key, value in found["metadata"].items() if key.startswith(("general.", "ds4jax."))}
    if origin:
        lines += ["", "origin", *(f"  {key:<34} {_value(value)}" for key, value in origin.items())]
    if "dispatch" in found:
        lines += ["", f"{'product':<30} {'shape':>14} {'stored':>8} {'count':>5}  path (on CUDA / elsewhere) and reason"]
        for row in found["dispatch"]:
            shape = "x".join(map(str, row["shape"]))
            lines.append(f"  {row['product']:<28} {shape:>14} {row['stored']:>8} {row['count']:>5}  {_paths(row)}")
    return "\n".join(lines)


def _paths(row: dict[str, Any]) -> str:
    """Where a product goes, for a person."""
    parts = []
    for name in ("decode", "prefill", "strict"):
        path = row[name]
        where = path["cuda"] if path["cuda"] == path["default"] else f"{path['cuda']} / {path['default']}"
        parts.append(f"{name}: {where} ({path['reason']})")
    return "; ".join(parts)


def _value(value: Any) -> str:
    """One line for any value."""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value).replace("\n", " ")
