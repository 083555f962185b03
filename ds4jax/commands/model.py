"""What the commands that run a model have in common: which one, and how it is opened."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ds4jax import cli_options, startup
from ds4jax.config import CACHES

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from ds4jax.generation import Prompt
    from ds4jax.language_model import LanguageModel
    from ds4jax.loading import Checkpoint

# Bytes of weights from which on loading takes long enough to say first what it will take.
LARGE = 1_000_000_000
# Seconds after which a bar is worth looking at.
BAR_AFTER = 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """--model, --mtp-file, --dense, --qat and --cache."""
    parser.add_argument(
        "--model", type=cli_options.model_path, metavar="PATH", help="a GGUF file or a checkpoint directory (the tiny model)"
    )
    add_mtp_file(parser)
    add_dense(parser)
    add_rounding(parser)


def add_mtp_file(parser: argparse.ArgumentParser) -> None:
    """--mtp-file."""
    parser.add_argument(
        "--mtp-file",
        type=cli_options.model_path,
        metavar="PATH",
        help="the GGUF file with the MTP block of a GGUF model that has none (the one beside the model)",
    )


def add_dense(parser: argparse.ArgumentParser) -> None:
    """--dense."""
    parser.add_argument(
        "--dense",
        choices=("q8_0", "bf16", "f32"),
        help="of a checkpoint directory: keep FP4 experts as MXFP4 and make dense matrices this type (all float32, exactly)",
    )


def add_rounding(parser: argparse.ArgumentParser) -> None:
    """--qat and --cache."""
    parser.add_argument(
        "--qat",
        action=argparse.BooleanOptionalAction,
        help="simulate the FP8 and FP4 rounding that published weights were trained with (as the model's files say)",
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default=CACHES[0],
        help="how the cache keeps compressed rows and indexer keys: narrow takes less than a third and changes no bit, for "
        "models with that rounding (float32)",
    )


def add_draft(parser: argparse.ArgumentParser) -> None:
    """--draft and --max-draft, for commands that speculate."""
    parser.add_argument(
        "--draft",
        type=cli_options.draft,
        metavar="K",
        help="tokens that the MTP block drafts a step, 0 to 4, or auto for what pays best (2 where the model has the block)",
    )
    parser.add_argument(
        "--max-draft",
        type=cli_options.draft_count,
        metavar="K",
        help="the deepest draft that the loop is compiled for (2, or --draft if more); 0 is the narrow loop without drafts",
    )


def max_draft(options: argparse.Namespace) -> int | None:
    """What the loop is compiled for, None for the model's own default.

    Two depths are the same program, so that they say the same to the last bit; only a depth above the default needs another.
    """
    if options.max_draft is not None or not isinstance(options.draft, int) or options.draft <= cli_options.DEFAULT_DRAFTS:
        depth: int | None = options.max_draft
        return depth
    return options.draft


def add_chunk(parser: argparse.ArgumentParser) -> None:
    """--chunk, for commands that take a prompt in."""
    parser.add_argument(
        "--chunk",
        type=cli_options.token_count,
        metavar="N",
        help="tokens of the prompt that one call takes in at most (planned by the device's memory: 512 or 4096)",
    )


def add_strict(parser: argparse.ArgumentParser) -> None:
    """--strict, for commands that decode."""
    parser.add_argument(
        "--strict",
        action="store_true",
        default=os.environ.get("DS4JAX_STRICT") == "1",
        help="float32 products and no Pallas kernel (also DS4JAX_STRICT=1)",
    )


def open_model(options: argparse.Namespace, *, max_draft: int | None = None, prompt: Prompt | None = None) -> LanguageModel:
    """Load the model that the options name, through the compilation cache; `max_draft` as for `ds4jax.load`.

    Args:
        prompt: what the model is going to be given, checked before weights are read.

    Raises:
        InputError: anything about the files that keeps them from being used, or a prompt that the model cannot take.
    """
    startup.watch()
    with loading_bar("loading the model") as bar:
        from ds4jax import runtime
        from ds4jax.language_model import encoded, from_checkpoint

        startup.begin("plan")
        checkpoint = open_checkpoint(options)
        if prompt is not None:
            encoded(prompt, checkpoint.config, checkpoint.tokenizer, checkpoint.path)
        runtime.configure()
        _say_plan(checkpoint, max_draft)
        startup.begin("load")
        return from_checkpoint(checkpoint, max_draft=max_draft, progress=bar)


def open_checkpoint(options: argparse.Namespace) -> Checkpoint:
    """Read the headers of the model that the options name, by default the tiny one.

    Raises:
        InputError: the files are not a model that can be loaded, or not with such a cache.
    """
    from ds4jax.language_model import SHIPPED, configured
    from ds4jax.loading import open_checkpoint

    checkpoint = open_checkpoint(options.model or SHIPPED, options.mtp_file, dense=options.dense)
    return configured(checkpoint, qat=options.qat, cache=options.cache)


def _say_plan(checkpoint: Checkpoint, max_draft: int | None) -> None:
    """One line on stderr about what a large model takes."""
    if sum(tensor.nbytes for tensor in checkpoint.tensors) <= LARGE or not sys.stderr:
        return
    from ds4jax.loading.plan import plan, present_device
    from ds4jax.prefill_plan import chunk_for

    made, device = plan(checkpoint, max_draft=max_draft), present_device()
    chunk = chunk_for(checkpoint.config, made.capacity, device.memory - made.device - made.cache if device else None)
    print(f"ds4jax: {checkpoint.path}: {made.line()}; prompts in calls of {chunk:,} tokens", file=sys.stderr)


@contextlib.contextmanager
def loading_bar(message: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show on a terminal's stderr how far reading is, as bytes done of a total: a bar with the rate once it takes its time.

    Yields:
        What to call with both; None where nobody watches.
    """
    if not watched():
        yield None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(message, DownloadColumn(), TransferSpeedColumn()) as show:
        yield show


@contextlib.contextmanager
def reading_bar(message: str) -> Iterator[Callable[[int, int], None] | None]:
    """`loading_bar` for the tokens of a prompt."""
    if not watched():
        yield None
        return
    from rich.progress import MofNCompleteColumn, ProgressColumn, Task
    from rich.text import Text

    class TokenSpeedColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "")

    with _bar(message, MofNCompleteColumn(), TokenSpeedColumn()) as show:
        yield show


def watched() -> bool:
    """Whether stderr is a terminal."""
    return bool(sys.stderr and sys.stderr.isatty())


@contextlib.contextmanager
def _bar(message: str, *figures: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, began = Console(stderr=True), time.monotonic()
    columns = (TextColumn(message), BarColumn(), *figures, TimeRemainingColumn())
    waiting, bar = console.status(message), Progress(*columns, console=console, transient=True)
    task = bar.add_task(message, total=None)

    def show(done: int, total: int) -> None:
        if not bar.live.is_started:
            if time.monotonic() - began < BAR_AFTER or done == total:
                return
            # A console shows one thing that moves at a time.
            waiting.stop()
            bar.start()
        bar.update(task, completed=done, total=total)

    waiting.start()
    try:
        yield show
    finally:
        waiting.stop()
        bar.stop()


@contextlib.contextmanager
def counting_status(message: str, total: int) -> Iterator[Callable[[str], None]]:
    """`status` for so many pieces of work, one after the other.

    Yields:
        What to call with the name of the next.
    """
    if not watched():
        yield lambda name: None
        return
    from rich.console import Console

    with Console(stderr=True).status(message) as shown:
        begun = 0

        def show(name: str) -> None:
            nonlocal begun
            begun += 1
            shown.update(f"{message} {begun} of {total}: {name}")

        yield show


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Show on a terminal's stderr that something takes its time; say nothing where nobody watches."""
    if not watched():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield
