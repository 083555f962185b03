"""`ds4jax warmup`: compile what ordinary use of a model runs, before anybody waits for it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options
from ds4jax.commands import model as models
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.warmup import Warm

CONTEXT = 4096

DESCRIPTION = """\
Compile the large programs that generate and chat run with a model on this machine, into the cache of compiled programs: for each
size of cache that texts of up to --context tokens get, every call that takes a prompt in, and the decode loop. Only headers are
read, and no weight is in memory.

Give --max-draft, --strict, --chunk, --dense, --qat and --cache as to the commands that are to start fast: each choice is other
programs.
The cache is in ds4jax/jax of the user's cache folder, or where DS4JAX_CACHE says. It also holds for a second run what is compiled
while weights are loaded, which is small.

Prints each program with the seconds for tracing and for compiling it, or for reading it where it was in the cache already. With
--json, stdout is one object: folder, seconds, and programs with name, lower_seconds, compile_seconds and kept, true for those."""

EXAMPLES = """\
examples:
  ds4jax warmup
  ds4jax warmup model.gguf --context 32768
  ds4jax warmup model.gguf --max-draft 0 --json"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "warmup", help="compile beforehand what generate and chat run", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=cli_options.model_path,
        metavar="MODEL",
        help="a GGUF file or a checkpoint directory (the tiny model)",
    )
    models.add_mtp_file(parser)
    models.add_dense(parser)
    models.add_rounding(parser)
    models.add_strict(parser)
    models.add_chunk(parser)
    parser.add_argument(
        "--max-draft",
        type=cli_options.draft_count,
        metavar="K",
        help="the deepest draft that the loop is compiled for (2 where the model has an MTP block)",
    )
    parser.add_argument(
        "--context",
        type=cli_options.token_count,
        metavar="N",
        help=f"tokens of the longest texts, prompt and continuation ({CONTEXT}, or all that the model takes)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0.

    Raises:
        InputError: the files are not a model that can be loaded, a context that the model does not have, or nowhere to keep
            programs.
    """
    began = time.monotonic()
    with models.status("reading headers"):
        import jax

        from ds4jax import runtime, warmup

        runtime.configure()
        folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if not folder:
            raise InputError(f"{runtime.cache_dir()}: programs cannot be kept there; name another folder in DS4JAX_CACHE")
        checkpoint = models.open_checkpoint(options)
        model = warmup.without_weights(checkpoint, max_draft=options.max_draft)
        context = options.context or min(CONTEXT, model.config.max_context)
        programs = warmup.programs(model, context, strict=options.strict, chunk=options.chunk)
    with models.counting_status("compiling", len(programs)) as note:
        done = _shown(warmup.warm(programs, note), quiet=options.json)
    seconds = time.monotonic() - began
    if options.json:
        rows = [dataclasses.asdict(one) for one in done]
        print(json.dumps({"folder": str(folder), "seconds": round(seconds, 3), "programs": rows}))
    else:
        print(f"{len(done)} programs in {folder} after {seconds:.1f} s", file=sys.stderr)
    return 0


def _shown(programs: Iterable[Warm], *, quiet: bool) -> list[Warm]:
    """All programs, each printed when it is done unless `quiet`."""
    done = []
    for one in programs:
        done.append(one)
        if not quiet:
            how = "read" if one.kept else "compiled"
            print(f"{one.name}: traced in {one.lower_seconds:.1f} s, {how} in {one.compile_seconds:.1f} s", flush=True)
    return done
