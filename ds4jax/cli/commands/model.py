"""Shared by the commands that run a model: its options, and how it is opened."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ds4jax import timing as startup
from ds4jax.bounds import DENSE_FORMS, DRAFTERS, EXCHANGES, GROUP_COUNT, MAX_DRAFTS, SHIPPED, drafts_of, max_draft_of
from ds4jax.cli import options as cli_options
from ds4jax.cli.progress import loading_bar
from ds4jax.config import CACHES
from ds4jax.errors import InputError
from ds4jax.files import same_file

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel
    from ds4jax.loading.checkpoint import Checkpoint
    from ds4jax.text.prompt import Prompt

# Models with more bytes of weights than this load slowly, so the plan is printed first.
LARGE = 1_000_000_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --drafter, --drafter-file, --dense, --qat, --cache, --devices and --exchange."""
    parser.add_argument(
        "--model", type=cli_options.model_path, metavar="PATH", help="a GGUF file or a checkpoint directory (the tiny model)"
    )
    add_drafter(parser)
    add_dense(parser)
    add_rounding(parser)
    add_devices(parser)
    add_exchange(parser)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add --devices."""
    parser.add_argument(
        "--devices",
        type=cli_options.devices,
        metavar="N",
        help="cut the weights over so many devices, or over all (1)",
    )


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Add --groups, for commands with slots."""
    parser.add_argument(
        "--groups",
        type=cli_options.integer(GROUP_COUNT),
        default=1,
        metavar="N",
        help="divide the devices into so many groups, each with all weights and its part of the slots (1)",
    )


def add_exchange(parser: argparse.ArgumentParser) -> None:
    """Add --exchange, for commands that decode."""
    parser.add_argument(
        "--exchange",
        choices=EXCHANGES,
        default=EXCHANGES[0],
        help="how several devices exchange outputs in decode steps: by JAX's collectives or, on GPUs of one process, by direct "
        "stores into each other's memory, which no GPU has run yet (auto: collectives)",
    )


def add_drafter(parser: argparse.ArgumentParser) -> None:
    """Add --drafter and --drafter-file."""
    parser.add_argument(
        "--drafter",
        choices=DRAFTERS,
        default=DRAFTERS[0],
        help="what drafts: the MTP block, the DSpark drafter, earlier text (ngram), one of the two and earlier text where it is "
        "unsure, or nothing; auto takes DSpark if the weights have it, or else MTP (auto)",
    )
    add_drafter_file(parser)


def add_drafter_file(parser: argparse.ArgumentParser) -> None:
    """Add --drafter-file, which has the name --mtp-file, too."""
    parser.add_argument(
        "--drafter-file",
        "--mtp-file",
        type=cli_options.model_path,
        metavar="PATH",
        help="the GGUF file with the MTP block or DSpark drafter of a GGUF model (the one in the model, or else the file next to "
        "it)",
    )


def add_dense(parser: argparse.ArgumentParser) -> None:
    """Add --dense."""
    parser.add_argument(
        "--dense",
        choices=tuple(DENSE_FORMS),
        help="for a checkpoint directory: store FP4 experts as MXFP4 and dense matrices in this type (all in exact float32)",
    )


def add_rounding(parser: argparse.ArgumentParser) -> None:
    """Add --qat and --cache."""
    parser.add_argument(
        "--qat",
        action=argparse.BooleanOptionalAction,
        help="simulate the FP8 and FP4 rounding of the published weights' training (from the model's files)",
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default=CACHES[0],
        help="storage of compressed rows and indexer keys: for models with that rounding, narrow takes less than a third and "
        "changes no bit (float32)",
    )


def add_draft(parser: argparse.ArgumentParser) -> None:
    """Add --draft and --max-draft, for commands that draft."""
    parser.add_argument(
        "--draft",
        type=cli_options.draft,
        metavar="K",
        help=f"drafts per step, 0 to {MAX_DRAFTS}, or auto for the fastest (2 of an MTP block, all 5 of DSpark, 4 of ngram; on a "
        "CPU 0 unless this, --max-draft, --drafter or --drafter-file is given)",
    )
    parser.add_argument(
        "--max-draft",
        type=cli_options.draft_count,
        metavar="K",
        help="the maximum number of drafts per step of the compiled loop (as for --draft); 0 is the loop for one row",
    )


def max_drafts(options: argparse.Namespace, checkpoint: Checkpoint, *, drafting: bool) -> int | None:
    """The maximum number of drafts that the loop is compiled for; None for the default of the model's drafter.

    Depths up to the default share one program, so they give the same bits. Only a depth above the default needs another program.
    A CPU pays for every row of a step, so without `drafting` its loop is the one for a single row.

    Args:
        drafting: whether drafts are asked for, see `asks_for_drafts`.

    Raises:
        InputError: the drafter cannot make so many.
    """
    asked: int | None = getattr(options, "max_draft", None)
    depth = getattr(options, "draft", None)
    if asked is None and not drafting:
        import jax

        return 0 if jax.default_backend() == "cpu" else None
    field = "max-draft" if asked is not None else "draft"
    if asked is None and isinstance(depth, int):
        asked = depth if depth > drafts_of(checkpoint.opened_with, checkpoint.config)[0] else None
    max_draft_of(checkpoint.opened_with, checkpoint.config, asked, field=field)
    return asked


def asks_for_drafts(options: argparse.Namespace) -> bool:
    """Whether the command line names a depth or a drafter."""
    return getattr(options, "draft", None) is not None or options.drafter != DRAFTERS[0] or options.drafter_file is not None


def add_chunk(parser: argparse.ArgumentParser) -> None:
    """Add --chunk, for commands that prefill."""
    parser.add_argument(
        "--chunk",
        type=cli_options.token_count,
        metavar="N",
        help="maximum tokens of the prompt per prefill call (by the device's memory, up to 4096)",
    )


def add_strict(parser: argparse.ArgumentParser) -> None:
    """Add --strict, for commands that decode."""
    parser.add_argument(
        "--strict",
        action="store_true",
        default=os.environ.get("DS4JAX_STRICT") == "1",
        help="float32 products and no Pallas kernel (also DS4JAX_STRICT=1)",
    )


def open_model(options: argparse.Namespace, *, max_draft: int | None = None, prompt: Prompt | None = None) -> LanguageModel:
    """Load the model that the options name, with the compilation cache.

    Args:
        max_draft: as in `ds4jax.load`; None takes it from --max-draft and --draft, for commands that have them.
        prompt: the prompt to come. It is checked before weights are read.

    Raises:
        InputError: the files cannot be used, or the model cannot take the prompt.
    """
    startup.watch()
    with loading_bar("loading the model") as bar:
        startup.begin("plan")
        checkpoint = open_checkpoint(options)
        # Late, so that a file that cannot be used is refused at once.
        startup.begin("import")
        from ds4jax import runtime
        from ds4jax.language_model import from_checkpoint
        from ds4jax.text.prompt import encoded

        startup.begin("plan")
        if "revision" in options:
            options.revision = revision(checkpoint, options.revision)
        if prompt is not None:
            encoded(prompt, checkpoint.config, checkpoint.tokenizer, checkpoint.path)
        runtime.configure()
        if max_draft is None:
            # A command without --draft measures drafts, or has no use for them.
            drafting = "draft" not in options or asks_for_drafts(options)
            max_draft = max_drafts(options, checkpoint, drafting=drafting)
        _say_plan(checkpoint, max_draft)
        if checkpoint.note and sys.stderr:
            print(f"ds4jax: {checkpoint.path}: {checkpoint.note}", file=sys.stderr)
        startup.begin("load")
        where = {"devices": options.devices, "groups": options.groups if "groups" in options else 1, "exchange": options.exchange}
        return from_checkpoint(checkpoint, max_draft=max_draft, **where, progress=bar)


def open_checkpoint(options: argparse.Namespace) -> Checkpoint:
    """Read the headers of the model that the options name, by default the tiny model.

    Raises:
        InputError: the files are not a model that can be loaded, this cache does not fit, or an output file is one of them.
    """
    from ds4jax.loading import open_checkpoint

    model, side = options.model or SHIPPED, options.drafter_file
    checkpoint = open_checkpoint(model, side, dense=options.dense, drafter=options.drafter)
    for name in ("save", "session", "out"):
        path = getattr(options, name, None)
        own = same_file(path, checkpoint.files) if path else None
        if own is not None:
            raise InputError(f"--{name} {path}: is {own} of the model; give another name")
    return checkpoint.configured(qat=options.qat, cache=options.cache)


def revision(checkpoint: Checkpoint, given: str | None) -> str:
    """The revision of the chat format, by --revision or by the model's files."""
    from ds4jax.loading.contents import head
    from ds4jax.text.revision import revision_of

    name = str(checkpoint.metadata.get("general.name") or "")
    dspark = head(checkpoint)[0] == "dspark"
    return revision_of(checkpoint.config, path=checkpoint.path, name=name, dspark=dspark, given=given)


def _say_plan(checkpoint: Checkpoint, max_draft: int | None) -> None:
    """Print one line on stderr about the memory that a large model needs."""
    if sum(tensor.nbytes for tensor in checkpoint.tensors) <= LARGE or not sys.stderr:
        return
    from ds4jax.engine.prefill import chunk_for
    from ds4jax.loading.plan import free_bytes, plan, present_device

    made, device = plan(checkpoint, max_draft=max_draft), present_device()
    memory = device.memory if device else free_bytes()
    room = None if memory is None else memory - made.device - made.cache
    chunk = chunk_for(checkpoint.config, made.capacity, room, kernels=device is not None)
    print(f"ds4jax: {checkpoint.path}: {made.line()}; prompts in calls of {chunk:,} tokens", file=sys.stderr)
