"""`ds4jax completion`: a script with which a shell completes commands, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds4jax.cli import options as cli_options

SHELLS = ("bash", "zsh", "fish")
# Readers of a word that names a file. A model may also be a folder; shells complete folders on the way to a file.
FILES = (
    cli_options.existing_file,
    cli_options.ids_file,
    cli_options.model_path,
    cli_options.output_file,
    cli_options.plot_file,
    cli_options.session_file,
    cli_options.text_file,
)
FOLDERS = (cli_options.folder, cli_options.new_folder)

DESCRIPTION = """\
Print a script with which a shell completes the commands and options of ds4jax, the values of an option with few of them, and
files and folders. The script holds all options of this version; write it again after an update."""

EXAMPLES = """\
examples:
  ds4jax completion bash > ~/.local/share/bash-completion/completions/ds4jax
  ds4jax completion zsh > ~/.zfunc/_ds4jax
  ds4jax completion fish > ~/.config/fish/completions/ds4jax.fish"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "completion", help="print a script for the completion of a shell", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0."""
    import shtab

    whole = options.whole()
    for action in actions(whole):
        found = kind(action)
        if found is not None:
            # shtab reads this attribute.
            action.complete = getattr(shtab, found)  # type: ignore[attr-defined]
    print(shtab.complete(whole, options.shell))
    return 0


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All actions of a parser and of its sub-commands, except the choice of a sub-command."""
    for one in cli_options.parsers(parser):
        yield from (action for action in one._actions if not isinstance(action, argparse._SubParsersAction))


def kind(action: argparse.Action) -> str | None:
    """The name in shtab of what an action takes: FILE or DIRECTORY; None for any other word."""
    if action.type in FOLDERS or (action.type is Path and action.metavar == "DIR"):
        return "DIRECTORY"
    return "FILE" if action.type in FILES or action.type is Path else None
