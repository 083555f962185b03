"""What --think, --effort and --revision make of a conversation's beginning, and which revision a model's files tell."""

from __future__ import annotations

import argparse
from pathlib import Path

import chat_golden
import pytest
import v4_vocabulary

from ds4jax.bounds import SHIPPED
from ds4jax.cli.commands import chat
from ds4jax.cli.commands.model import revision
from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.random_models.hub import write_hub

PREFIXES = chat_golden.RENDER["effort_prefixes"]
QUESTION = "<｜User｜>Why?<｜Assistant｜>"


def given(**options: object) -> argparse.Namespace:
    return argparse.Namespace(**({"system": None, "think": False, "effort": None, "revision": "preview"} | options))


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, ""),
        ({"revision": "0731"}, ""),
        ({"think": True}, ""),
        ({"think": True, "effort": "max"}, PREFIXES["preview"]["max"]),
        # DeepSeek's API takes this effort where none is named.
        ({"think": True, "revision": "0731"}, PREFIXES["0731"]["high"]),
        ({"think": True, "revision": "0731", "effort": "low"}, ""),
        ({"think": True, "revision": "0731", "effort": "ultra", "system": "Be brief."}, PREFIXES["0731"]["max"] + "Be brief."),
    ],
)
def test_beginnings(options: dict[str, object], prefix: str) -> None:
    tokenizer, asked = v4_vocabulary.tokenizer(), given(**options)
    text = f"<｜begin▁of▁sentence｜>{prefix}{QUESTION}{'<think>' if asked.think else '</think>'}"
    assert tokenizer.decode(chat.opening(tokenizer, "Why?", asked)) == text


def test_effort_without_reasoning() -> None:
    chat.check(given(effort="low", think=True))
    with pytest.raises(InputError, match="--effort is for reasoning; give --think as well"):
        chat.check(given(effort="low"))


def test_the_revision_of_a_models_files(tmp_path: Path) -> None:
    assert revision(open_checkpoint(SHIPPED), None) == "preview"
    assert revision(open_checkpoint(SHIPPED), "0731") == "0731"
    write_hub(tmp_path / "flash", drafter="dspark")
    assert revision(open_checkpoint(tmp_path / "flash"), None) == "0731"
    (tmp_path / "flash").rename(tmp_path / "flash-dspark")
    assert revision(open_checkpoint(tmp_path / "flash-dspark"), None) == "preview"


def test_a_conversation_in_a_file_has_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    path.touch()
    for name, value in (("system", "Be brief."), ("effort", "max"), ("revision", "0731")):
        options = given(think=True, session=path, **({"revision": None} | {name: value}))
        with pytest.raises(InputError, match=f"--{name} stands at the beginning of a conversation, and .*talk.session holds one"):
            chat.run(options)
