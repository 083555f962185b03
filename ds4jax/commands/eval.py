"""`ds4jax eval`: bits per byte of a model on a text, beside a count baseline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ds4jax
from ds4jax import cli_options
from ds4jax.commands import model as models

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

ASSETS = Path(ds4jax.__file__).parent / "assets"
HELDOUT = ASSETS / "heldout.txt"
EXTRACT = ASSETS / "train_extract.txt"
ORDER = 6
RECORDED = "ds4jax.baseline_bits_per_byte"

DESCRIPTION = """\
Print how many bits a model needs for each byte of a text, beside an order-6 Witten-Bell count model of bytes, and how often the
MTP block's first draft equals the model's own most likely token. Without --text, the text is the 20 chapters that the tiny
model was not trained on."""

EXAMPLES = """\
examples:
  ds4jax eval
  ds4jax eval --model model.gguf --text book.txt --json"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("eval", help="bits per byte of a model on a text", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    parser.add_argument("--text", type=cli_options.text_file, metavar="FILE", help="a UTF-8 text (the held-out chapters)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0.

    Raises:
        InputError: the model or the text cannot be used.
    """
    text: bytes = HELDOUT.read_bytes() if options.text is None else options.text
    model = models.open_model(options)
    from ds4jax.evaluate import evaluate

    score = evaluate(model, text.decode(), progress=True)
    baseline, trained_on = _baseline(model, text, heldout=options.text is None)
    if options.json:
        fields = {
            "model": str(model.path),
            "bytes": score.bytes,
            "tokens": score.tokens,
            "bits_per_byte": score.bits_per_byte,
            "baseline_bits_per_byte": baseline,
            "baseline_order": ORDER,
            "baseline_trained_on": trained_on,
            "mtp_agreement": score.mtp_agreement,
        }
        print(json.dumps(fields, ensure_ascii=False))
        return 0
    agreement = "no MTP block" if score.mtp_agreement is None else f"{score.mtp_agreement:.1%}"
    print(f"text             {score.bytes:,} bytes, {score.tokens:,} tokens")
    print(f"model            {score.bits_per_byte:.4f} bits per byte")
    print(f"count baseline   {baseline:.4f} bits per byte (order {ORDER}, trained on {trained_on})")
    print(f"MTP agreement    {agreement} (first draft equals the model's own most likely token)")
    return 0


def _baseline(model: LanguageModel, text: bytes, *, heldout: bool) -> tuple[float, str]:
    """Bits per byte of the count model, and what it was trained on.

    The whole training text is not in the package; what its count model reached on the held-out chapters is in the metadata of
    the model that was trained on it.
    """
    from ds4jax.loading import open_checkpoint

    metadata = open_checkpoint(model.path).metadata if model.path else {}
    if heldout and RECORDED in metadata:
        return float(metadata[RECORDED]), "the model's whole training text, as its file records"
    from ds4jax.count_model import bits_per_byte

    with models.status("counting for the baseline"):
        return bits_per_byte(EXTRACT.read_bytes(), text, ORDER), "the training extract in the package"
