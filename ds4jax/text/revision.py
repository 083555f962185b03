"""Which revision of the chat format a model was made for: the preview's, or that of the checkpoint of 07-31.

The two differ in the texts that ask for efforts of reasoning (`ds4jax.text.efforts`). No file names its revision. The weights of
0731 come with a DSpark drafter; but there is also the preview with such a drafter, which its name tells.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.text.efforts import REVISIONS

# Entries of `compress_ratios` of V4-Flash with DSpark: one for each of 43 layers and of the drafter's 3 stages.
_RATIOS = 46


def revision_of(
    config: Config, *, path: Path | None = None, name: str = "", dspark: bool = False, given: str | None = None
) -> str:
    """The revision of the chat format, "preview" or "0731". The choice and its reason are logged.

    Args:
        config: the model's.
        path: its file or checkpoint directory; the folder's name counts.
        name: `general.name` of a GGUF file.
        dspark: whether the files hold a DSpark drafter that `config` does not count.
        given: what the user says, which comes first.

    Raises:
        InputError: `given` is no revision.
    """
    if given is not None and given not in REVISIONS:
        raise InputError(f"revision: {given[:60]!r} is unknown; it must be one of {', '.join(REVISIONS)}")
    revision, reason = (given, "as asked for") if given is not None else _found(config, path, name, dspark)
    logging.getLogger("ds4jax").info("%s: chat format of revision %s: %s", path or "the model", revision, reason)
    return revision


def _found(config: Config, path: Path | None, name: str, dspark: bool) -> tuple[str, str]:
    if not (dspark or config.n_dspark or len(config.compress_ratios) == _RATIOS):
        return "preview", "there is no DSpark drafter"
    names = f"{name} {_folder(path)}".lower()
    if "dspark" in names and "0731" not in names:
        return "preview", "its name says DSpark without 0731"
    return "0731", "there is a DSpark drafter"


def _folder(path: Path | None) -> str:
    if path is None:
        return ""
    path = path.resolve()
    return path.name if path.is_dir() else path.parent.name
