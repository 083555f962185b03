"""`ds4jax eval`: bits per byte of a model on a text, with a baseline."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ds4jax.bounds import HELD_OUT_TEXT, TRAINING_EXTRACT
from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import model as models

if TYPE_CHECKING:
    from ds4jax.evaluation.drafting import Drafting
    from ds4jax.evaluation.evaluate import Score
    from ds4jax.language_model import LanguageModel

ORDER = 6
RECORDED = "ds4jax.baseline_bits_per_byte"

DESCRIPTION = """\
Print the bits per byte of a model on a text, the bits per byte of an order-6 Witten-Bell count model, and how often the MTP
block's first draft equals the model's most likely token. With --prompts, also continue pieces of the text and print the tokens of
a step. Without --text, the text is the 20 chapters held out from the training of the tiny model."""

EXAMPLES = """\
examples:
  ds4jax eval
  ds4jax eval --model model.gguf --text book.txt --json
  ds4jax eval --drafter-file dspark.gguf --prompts 24"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("eval", help="bits per byte of a model on a text", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    parser.add_argument("--text", type=cli_options.text_file, metavar="FILE", help="a UTF-8 text (the held-out chapters)")
    parser.add_argument(
        "--prompts", type=cli_options.token_count, metavar="N", help="also continue N pieces of the text with drafts"
    )
    parser.add_argument(
        "--temperature", type=cli_options.temperature, default=0.0, metavar="T", help="temperature of the continuations (0)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0.

    Raises:
        InputError: the model or the text cannot be used.
    """
    text: bytes = HELD_OUT_TEXT.read_bytes() if options.text is None else options.text
    model = models.open_model(options)
    from ds4jax.evaluation.evaluate import evaluate

    with progress.counting_bar("scoring") as bar:
        score = evaluate(model, text.decode(), progress=bar)
    drafted = _drafted(model, text.decode(), options)
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
        if drafted is not None:
            drafting = {**dataclasses.asdict(drafted), "tokens_per_step": drafted.tokens_per_step}
            fields["drafting"] = {"drafter": model.drafter_name, "temperature": options.temperature, **drafting}
        print(json.dumps(fields, ensure_ascii=False))
        return 0
    print(f"text             {score.bytes:,} bytes, {score.tokens:,} tokens")
    print(f"model            {score.bits_per_byte:.4f} bits per byte")
    print(f"count baseline   {baseline:.4f} bits per byte (order {ORDER}, trained on {trained_on})")
    print(f"MTP agreement    {_agreement(score, model)}")
    if drafted is not None:
        shares = ", ".join(f"{share:.2f}" for share in drafted.acceptance)
        rate = f"{drafted.tokens_per_step:.2f} tokens a step"
        print(f"drafting         {rate} ({drafted.prompts} continuations, by {model.drafter_name})")
        print(f"accepted         {shares} (each draft, where those before it were accepted)")
    return 0


def _agreement(score: Score, model: LanguageModel) -> str:
    if score.mtp_agreement is not None:
        return f"{score.mtp_agreement:.1%} (first draft equals the model's own most likely token)"
    if model.config.n_dspark:
        return "no MTP block was read; DSpark drafts, and --prompts N counts its tokens a step"
    return "no MTP block"


def _drafted(model: LanguageModel, text: str, options: argparse.Namespace) -> Drafting | None:
    """Tokens of a step on continuations of the text, if they are asked for."""
    if options.prompts is None:
        return None
    from ds4jax.decode.sampling import Sampling
    from ds4jax.evaluation.drafting import measure

    with progress.counting_bar("drafting") as bar:
        return measure(model, text, options.prompts, Sampling(options.temperature), progress=bar)


def _baseline(model: LanguageModel, text: bytes, *, heldout: bool) -> tuple[float, str]:
    """Bits per byte of the count model, and the name of its training text.

    The package does not contain the complete training text. The metadata of a model trained on it hold the count model's result
    on the held-out chapters.
    """
    from ds4jax.loading import open_checkpoint

    metadata = open_checkpoint(model.path, drafter="none").metadata if model.path else {}
    if heldout and RECORDED in metadata:
        return float(metadata[RECORDED]), "the model's whole training text, as its file records"
    from ds4jax.evaluation.count_model import bits_per_byte

    with progress.status("computing the baseline"):
        return bits_per_byte(TRAINING_EXTRACT.read_bytes(), text, ORDER), "the training extract in the package"
