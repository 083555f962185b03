"""`ds4jax serve`: a server with the interfaces of OpenAI and Anthropic."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax import bounds
from ds4jax.bounds import SHIPPED
from ds4jax.cli import options as cli_options
from ds4jax.cli import processes as cli_processes
from ds4jax.cli.commands import model as models
from ds4jax.errors import InputError
from ds4jax.text import efforts

if TYPE_CHECKING:
    from ds4jax.engine.engine import Engine
    from ds4jax.language_model import LanguageModel
    from ds4jax.processes.job import Job
    from ds4jax.processes.seat import Seat

PORT = bounds.Integers(0, 65535, "it must be 0 to 65535")
CONTEXT = 32768
SLOTS, QUEUE = 8, 1024
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_NEEDED = ("starlette", "uvicorn", "msgspec", "prometheus_client", "llguidance")

DESCRIPTION = """\
Serve a model over HTTP, with OpenAI's interfaces (/v1/chat/completions, /v1/completions, /v1/responses, /v1/models) and
Anthropic's (/v1/messages). MODEL is a GGUF file or a checkpoint directory, by default the tiny model.

A reply does not depend on other requests: the same request with the same seed has the same bits wherever system_fingerprint is
the same. A request without a seed gets one, which the reply names.

One model may be served by several processes with devices of their own: each runs the same command with its --process, and
process 0 is the server.

It listens on this machine alone. Another --host needs --api-key-file, or --insecure. SIGTERM and Ctrl-C let running replies
end."""

EXAMPLES = """\
examples:
  ds4jax serve
  ds4jax serve model.gguf --slots 8 --context 131072 --cache narrow
  ds4jax serve model.gguf --host 0.0.0.0 --api-key-file keys.txt
  ds4jax serve model.gguf --coordinator 10.0.0.1:9000 --processes 2 --process 0"""


def size(word: str) -> int:
    """A number of bytes, such as 16MB, 8GB or 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", word.strip(), re.IGNORECASE)
    unit = found[2].upper() if found else ""
    unit = unit + "B" if unit in tuple("KMGT") else unit.removesuffix("B") if unit == "B" else unit
    if not found:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of bytes; write it as 16MB or 8GB")
    return int(float(found[1]) * _UNITS[unit])


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("serve", help="serve a model over HTTP", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "model", nargs="?", type=cli_options.model_path, metavar="MODEL", help="a GGUF file or a checkpoint directory"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=cli_options.integer(PORT), default=8000, metavar="N", help="port; 0 for any (8000)")
    parser.add_argument(
        "--slots", type=cli_options.integer(bounds.SLOTS), default=SLOTS, metavar="N", help=f"requests that run at once ({SLOTS})"
    )
    parser.add_argument(
        "--context", type=cli_options.token_count, metavar="N", help=f"tokens of each, with its reply ({CONTEXT}, or the model's)"
    )
    parser.add_argument(
        "--max-queue", type=cli_options.integer(bounds.WAITING), default=QUEUE, metavar="N", help=f"requests that wait ({QUEUE})"
    )
    parser.add_argument("--max-body", type=size, default=size("16MB"), metavar="SIZE", help="largest body of a request (16MB)")
    parser.add_argument(
        "--prefix-cache",
        type=size,
        default=size("8GB"),
        metavar="SIZE",
        help="memory for beginnings of prompts (8GB)",
    )
    parser.add_argument("--prefix-dir", type=Path, metavar="DIR", help="a folder that keeps them for the next server (none)")
    _add_access(parser)
    models.add_drafter(parser)
    models.add_draft(parser)
    models.add_dense(parser)
    models.add_rounding(parser)
    models.add_devices(parser)
    models.add_groups(parser)
    models.add_exchange(parser)
    cli_processes.add_options(parser)
    models.add_strict(parser)
    models.add_chunk(parser)
    parser.add_argument(
        "--revision",
        choices=efforts.REVISIONS,
        help="the model's chat format (0731 for weights with a DSpark drafter that are not named otherwise, else preview)",
    )
    parser.set_defaults(run=run)


def _add_access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--served-name", metavar="NAME", help="the model's name for clients (ds4jax- and the file's name)")
    parser.add_argument("--api-key-file", type=cli_options.existing_file, metavar="FILE", help="accepted keys, one a line")
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="web pages that may use it, or * for all")
    parser.add_argument("--insecure", action="store_true", help="let other machines in without a key")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts and replies to the log")


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0 after a signal, 1 if the engine failed.

    Raises:
        InputError: the model cannot be used, the address cannot be bound, or the processes of a job do not gather.
    """
    seat = cli_processes.seat(options)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{missing[0]}: not installed; a server needs `pip install 'ds4jax[serve]'`")
    from ds4jax.serve.runner import Runner
    from ds4jax.serve.server import serve
    from ds4jax.serve.settings import Settings, is_loopback, keys_of, require_safe

    keys = keys_of(options.api_key_file) if options.api_key_file else ()
    require_safe(options.host, keys=bool(keys), insecure=options.insecure)
    checkpoint = models.open_checkpoint(options)
    facts = cli_processes.facts(options, checkpoint) if seat else {}
    if seat and seat.index:
        return _follow(options, seat, facts)
    settings = Settings(
        served_name=options.served_name or f"ds4jax-{(options.model or SHIPPED).stem or 'model'}",
        keys=keys,
        local=is_loopback(options.host) and not keys and not options.insecure,
        origins=tuple(options.cors),
        max_body=options.max_body,
        draft=options.draft,
        revision=models.revision(checkpoint, options.revision),
        log_prompts=options.log_prompts,
    )
    try:
        serve(Runner(lambda: _engine(options, seat, facts), settings), options.host, options.port)
    except InputError:
        raise
    except RuntimeError as error:
        print(f"ds4jax: error: {error}", file=sys.stderr)
        return 1
    return 0


def _engine(options: argparse.Namespace, seat: Seat | None, facts: dict[str, Any]) -> Engine:
    if seat is None:
        return _made(options, models.open_model(options))
    from ds4jax.processes.job import begin
    from ds4jax.processes.slots import LedSlots

    job = begin(seat, facts)
    with job.together():
        return _made(options, _loaded(options, job), slots_of=functools.partial(LedSlots, job=job))


def _loaded(options: argparse.Namespace, job: Job) -> LanguageModel:
    """The model in a process of a job."""
    model = models.open_model(options)
    job.meet()
    # All processes compute it together, before anything else.
    _ = model.fingerprint
    return model


def _made(options: argparse.Namespace, model: LanguageModel, **more: Any) -> Engine:
    from ds4jax.engine.engine import Engine

    return Engine(
        model,
        **_shape(options, model),
        waiting=options.max_queue,
        prefix_bytes=options.prefix_cache,
        prefix_folder=options.prefix_dir,
        **more,
    )


def _shape(options: argparse.Namespace, model: LanguageModel) -> dict[str, Any]:
    context = options.context or min(CONTEXT, model.config.max_context)
    return {"slots": options.slots, "context": context, "strict": options.strict, "chunk": options.chunk}


def _follow(options: argparse.Namespace, seat: Seat, facts: dict[str, Any]) -> int:
    """Hold parts of the model for process 0, until it ends."""
    from ds4jax.processes.job import begin

    job = begin(seat, facts)
    with job.together():
        model = _loaded(options, job)
        from ds4jax.engine.shape import Shape
        from ds4jax.engine.slots import Slots
        from ds4jax.processes.slots import follow

        follow(Slots(model, Shape.of(model, **_shape(options, model))[0]), job)
    return 0
