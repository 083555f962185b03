"""The revision of the chat format that a model's files tell."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.text.revision import revision_of

FLASH = Config()
WITH_DSPARK = dataclasses.replace(FLASH, n_dspark=3)
MORE_RATIOS = dataclasses.replace(FLASH, compress_ratios=(*FLASH.compress_ratios, 0, 0))


@pytest.mark.parametrize(
    ("config", "facts", "expected"),
    [
        (FLASH, {}, "preview"),
        (FLASH, {"name": "DeepSeek V4 Flash 0731"}, "preview"),
        (WITH_DSPARK, {}, "0731"),
        (MORE_RATIOS, {}, "0731"),
        (FLASH, {"dspark": True}, "0731"),
        (WITH_DSPARK, {"name": "DeepSeek-V4-Flash"}, "0731"),
        (WITH_DSPARK, {"name": "DeepSeek V4 Flash DSpark"}, "preview"),
        (WITH_DSPARK, {"name": "deepseek-v4-flash-0731-dspark"}, "0731"),
        (WITH_DSPARK, {"path": Path("/models/DeepSeek-V4-Flash-DSpark/model.gguf")}, "preview"),
        (WITH_DSPARK, {"path": Path("/models/DeepSeek-V4-Flash-DSpark-0731/model.gguf")}, "0731"),
        (MORE_RATIOS, {"name": "x-dspark", "given": "0731"}, "0731"),
        (WITH_DSPARK, {"given": "preview"}, "preview"),
    ],
)
def test_choice(config: Config, facts: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ds4jax")
    assert revision_of(config, **facts) == expected
    assert f"chat format of revision {expected}: " in caplog.text


def test_a_checkpoint_directory_is_its_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "V4-Flash-DSpark"
    folder.mkdir()
    assert revision_of(WITH_DSPARK, path=folder) == "preview"
    assert revision_of(WITH_DSPARK, path=tmp_path) == "0731"


def test_an_unknown_revision() -> None:
    with pytest.raises(InputError, match="revision: '0801' is unknown; it must be one of preview, 0731"):
        revision_of(FLASH, given="0801")
