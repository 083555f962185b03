"""`ds4jax warmup`: compile the programs of generate and chat in advance."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import model as models
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.engine.warmup import Warm

CONTEXT = 4096

DESCRIPTION = """\
Compile the large programs of generate and chat for a model on this machine, and keep them in the compilation cache. They are the
prefill calls and the decode loop, for each cache size that texts of up to --context tokens use. Only headers are read; no weights
are in memory.

Give the same --max-draft, --strict, --chunk, --dense, --qat and --cache as to the later commands, because each of them changes
the programs. The compilation cache is ds4jax/jax in the user's cache folder, or the folder in DS4JAX_CACHE. It does not contain
the small programs that run while weights are loaded; the first run adds them.

Prints each program with its seconds for tracing and for compiling, or for reading it from the cache. With --json, stdout is one
object: folder, seconds, and programs with name, lower_seconds, compile_seconds and kept (true if read from the cache)."""

EXAMPLES = """\
examples:
  ds4jax warmup
  ds4jax warmup model.gguf --context 32768
  ds4jax warmup model.gguf --max-draft 0 --json"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "warmup", help="compile the programs of generate and chat in advance", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=cli_options.model_path,
        metavar="MODEL",
        help="a GGUF file or a checkpoint directory (the tiny model)",
    )
    models.add_drafter(parser)
    models.add_dense(parser)
    models.add_rounding(parser)
    models.add_devices(parser)
    models.add_strict(parser)
    models.add_chunk(parser)
    parser.add_argument(
        "--max-draft",
        type=cli_options.draft_count,
        metavar="K",
        help="the maximum number of drafts per step of the loop (2 for a model with an MTP block; on a CPU 0, as for generate)",
    )
    parser.add_argument(
        "--context",
        type=cli_options.token_count,
        metavar="N",
        help=f"maximum tokens of prompt and continuation ({CONTEXT}, or the model's context if shorter)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0.

    Raises:
        InputError: the files are not a model that can be loaded, the context is longer than the model's, or the compilation cache
            cannot be written.
    """
    began = time.monotonic()
    with progress.status("reading headers"):
        import jax

        from ds4jax import runtime
        from ds4jax.engine import warmup

        runtime.configure()
        folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if not folder:
            raise InputError(f"{runtime.cache_dir()}: programs cannot be kept there; give another folder in DS4JAX_CACHE")
        checkpoint = models.open_checkpoint(options)
        max_draft = models.max_drafts(options, checkpoint, drafting=models.asks_for_drafts(options))
        model = warmup.without_weights(checkpoint, max_draft=max_draft, devices=options.devices)
        context = options.context or min(CONTEXT, model.config.max_context)
        programs = warmup.programs(model, context, strict=options.strict, chunk=options.chunk)
    with progress.counting_status("compiling", len(programs)) as note:
        done = _shown(warmup.warm(programs, note), quiet=options.json)
    seconds = time.monotonic() - began
    if options.json:
        rows = [dataclasses.asdict(one) for one in done]
        print(json.dumps({"folder": str(folder), "seconds": round(seconds, 3), "programs": rows}))
    else:
        print(f"{len(done)} programs in {folder} after {seconds:.1f} s", file=sys.stderr)
    return 0


def _shown(programs: Iterable[Warm], *, quiet: bool) -> list[Warm]:
    """All programs. Each is printed when it is done, unless `quiet`."""
    done = []
    for one in programs:
        done.append(one)
        if not quiet:
            how = "read" if one.kept else "compiled"
            print(f"{one.name}: traced in {one.lower_seconds:.1f} s, {how} in {one.compile_seconds:.1f} s", flush=True)
    return done
