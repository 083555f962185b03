"""`ds4jax inspect`: what a file or checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options
from ds4jax.commands import model as models

if TYPE_CHECKING:
    from ds4jax.loading.checkpoint import Checkpoint, Tensor
    from ds4jax.loading.plan import Device, Plan

DESCRIPTION = """\
Print a model's configuration, its tensors by stored type, and what it takes: bytes by class in the file and on the device, bytes
of the cache for a context, bytes that a decoded token reads, and what fits where. Only headers are read, so this takes a moment
for a file of any size; every tensor's name, type and shape is checked against the configuration on the way.

With --check, every stored value is looked at instead, without an accelerator: numbers and scales are finite, expert ids exist."""

# As in the plan's own table, which is imported when it is needed.
DEVICES = ("h100", "h200")

# What numbers are called on the device.
NUMBERS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32"}

EXAMPLES = """\
examples:
  ds4jax inspect
  ds4jax inspect model.gguf --json
  ds4jax inspect model.gguf --context 131072 --device h200
  ds4jax inspect model.gguf --context 1048576 --cache narrow
  ds4jax inspect model.gguf --mtp-file mtp.gguf --check
  ds4jax inspect model.gguf --dispatch"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "inspect", help="print a model's configuration and sizes", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=cli_options.model_path,
        metavar="PATH",
        help="a GGUF file or a checkpoint directory (the tiny model)",
    )
    models.add_mtp_file(parser)
    models.add_dense(parser)
    models.add_rounding(parser)
    parser.add_argument(
        "--context", type=cli_options.token_count, metavar="N", help="tokens to plan for (32768, or all that the model takes)"
    )
    parser.add_argument(
        "--device", choices=DEVICES, help="the accelerator to plan for (the one that is here, and all that are known)"
    )
    parser.add_argument("--check", action="store_true", help="look at every stored value and print a verdict")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--dispatch", action="store_true", help="also print which path each product and a step of few rows take, and why"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0.

    Raises:
        InputError: the files are not a model that can be loaded, or with --check the first value that no model can have.
    """
    if options.check:
        return _check(options)
    with models.status("reading headers"):
        checkpoint = models.open_checkpoint(options)
        found = summary(checkpoint) | {"plan": planned(checkpoint, options.context, options.device)}
        found |= {"dispatch": dispatch(checkpoint), "few_rows": few_rows(checkpoint)} if options.dispatch else {}
    print(json.dumps(found, ensure_ascii=False) if options.json else as_text(found))
    return 0


def _check(options: argparse.Namespace) -> int:
    """Look at every value; the verdict is one line, or with --json an object."""
    import jax

    # Before anything else asks for devices: the values stay on the host.
    jax.config.update("jax_platforms", "cpu")
    with models.loading_bar("looking at values") as bar:
        from ds4jax.loading.check_values import check_values

        checkpoint = models.open_checkpoint(options)
        check_values(checkpoint, bar)
    count, nbytes = len(checkpoint.tensors), sum(tensor.nbytes for tensor in checkpoint.tensors)
    if options.json:
        print(json.dumps({"path": str(checkpoint.path), "checked": count, "bytes": nbytes}, ensure_ascii=False))
    else:
        print(f"{checkpoint.path}: {count:,} tensors, {nbytes / 1e6:,.1f} MB: every value can be used")
    return 0


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers say.

    Returns:
        path, kind, mtp_path (the file of the MTP block where it is another), config (every field of `Config`), tensors (stored
        type → count, values, bytes, device_bytes), values, bytes and device_bytes in all, vocabulary (None without a tokenizer),
        and metadata (numbers and short texts; lists and long texts are left out).
    """
    count: Counter[str] = Counter()
    values: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    device: Counter[str] = Counter()
    for tensor in checkpoint.tensors:
        count[tensor.stored] += 1
        values[tensor.stored] += math.prod(tensor.shape)
        nbytes[tensor.stored] += tensor.nbytes
        device[tensor.stored] += tensor.device_nbytes
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "mtp_path": str(checkpoint.mtp_path) if checkpoint.mtp_path is not None else None,
        "config": dataclasses.asdict(checkpoint.config),
        "tensors": {
            kind: {"count": count[kind], "values": values[kind], "bytes": nbytes[kind], "device_bytes": device[kind]}
            for kind in sorted(count)
        },
        "values": values.total(),
        "bytes": nbytes.total(),
        "device_bytes": device.total(),
        "vocabulary": checkpoint.tokenizer.vocab_size if checkpoint.tokenizer else None,
        "metadata": {key: value for key, value in checkpoint.metadata.items() if _short(value)},
    }


def planned(checkpoint: Checkpoint, context: int | None = None, device: str | None = None) -> dict[str, Any]:
    """What the model takes, and where it fits; everything in bytes.

    Args:
        device: a name of `DEVICES`; None takes the device that is here, where it tells its memory, and all of `DEVICES`.

    Returns:
        context, capacity (rows of the cache), cache_values and cache_bytes (that a token of context adds to it), classes (class →
        file, device, token: read by one decoded token), cache and cache_token, token (read in all), draft (read by one draft),
        working (left free for programs), needed (on the device in all), and devices: name, memory, bandwidth (bytes/s),
        tokens_per_second (at most, without drafts), fits, largest_context,
        chunk (tokens of a prompt in one call).

    Raises:
        InputError: a context that the model does not have.
    """
    from ds4jax.loading import plan as plans

    made = plans.plan(checkpoint, context)
    present = plans.present_device() if device is None else None
    chosen = [plans.DEVICES[name] for name in (DEVICES if device is None else (device,))]
    return {
        "context": made.context,
        "capacity": made.capacity,
        "cache_values": made.context_values,
        "cache_bytes": made.context_bytes,
        "classes": {name: dataclasses.asdict(part) for name, part in made.parts.items()},
        "cache": made.cache,
        "cache_token": made.cache_token,
        "token": made.token,
        "draft": made.draft,
        "working": plans.WORKING_BYTES,
        "needed": made.needed,
        "devices": [_on(made, checkpoint, one) for one in ([present] if present else []) + chosen],
    }


def _on(made: Plan, checkpoint: Checkpoint, device: Device) -> dict[str, Any]:
    from ds4jax.loading import plan as plans
    from ds4jax.prefill_plan import chunk_for

    bound = made.bound(device)
    return {
        **dataclasses.asdict(device),
        "tokens_per_second": round(bound, 1) if bound is not None else None,
        "fits": made.needed <= device.memory,
        "largest_context": plans.largest_context(checkpoint, made.device, device.memory),
        "chunk": chunk_for(checkpoint.config, made.capacity, device.memory - made.device - made.cache),
    }


def dispatch(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The path of every kind of product, layers with the same shape and types taken together.

    Returns:
        Rows with product, shape, stored, device (the weight's type there, which decides), count, and for one decode step, a
        prefill and strict mode the path on CUDA, the path elsewhere and the reason.
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
        key = (product, tensor.shape, tensor.stored, tensor.form)
        if key not in rows:
            gate = functools.partial(choose, quantized=tensor.form == "Q8_0", half=tensor.form in ("F16", "BF16"))
            choices = {name: gate(m, strict=strict) for name, (m, strict) in calls.items()}
            paths = {name: {"cuda": c.cuda, "default": c.default, "reason": c.reason} for name, c in choices.items()}
            types = {"stored": tensor.stored, "device": tensor.form}
            rows[key] = {"product": product, "shape": list(tensor.shape), **types, "count": 0, **paths}
        rows[key]["count"] += 1
    return list(rows.values())


def few_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Whether kernels that know the whole of a layer run a decode or verify step of few rows.

    Returns:
        Rows with part ("layers", "mtp" or "head"), count of its blocks, rows (at most so many in a step), the path on CUDA, the
        path elsewhere and the reason: "kernels", or "modules" where each product goes its own way as `dispatch` says.
    """
    from ds4jax.model import few_rows as kernels

    weights: dict[str, dict[str, Any]] = {}
    for tensor in checkpoint.tensors:
        block = re.match(r"(layers|mtp)\.\d+\.", tensor.name)
        name = block.group() if block else ""
        weights.setdefault(name, {})[tensor.name.removeprefix(name).removesuffix(".weight")] = _on_device(tensor)
    config, found = checkpoint.config, []

    def row(part: str, count: int, reason: str | None) -> dict[str, Any]:
        path = {"cuda": "modules" if reason else "kernels", "default": "modules", "reason": reason or "widths and types fit"}
        return {"part": part, "count": count, "rows": kernels.MOST_ROWS, **path}

    for part in ("layers", "mtp"):
        blocks = [own for name, own in weights.items() if name.startswith(f"{part}.")]
        if blocks:
            found.append(row(part, len(blocks), next(filter(None, (kernels.why_not(config, own) for own in blocks)), None)))
    head = weights[""]["head"]
    scored = kernels.scores(config, head, kernels.MOST_ROWS, strict=False)
    return [*found, row("head", 1, None if scored else _why_not_scored(head))]


def _why_not_scored(head: Any) -> str:
    """What `few_rows.scores` did not like."""
    from pallas_kernels.dispatch import OPT_OUT
    from pallas_kernels.formats import Q8_0

    if os.environ.get(OPT_OUT) == "1":
        return f"{OPT_OUT}=1"
    return "a width does not fit" if isinstance(head, Q8_0) else "the head is not Q8_0"


def _on_device(tensor: Tensor) -> Any:
    """Shapes and types of a weight's arrays on the device."""
    import jax

    from pallas_kernels.formats import FORMATS

    if tensor.form not in FORMATS:
        return jax.ShapeDtypeStruct(tensor.shape, NUMBERS[tensor.form])
    form, (*lead, width) = FORMATS[tensor.form], tensor.shape
    return jax.eval_shape(form.split, jax.ShapeDtypeStruct((*lead, width // form.BLOCK, form.BLOCK_BYTES), "uint8"))


def _short(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 500)


def as_text(found: dict[str, Any]) -> str:
    """`summary` for a person."""
    lines = [f"{found['path']}: {found['kind']}, {found['values']:,} values in {found['bytes'] / 1e6:,.1f} MB"]
    lines += [f"MTP block in {found['mtp_path']}"] if found["mtp_path"] else []
    lines += ["", "config"]
    lines += [f"  {name:<22} {_value(value)}" for name, value in found["config"].items()]
    lines += ["", f"tensors      {'count':>8} {'values':>18} {'bytes':>18} {'on the device':>18}"]
    for kind, row in found["tensors"].items():
        sizes = f"{row['values']:>18,} {row['bytes']:>18,} {row['device_bytes']:>18,}"
        lines.append(f"  {kind:<10} {row['count']:>8,} {sizes}")
    lines += ["", *_plan_lines(found["plan"])]
    lines += ["", f"tokenizer    {found['vocabulary']:,} tokens" if found["vocabulary"] else "tokenizer    none"]
    # What made the file; the rest of the metadata is the configuration over again.
    origin = {key: value for key, value in found["metadata"].items() if key.startswith(("general.", "ds4jax."))}
    if origin:
        lines += ["", "origin", *(f"  {key:<34} {_value(value)}" for key, value in origin.items())]
    if "dispatch" in found:
        lines += [
            "",
            f"{'product':<30} {'shape':>14} {'stored':>8} {'device':>7} {'count':>5}  path (on CUDA / elsewhere) and reason",
        ]
        for row in found["dispatch"]:
            shape = "x".join(map(str, row["shape"]))
            lines.append(
                f"  {row['product']:<28} {shape:>14} {row['stored']:>8} {row['device']:>7} {row['count']:>5}  {_paths(row)}"
            )
        lines += ["", f"{'in a step of few rows':<30} {'at most':>14} {'count':>5}  path (on CUDA / elsewhere) and reason"]
        for row in found["few_rows"]:
            path = row["cuda"] if row["cuda"] == row["default"] else f"{row['cuda']} / {row['default']}"
            rows = f"{row['rows']} rows"
            lines.append(f"  {row['part']:<28} {rows:>14} {row['count']:>5}  {path} ({row['reason']})")
    return "\n".join(lines)


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan for a person, in MB of a million bytes."""
    lines = [f"{'plan, in MB':<26} {'file':>12} {'device':>12} {'read a token':>14}"]
    rows = {name: (part["file"], part["device"], part["token"]) for name, part in plan["classes"].items()}
    rows["weights"] = (sum(row[0] for row in rows.values()), sum(row[1] for row in rows.values()), 0)
    rows["weights"] = (*rows["weights"][:2], plan["token"] - plan["cache_token"])
    rows[f"cache of {plan['context']:,}"] = (0, plan["cache"], plan["cache_token"])
    rows["working memory"] = (0, plan["working"], 0)
    rows["all"] = (rows["weights"][0], plan["needed"], plan["token"])
    lines += [f"  {name:<24} {_mb(sizes[0]):>12} {_mb(sizes[1]):>12} {_mb(sizes[2]):>14}" for name, sizes in rows.items()]
    lines.append(f"  a token of context adds {plan['cache_values']:,g} values to the cache, {plan['cache_bytes']:,.0f} bytes")
    if plan["draft"]:
        lines.append(f"  a draft of the MTP block reads {_mb(plan['draft'])} more")
    for device in plan["devices"]:
        rate = f", at most {device['tokens_per_second']:,.1f} tokens/s" if device["tokens_per_second"] is not None else ""
        most = device["largest_context"]
        fits = "fits" if device["fits"] else "does not fit"
        room = f"room for a context of {most:,}" if most else "no room for any context"
        calls = f", prompts in calls of {device['chunk']:,}" if device["fits"] else ""
        lines.append(f"  {device['name']}: {device['memory'] / 1e9:,.0f} GB: {fits}, {room}{rate}{calls}")
    return lines


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}" if nbytes else "-"


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
