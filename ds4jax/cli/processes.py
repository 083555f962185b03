"""Options of a command that several processes run together."""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

import ds4jax
from ds4jax.cli import options as cli_options
from ds4jax.errors import InputError
from ds4jax.processes import seat as seats
from ds4jax.processes.seat import Seat

if TYPE_CHECKING:
    from ds4jax.loading.checkpoint import Checkpoint

# Options of which the processes' programs and values depend.
_EQUAL = ("slots", "context", "strict", "chunk", "drafter", "draft", "max_draft", "dense", "qat", "cache")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --coordinator, --process, --processes and --join-seconds."""
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="one model in several processes: where process 0 listens for the others, in a private network",
    )
    parser.add_argument("--process", type=cli_options.integer(seats.INDEX), metavar="I", help="this process, 0 to N-1")
    parser.add_argument("--processes", type=cli_options.integer(seats.COUNT), metavar="N", help="the number of processes")
    parser.add_argument(
        "--join-seconds",
        type=cli_options.integer(seats.PATIENCE),
        default=seats.WAIT,
        metavar="S",
        help=f"how long processes wait for each other ({seats.WAIT})",
    )


def seat(options: argparse.Namespace) -> Seat | None:
    """This process's place in a job; None without --coordinator. A job uses all devices of its processes.

    Raises:
        InputError: the options do not fit together.
    """
    if options.coordinator is None:
        if options.process is not None or options.processes is not None:
            name = "process" if options.process is not None else "processes"
            raise InputError(f"--{name}: give --coordinator HOST:PORT, too")
        return None
    if options.devices not in (None, "all"):
        raise InputError(f"--devices {options.devices}: several processes use all their devices; leave it out")
    if options.groups > 1:
        raise InputError(f"--groups {options.groups}: several processes are one group; leave it out")
    if options.exchange == "mailbox":
        raise InputError("--exchange mailbox: several processes exchange by collectives; leave it out")
    options.devices = "all"
    return Seat.of(options.coordinator, options.process, options.processes, options.join_seconds)


def facts(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """What must be equal in all processes of a job, besides the number of processes."""
    versions = {"ds4jax": ds4jax.__version__, "jax": metadata.version("jax")}
    tensors = [[one.name, one.shape, one.stored, one.form] for one in checkpoint.tensors]
    digest = hashlib.sha256(json.dumps([repr(checkpoint.config), tensors]).encode()).hexdigest()[:16]
    same = {f"--{name.replace('_', '-')}": getattr(options, name) for name in _EQUAL}
    return versions | same | {"the model's header": digest}
