"""The drafter's file on the command line and in Python."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import ds4jax
from ds4jax.cli.main import build_parser
from ds4jax.errors import InputError


def commands(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """All commands and sub-commands without further ones, by their words."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not actions:
        return {name: parser}
    return {
        words: one
        for action in actions
        for key, sub in action.choices.items()
        for words, one in commands(sub, f"{name} {key}").items()
    }


def test_every_command_that_loads_a_model_has_it() -> None:
    loading = set()
    for words, parser in commands(build_parser()).items():
        options = {option for action in parser._actions for option in action.option_strings}
        # `inspect` and `warmup` take the model without an option. `train` makes a drafter for it.
        if words.strip() == "train":
            continue
        if "--model" in options or any(action.dest == "model" for action in parser._actions):
            assert {"--drafter", "--drafter-file", "--mtp-file"} <= options, words
            loading.add(words.strip())
    assert loading >= {"generate", "chat", "logits", "inspect", "eval", "vectors", "check", "warmup", "bench reference", "serve"}


def test_two_names_of_one_option(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mtp\.gguf: mtp_file: .*other\.gguf was given, too, as drafter_file"):
        ds4jax.load(drafter_file=tmp_path / "other.gguf", mtp_file=tmp_path / "mtp.gguf")
    for name in ("drafter_file", "mtp_file"):
        with pytest.raises(InputError, match=r"missing\.gguf: no such file"):
            ds4jax.load(**{name: tmp_path / "missing.gguf"})
