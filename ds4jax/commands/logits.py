"""`ds4jax logits`: score a sequence and write what the model said at every position."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax import cli_options
from ds4jax.commands import model as models
from ds4jax.errors import InputError
from ds4jax.files import replacing

DESCRIPTION = """\
Score a sequence and write a .npz file with `ids` int32 [T] and `logits` float32 [T, V]; with --mtp also `mtp_logits` float32
[T-1, V], row t from the streams at t and the token at t+1, predicting the token at t+2."""

EXAMPLES = """\
examples:
  ds4jax logits --prompt "In the beginning" --out logits.npz
  ds4jax logits --model checkpoint/ --ids ids.npy --decode-from 37 --mtp --no-qat --out logits.npz
  ds4jax logits --ids ids.npy --strict --chunk 128 --out logits.npz"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("logits", help="score a sequence into a .npz file", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    models.add_strict(parser)
    models.add_chunk(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", type=cli_options.prompt, metavar="TEXT", help="the sequence as text")
    given.add_argument("--ids", type=cli_options.ids_file, metavar="FILE.npy", help="the sequence as token ids, integers [T]")
    parser.add_argument(
        "--decode-from", type=cli_options.position, metavar="N", help="compute positions from N on by one-token decode steps"
    )
    parser.add_argument("--mtp", action="store_true", help="also score with the MTP block")
    parser.add_argument("--out", type=cli_options.output_file, required=True, metavar="FILE.npz", help="the file to write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0.

    Raises:
        InputError: the model or the sequence cannot be used.
    """
    total = len(options.ids) if options.ids is not None else None
    if total is not None and options.decode_from is not None and options.decode_from > total:
        raise InputError(f"--decode-from is {options.decode_from}; the sequence has {total} tokens")
    model = models.open_model(options, prompt=options.prompt if options.ids is None else options.ids)
    ids = model.encode(options.prompt if options.ids is None else options.ids)
    given = {"decode_from": options.decode_from, "mtp": options.mtp, "strict": options.strict, "chunk": options.chunk}
    with models.reading_bar(f"scoring {len(ids)} tokens") as bar:
        arrays = model.logits(ids, progress=bar, **given)
    _save(options.out, arrays)
    print(f"{options.out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()), file=sys.stderr)
    return 0


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write all or nothing: a reader never meets half a file, and a failure leaves the old one."""
    with replacing(path) as unfinished, unfinished.open("xb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
