"""What the commands that go on with a saved session have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ds4jax.commands import model as models
from ds4jax.commands import reply as replies
from ds4jax.config import CACHES
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.session import Session


def restored(path: Path, options: argparse.Namespace) -> Session:
    """The session of a file, with the model that it was saved with or the one that --model names.

    How tokens are chosen is what the command line says; what chooses the program is what the file says.

    Raises:
        InputError: the file or the model cannot be used, or an option contradicts what the file says.
    """
    from ds4jax.saving import header, restore

    about = header(path)
    if options.model is None and about.model:
        options.model = Path(about.model)
        if not options.model.exists():
            raise InputError(f"{path}: model: {about.model} is not there any more; give --model")
    if options.qat is None:
        options.qat = bool(about.config.get("qat"))
    if options.cache == CACHES[0]:
        options.cache = str(about.config.get("cache"))
    depth = models.max_draft(options)
    model = models.open_model(options, max_draft=about.max_draft if depth is None else depth)
    chosen = replies.generation_options(options)
    if not options.strict:
        del chosen["strict"]
    with models.status("reading the session"):
        return restore(path, model, **chosen)
