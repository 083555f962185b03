"""Shared by the commands that continue a saved session."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ds4jax.cli import progress
from ds4jax.cli.commands import model as models
from ds4jax.cli.commands import reply as replies
from ds4jax.config import CACHES
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.engine.session import Session


def restored(path: Path, options: argparse.Namespace) -> Session:
    """The session of a file, with its model or the model of --model.

    Sampling options come from the command line. Options that choose the program come from the file.

    Raises:
        InputError: the file or the model cannot be used, or an option contradicts the file.
    """
    from ds4jax.engine.session_state import header
    from ds4jax.language_model import restore

    about = header(path)
    if options.model is None and about.model:
        options.model = Path(about.model)
        if not options.model.exists():
            raise InputError(f"{path}: model: {about.model} does not exist any more; give --model")
    if options.qat is None:
        options.qat = bool(about.config.get("qat"))
    if options.cache == CACHES[0]:
        options.cache = str(about.config.get("cache"))
    # A deeper loop than the saved one is refused by name.
    asked = options.max_draft if options.max_draft is not None else about.max_draft
    depth = max(asked, options.draft) if isinstance(options.draft, int) else asked
    if options.drafter == "auto":
        options.drafter = about.opened_with
    model = models.open_model(options, max_draft=depth)
    chosen = replies.generation_options(options)
    if not options.strict:
        del chosen["strict"]
    with progress.status("reading the session"):
        return restore(path, model, **chosen)
