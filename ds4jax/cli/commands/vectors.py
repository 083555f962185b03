"""`ds4jax vectors`: compare a model with recorded continuations."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ds4jax.cli import options as cli_options
from ds4jax.cli.commands import model as models
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.evaluation.vectors import Agreement

DESCRIPTION = """\
Compare a model with recorded continuations: the fixtures in tests/test-vectors of the ds4 project, official.vec and
prompts/*.txt. Each prompt is a user's turn. The reply has no reasoning and is teacher forced with the recorded tokens. A fixture
agrees if the model selects each recorded token, and if the log probability of each recorded alternative that is one token of the
vocabulary differs by less than 4. Prints one line per fixture. Exit code 1 if one disagrees.

With --json, stdout is one object: equal (the verdict), skipped (ids), and a list of fixtures."""

EXAMPLES = """\
examples:
  ds4jax vectors --model model.gguf --from ds4/tests/test-vectors
  ds4jax vectors --model model.gguf --from ds4/tests/test-vectors --skip long_memory_archive --json"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("vectors", help="compare with recorded continuations", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    models.add_strict(parser)
    parser.add_argument(
        "--from", dest="folder", type=cli_options.folder, required=True, metavar="DIR", help="the folder with official.vec"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="ID", help="skip this fixture; may be given several times")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if a fixture disagrees.

    Raises:
        InputError: the fixtures or the model cannot be used, or no fixture remains to compare.
    """
    from ds4jax.evaluation import vectors

    fixtures = vectors.read(options.folder)
    unknown = set(options.skip) - {fixture.id for fixture in fixtures}
    if unknown:
        known = ", ".join(fixture.id for fixture in fixtures)
        raise InputError(f"--skip {min(unknown)}: {options.folder} has no such fixture; it has {known}")
    wanted = [fixture for fixture in fixtures if fixture.id not in options.skip]
    if not wanted:
        raise InputError("--skip leaves no fixture to compare")
    model = models.open_model(options)
    found = []
    for agreement in vectors.compare(model, wanted, strict=options.strict):
        found.append(agreement)
        if not options.json:
            print(_line(agreement), flush=True)
    equal = sum(agreement.equal for agreement in found)
    if options.json:
        rows = [dataclasses.asdict(agreement) | {"equal": agreement.equal} for agreement in found]
        skipped = [fixture.id for fixture in fixtures if fixture.id in options.skip]
        print(json.dumps({"equal": equal == len(found), "skipped": skipped, "fixtures": rows}, ensure_ascii=False))
    else:
        skipped_too = f", {len(fixtures) - len(wanted)} skipped" if len(wanted) < len(fixtures) else ""
        print(f"{equal} of {len(found)} agree{skipped_too}")
    return 0 if equal == len(found) else 1


def _line(agreement: Agreement) -> str:
    missing = f", {agreement.missing} are no tokens here" if agreement.missing else ""
    verdict = "agrees" if agreement.equal else "DISAGREES"
    figures = (
        f"{agreement.id}: {verdict}, after {agreement.prompt_tokens} tokens {agreement.selected} of {agreement.steps} selected, "
        f"{agreement.compared} log-probabilities within {agreement.largest:.3f}{missing}"
    )
    return "; ".join([figures, *agreement.failures])
