"""`ds4jax inspect`: print the content of a model's files, from their headers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax import bounds
from ds4jax.bounds import DEVICES, Device
from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import model as models
from ds4jax.cli.inspect_text import drafter_text, model_text
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.loading.checkpoint import Checkpoint
    from ds4jax.loading.plan import Plan

AsText = Callable[[dict[str, Any]], str]

DESCRIPTION = """\
Print a model's flavour, shards and drafter, its configuration, its tensors by stored type and by class, and its memory: bytes by
class in the file and on the device, bytes of the cache for a context, bytes that a decoded token reads, and the devices on which
it fits. Then what a decode step runs by kernels, and what it costs where it does not. Only headers are read, so this is fast for
a file of any size. The name, type and shape of every tensor are checked against the configuration.

Several cards (such as h200x2, to h200x16) are modelled: each holds its part of all large matrices, and small tensors, cache and
working memory in whole. An exchange counts 18.5 us, as between two H200s; between more cards and hosts it takes longer. With
--groups, each group of cards has all weights and its part of the slots.

The file of an MTP block is described, too, and --drafter-file without PATH describes any drafter's file.

With --check, read every stored value instead, without an accelerator: numbers and scales must be finite, and expert ids must
exist."""

EXAMPLES = """\
examples:
  ds4jax inspect
  ds4jax inspect model.gguf --json
  ds4jax inspect model.gguf --context 131072 --device h200
  ds4jax inspect model.gguf --context 1048576 --cache narrow
  ds4jax inspect model.gguf --context 131072 --slots 8 --cache narrow --device h200
  ds4jax inspect model.gguf --drafter-file mtp.gguf --check
  ds4jax inspect model.gguf --context 131072 --slots 16 --device h200x8 --groups 4
  ds4jax inspect model.gguf --dispatch
  ds4jax inspect --drafter-file dspark.gguf"""


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
    models.add_drafter(parser)
    models.add_dense(parser)
    models.add_rounding(parser)
    parser.add_argument(
        "--context",
        type=cli_options.token_count,
        metavar="N",
        help="tokens to plan for (32768, or the model's context)",
    )
    parser.add_argument(
        "--slots",
        type=cli_options.integer(bounds.SLOTS),
        default=1,
        metavar="N",
        help="requests at once, each with this context, as by `ds4jax batch` (1)",
    )
    parser.add_argument(
        "--device", choices=tuple(DEVICES), help="the accelerator to plan for (this machine's and all known ones)"
    )
    models.add_groups(parser)
    parser.add_argument("--check", action="store_true", help="check every stored value and print a verdict")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--dispatch", action="store_true", help="also print the path of each product and of a decode step, with the reasons"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0.

    Raises:
        InputError: the files are not a model that can be loaded, or --check found an invalid value.
    """
    if options.check:
        return _check(options)
    with progress.status("reading headers"):
        if options.model is None and options.drafter_file is not None:
            found, text = _drafter(options.drafter_file)
        else:
            found, text = _model_or_block(options)
    print(json.dumps(found, ensure_ascii=False) if options.json else text(found))
    return 0


def _drafter(path: Path) -> tuple[dict[str, Any], AsText]:
    """What the file of any drafter holds, and how it becomes text."""
    from ds4jax.loading import drafters

    found = drafters.describe(path)
    if found is None:
        raise InputError(f"{path}: drafter file: neither an MTP block nor a DSpark drafter; give a model as PATH")
    return found, drafter_text


def _model_or_block(options: argparse.Namespace) -> tuple[dict[str, Any], AsText]:
    """What the model holds, or the MTP block where its file was given instead, and how it becomes text.

    A DSpark drafter given as the model is refused as by all commands.
    """
    try:
        return _model(options), model_text
    except InputError:
        if options.model is None or options.drafter_file is not None or os.path.isdir(options.model):
            raise
        from ds4jax.loading import drafters

        with contextlib.suppress(InputError):
            found = drafters.describe(options.model)
            if found is not None and found["drafter"] == "mtp":
                return found, drafter_text
        raise


def _model(options: argparse.Namespace) -> dict[str, Any]:
    """All that is known of the model that the options name."""
    checkpoint = models.open_checkpoint(options)
    # Imported once the files are known to be a model: it brings the model's modules.
    from ds4jax.cli import inspect_paths

    found = summary(checkpoint)
    found |= {"plan": planned(checkpoint, options.context, options.device, options.slots, options.groups)}
    found |= {"decode_step": inspect_paths.decode_step(checkpoint), "costs": inspect_paths.costs(checkpoint)}
    if options.dispatch:
        found |= {"dispatch": inspect_paths.dispatch(checkpoint), "prompt_experts": inspect_paths.prompt_experts(checkpoint)}
        found["exchange"] = inspect_paths.exchange(checkpoint)
    return found


def _check(options: argparse.Namespace) -> int:
    """Check every value. Prints the verdict as one line, or with --json as an object."""
    if options.model is None and options.drafter_file is not None:
        raise InputError(f"--drafter-file {options.drafter_file}: --check needs the model, too; give it as PATH")
    import jax

    # Set before JAX starts: the values stay on the host.
    jax.config.update("jax_platforms", "cpu")
    with progress.loading_bar("looking at values") as bar:
        from ds4jax.loading.check_values import check_values

        checkpoint = models.open_checkpoint(options)
        check_values(checkpoint, bar)
    count, nbytes = len(checkpoint.tensors), sum(tensor.nbytes for tensor in checkpoint.tensors)
    if options.json:
        found = {"path": str(checkpoint.path), "checked": count, "bytes": nbytes}
        found |= {"note": checkpoint.note} if checkpoint.note else {}
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(f"{checkpoint.path}: {count:,} tensors, {nbytes / 1e6:,.1f} MB: every value can be used")
        print(f"note: {checkpoint.note}\n" if checkpoint.note else "", end="")
    return 0


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of the headers.

    Returns:
        path, kind, flavour ("antirez", "mainline", "unsloth UD" or "hub"), shards (number of files with tensors), drafter (as by
        `_drafts`), mtp_path (the file of the MTP block where it is another), config (every field of `Config`), tensors (stored
        type → count, values, bytes, device_bytes), types (classes as `contents.Group`: kind, names, stored type → layers), the
        totals values, bytes and device_bytes, ignored (number of tensors that the model does not use), note (one line about
        ignored tensors and missing drafts), vocabulary (None without a tokenizer), and
        metadata (numbers and short texts, without lists and long texts).
    """
    from ds4jax.loading import contents

    drafter = _drafts(checkpoint)
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
        "flavour": contents.flavour(checkpoint),
        "shards": _shards(checkpoint),
        "drafter": drafter,
        "mtp_path": drafter["path"] if drafter["kind"] == "mtp" else None,
        "config": dataclasses.asdict(checkpoint.config),
        "tensors": {
            kind: {"count": count[kind], "values": values[kind], "bytes": nbytes[kind], "device_bytes": device[kind]}
            for kind in sorted(count)
        },
        "types": [dataclasses.asdict(group) for group in contents.groups(checkpoint.tensors)],
        "values": values.total(),
        "bytes": nbytes.total(),
        "device_bytes": device.total(),
        "ignored": len(checkpoint.ignored),
        "note": checkpoint.note,
        "vocabulary": checkpoint.tokenizer.vocab_size if checkpoint.tokenizer else None,
        "metadata": {key: value for key, value in checkpoint.metadata.items() if _short(value)},
    }


def _drafts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What drafts: kind ("mtp", "dspark", "ngram" or "none"), where ("inside" or "file"), path, and reason where it cannot.

    For DSpark also stages, block_size, target_layers (counted from 0), noise_token and markov_rank.
    """
    from ds4jax.loading import contents

    kind, where = contents.head(checkpoint)
    path = str(checkpoint.drafter_path) if checkpoint.drafter_path is not None else None
    found: dict[str, Any] = {"kind": kind, "where": where, "path": path, "reason": "" if where else checkpoint.no_mtp}
    config = checkpoint.config
    if config.n_dspark:
        found |= {"stages": config.n_dspark, "block_size": config.dspark_block, "target_layers": list(config.dspark_layers)}
        found |= {"noise_token": config.dspark_noise_id, "markov_rank": config.dspark_rank}
    return found


def _shards(checkpoint: Checkpoint) -> int:
    """Number of the model's files that can hold tensors."""
    if checkpoint.kind == "hub":
        return len({file for file in checkpoint.files if file.suffix == ".safetensors"})
    files = checkpoint.files
    return files.index(checkpoint.drafter_path) if checkpoint.drafter_path is not None else max(len(files), 1)


def planned(
    checkpoint: Checkpoint, context: int | None = None, device: str | None = None, slots: int = 1, groups: int = 1
) -> dict[str, Any]:
    """The memory that the model needs and the devices on which it fits, in bytes.

    Args:
        device: a name in `DEVICES`; None takes this machine's device, if it reports its memory, and all of `DEVICES`.
        slots: requests at once, each with this context.
        groups: divide the cards into so many groups, each with all weights and its part of the slots. Devices whose cards do not
            divide are left out.

    Returns:
        context, slots, capacity (rows of each request's cache), cache_values and cache_bytes (that a token of context adds to
        it), classes (class → file, device, token: read by one decoded token), cache and cache_token, token (read in all), draft
        (read by one draft), working (left free for programs), needed (on the device in all), and devices: name, cards, groups,
        memory and bandwidth of a card (bytes and bytes/s), modelled (several cards are, see `Plan.weights_on`), needed (on each
        card), whole (kinds of matrices that the cards do not divide), gathers and exchange_ms (of the cards in a step),
        tokens_per_second (at most, of one request without drafts), fits, largest_context (of each request), most_slots (with this
        context), chunk (tokens of a prompt in one call).

    Raises:
        InputError: the context is longer than the model's, or the groups do not divide the slots or the cards.
    """
    from ds4jax.loading import plan as plans

    made = plans.plan(checkpoint, context, slots=slots)
    present = plans.present_device() if device is None else None
    named = [DEVICES[name] for name in (DEVICES if device is None else (device,))]
    chosen = [one for one in ([present] if present else []) + named if one.cards % groups == 0]
    if not chosen:
        counts = sorted({str(one.cards) for one in named}, key=int)
        raise InputError(f"groups is {groups}; it must divide the number of cards, {' or '.join(counts)}")
    if slots % groups:
        raise InputError(f"slots is {slots}; {groups} groups of cards must divide it, so give a multiple of {groups}")
    of_group = made if groups == 1 else plans.plan(checkpoint, context, slots=slots // groups)
    return {
        "context": made.context,
        "slots": made.slots,
        "capacity": made.capacity,
        "cache_values": made.context_values,
        "cache_bytes": made.context_bytes,
        "classes": {name: dataclasses.asdict(part) for name, part in made.parts.items()},
        "cache": made.cache,
        "cache_token": made.cache_token,
        "token": made.token,
        "draft": made.draft,
        "working": bounds.WORKING_BYTES,
        "needed": made.needed,
        "devices": [_on(of_group, checkpoint, one, groups) for one in chosen],
    }


def _on(made: Plan, checkpoint: Checkpoint, device: Device, groups: int) -> dict[str, Any]:
    """A device of `planned`; `made` is the plan of one group."""
    from ds4jax.engine.prefill import chunk_for
    from ds4jax.loading import plan as plans
    from ds4jax.loading.cuts import undivided

    group = dataclasses.replace(device, cards=device.cards // groups)
    bound, weights = made.bound(group), made.weights_on(group)
    slots = groups * plans.most_slots(checkpoint, weights, device.memory, made.context)
    return {
        **dataclasses.asdict(device),
        "groups": groups,
        "modelled": device.cards > 1,
        "needed": made.needed_on(group),
        "whole": undivided(checkpoint.config, group.cards),
        "gathers": made.gathers[group.cards],
        "exchange_ms": round(1e3 * made.exchange_seconds(group), 2),
        "tokens_per_second": round(bound, 1) if bound is not None else None,
        "fits": made.needed_on(group) <= device.memory,
        "largest_context": plans.largest_context(checkpoint, weights, device.memory, slots=made.slots),
        "most_slots": min(slots, bounds.SLOTS.largest or slots),
        "chunk": chunk_for(checkpoint.config, made.capacity, device.memory - weights - made.cache),
    }


def _short(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 500)
