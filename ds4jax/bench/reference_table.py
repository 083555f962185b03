"""Measures the reference engine's table: drafting, strict drafting and plain decode of one prompt, and whether they agree.

Plain and drafting calls of one mode use the same compiled program, so their bits can be compared. Its plain steps also compute
the rows of the drafts. Plain decode in a program without drafts has its own row.

Source: the reference engine's README, prompt "knight".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ds4jax.errors import InputError
from ds4jax.evaluation.check import difference

if TYPE_CHECKING:
    from rich.table import Table

    from ds4jax.engine.generation import Generation
    from ds4jax.engine.options import Result
    from ds4jax.language_model import LanguageModel

PROMPT = "knight"
DRAFT = 2
RUNS = 3
WARM_TOKENS = 8
NOTES = (
    f"Medians of {RUNS} alternating runs after one warm-up run each. MTP is compared with plain decode of its mode in the same",
    "program, whose plain steps have a drafting step's rows. The last row is a program for one row; drafting has to beat it.",
)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to decode: drafts per step, the program's maximum, and the mode."""

    draft: int
    max_draft: int
    strict: bool

    @property
    def name(self) -> str:
        """Name in the table."""
        name = ("strict " if self.strict else "") + ("MTP" if self.draft else "plain")
        return name if self.max_draft else f"{name}, --max-draft 0"


WAYS = (Way(DRAFT, DRAFT, False), Way(DRAFT, DRAFT, True), Way(0, DRAFT, False), Way(0, DRAFT, True), Way(0, 0, False))


@dataclasses.dataclass(frozen=True)
class Row:
    """Result of one way to decode.

    Attributes:
        way: the way.
        tokens: new tokens of each run.
        tokens_per_second, tokens_per_step, ms_per_step: figures of the decode loop, from the median run.
        acceptance: for each depth, the share of drafts accepted when the drafts before them were accepted.
        difference: the first difference between a run and a plain run of the same program, in words; None if all are equal.
    """

    way: Way
    tokens: int
    tokens_per_second: float
    tokens_per_step: float
    ms_per_step: float
    acceptance: tuple[float, ...]
    difference: str | None


def measure(model: LanguageModel, new_tokens: int, note: Callable[[str], None]) -> tuple[Row, ...]:
    """Time each way to decode. Returns a row for each.

    Args:
        note: called with a line before each step.

    Raises:
        InputError: the model has no MTP block or no tokenizer.
    """
    if not model.config.n_mtp:
        raise InputError(f"{model.path}: mtp: {model.no_mtp}, and this compares it with plain decode")
    if model.tokenizer is None:
        raise InputError(f"{model.path}: tokenizer: none in these files, and the prompt of this benchmark is a text")
    opened = {depth: model.with_max_draft(depth) for depth in (DRAFT, 0)}

    def stream(way: Way) -> Generation:
        wanted: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True, "strict": way.strict, "draft": way.draft}
        return opened[way.max_draft].stream(PROMPT, **wanted)

    for way in WAYS:
        note(f"compiling: {way.name}")
        stream(way).advance(WARM_TOKENS)
    runs: dict[Way, list[Result]] = {way: [] for way in WAYS}
    for i in range(RUNS):
        # Alternate, so that other load on the machine affects all ways equally.
        for way in WAYS:
            note(f"run {i + 1} of {RUNS}: {way.name}")
            generation = stream(way)
            generation.advance(new_tokens)
            runs[way].append(generation.result())
    return tuple(_row(way, runs[way], runs[dataclasses.replace(way, draft=0)]) for way in WAYS)


def _row(way: Way, runs: Sequence[Result], plain: Sequence[Result]) -> Row:
    median = sorted(runs, key=lambda run: run.decode_seconds)[len(runs) // 2]
    found = (difference(expected, run) for run in runs for expected in plain)
    return Row(
        way=way,
        tokens=len(median.ids),
        tokens_per_second=median.tokens_per_second,
        tokens_per_step=median.tokens_per_step,
        ms_per_step=median.ms_per_step,
        acceptance=median.acceptance,
        difference=next((words for words in found if words), None),
    )


def equal(rows: Sequence[Row]) -> bool:
    """Whether all rows equal plain decode in their own program."""
    return all(row.difference is None for row in rows)


def document(environment: Mapping[str, Any], model: LanguageModel, rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON document of the rows and their environment."""
    return {
        "equal": equal(rows),
        "model": model.path.name if model.path else None,
        **environment,
        "prompt": PROMPT,
        "runs": RUNS,
        "rows": [_fields(row) for row in rows],
    }


def _fields(row: Row) -> dict[str, Any]:
    return {
        "name": row.way.name,
        **dataclasses.asdict(row.way),
        "tokens": row.tokens,
        "tokens_per_second": round(row.tokens_per_second, 3),
        "tokens_per_step": round(row.tokens_per_step, 4),
        "ms_per_step": round(row.ms_per_step, 4),
        "acceptance": [round(share, 4) for share in row.acceptance],
        "equal": row.difference is None,
        "difference": row.difference,
    }


def table(environment: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """The rows as a table."""
    from rich import box
    from rich.table import Table

    device, version, tokens = environment["device"], environment["jax"], rows[0].tokens
    made = Table(title=f'"{PROMPT}", {tokens} new tokens, {device}, jax {version}', box=box.SIMPLE)
    made.add_column("", no_wrap=True)
    for heading in ("tokens/s", "tokens a step", "ms a step", "accepted by depth"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("same tokens and bits as plain", no_wrap=True)
    for row in rows:
        made.add_row(
            row.way.name,
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_step:.2f}",
            f"{row.ms_per_step:.2f}",
            ", ".join(f"{share:.2f}" for share in row.acceptance),
            _same(row),
        )
    return made


def _same(row: Row) -> str:
    if row.difference:
        return f"NO: {row.difference}"
    return "yes" if row.way.draft else "in every run" if row.way.max_draft else "in every run, of its own program"


def show(environment: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Print the table and its notes on stdout, in their full width."""
    from rich.console import Console

    console = Console(width=max(130, Console().width), highlight=False, markup=False)
    console.print(table(environment, rows))
    for line in NOTES:
        console.print(line, soft_wrap=True)
