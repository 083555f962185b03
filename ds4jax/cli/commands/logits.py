"""`ds4jax logits`: score a sequence and write the logits of all positions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import model as models
from ds4jax.errors import InputError
from ds4jax.files import replacing

if TYPE_CHECKING:
    import numpy as np

DESCRIPTION = """\
Score a sequence and write a .npz file with `ids` int32 [T] and `logits` float32 [T, V]. With --mtp it also has `mtp_logits`
float32 [T-1, V]: row t predicts the token at t+2 from the streams at t and the token at t+1.

With --draft-at the DSpark block drafts K tokens greedily after each of the A positions. The file then also has `draft_at` int32
[A]; `draft_anchor` int32 [A], the token after each, at the last position the model's own choice; `draft_base_logits` and
`draft_logits` float32 [A, K, V], before and after the correction by the token before; `draft_tokens` int32 [A, K]; and
`draft_confidence` float32 [A, K]."""

EXAMPLES = """\
examples:
  ds4jax logits --prompt "In the beginning" --out logits.npz
  ds4jax logits --model checkpoint/ --ids ids.npy --decode-from 37 --mtp --no-qat --out logits.npz
  ds4jax logits --ids ids.npy --strict --chunk 128 --out logits.npz
  ds4jax logits --model 0731/ --ids ids.npy --draft-at 31,63 --out drafts.npz"""


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
        "--decode-from", type=cli_options.position, metavar="N", help="compute the positions from N with one-token decode steps"
    )
    parser.add_argument("--mtp", action="store_true", help="also score with the MTP block")
    parser.add_argument(
        "--draft-at",
        type=cli_options.positions,
        default=(),
        metavar="P1,P2,..",
        help="positions after which the DSpark block drafts",
    )
    parser.add_argument("--out", type=cli_options.output_file, required=True, metavar="FILE.npz", help="the file to write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0.

    Raises:
        InputError: the model or the sequence cannot be used.
    """
    total = len(options.ids) if options.ids is not None else None
    if total is not None and options.decode_from is not None and options.decode_from > total:
        raise InputError(f"--decode-from is {options.decode_from}; the sequence has {total} tokens")
    model = models.open_model(options, prompt=options.prompt if options.ids is None else options.ids)
    ids = model.encode(options.prompt if options.ids is None else options.ids)
    given = {"decode_from": options.decode_from, "mtp": options.mtp, "strict": options.strict, "chunk": options.chunk}
    given |= {"draft_at": options.draft_at}
    with progress.reading_bar(f"scoring {len(ids)} tokens") as bar:
        arrays = model.logits(ids, progress=bar, **given)
    _save(options.out, arrays)
    print(f"{options.out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()), file=sys.stderr)
    return 0


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the file. It is either complete or unchanged."""
    import numpy as np

    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
