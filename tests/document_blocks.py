"""Code blocks of the README and the documentation: what they need, how they run, and what they have to print.

A block's first line may be `# needs: SOMETHING`. What CI does not have is in `ELSEWHERE`; such blocks are counted and not run.
Blocks that need a server, or start one, run against one server of the tiny model. All others run: Python blocks of a page in
one namespace, commands of console blocks in the page's folder. `...` in an output stands for any text, `# numbers vary` for
other numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds4jax.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVER = "a server"
ELSEWHERE = ("a GPU", "weights", "minutes", "a checkout", "a look at your own machine")
VARY = "# numbers vary"
ADDRESS = "http://127.0.0.1:8000"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PIP = re.compile(r'^pip install (?:-e )?(?:\.|"\.\[([\w,]+)\]"|"?ds4jax(?:\[([\w,]+)\])?"?)(?: && |$)')


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        kind: the word after the fence.
        text: its lines, without those that say what it needs.
        needs: what it needs; "" if CI has all of it.
        vary: whether numbers of its output vary.
        wanted: for Python, the block of kind `text` right below; None without one.
    """

    kind: str
    text: str
    needs: str = ""
    vary: bool = False
    wanted: str | None = None


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order; an output is part of the Python block above it."""
    text = (ROOT / page).read_text()
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(text):
        kind, body = fence[1], fence[2]
        if kind == "text" and found and found[-1].kind == "python" and not text[end : fence.start()].strip():
            found[-1] = dataclasses.replace(found[-1], wanted=body)
        else:
            needs, vary = "", False
            while body.startswith(("# needs: ", VARY)):
                line, _, body = body.partition("\n")
                needs, vary = (needs, True) if line == VARY else (line.removeprefix("# needs: "), vary)
            if "$ ds4jax serve" in body or "&& ds4jax serve" in body:
                needs = needs or SERVER
            found.append(Block(kind, body, needs, vary))
        end = fence.end()
    return found


def commands(block: Block) -> Iterator[tuple[str, str | None]]:
    """Each command of a console block with the output below it; None if the block shows none."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        first, _, rest = part.partition("\n")
        lines = rest.splitlines()
        while lines and lines[0].startswith("> "):
            first += "\n" + lines.pop(0).removeprefix("> ")
        yield first, "\n".join(lines) if any(lines) else None


def installed(command: str) -> str:
    """The rest of a command behind `pip install` of this package, whose extras must exist."""
    found = PIP.match(command)
    if not found:
        return command
    extras = [extra for group in found.groups() if group for extra in group.split(",")]
    assert set(extras) <= set(EXTRAS), f"{command}: no such extra"
    return command[found.end() :]


def printed(command: str, folder: Path) -> str:
    """Run a command in a folder and return its stdout; `ds4jax` alone runs in this process, anything else in a shell."""
    command = re.sub(r"\s{2,}# .*$", "", command)
    if command.startswith("ds4jax ") and not re.search(r"[|>&;]", command):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.chdir(folder):
            assert cli.main(shlex.split(command)[1:]) == 0, command
        return out.getvalue()
    ours = f'ds4jax() {{ "{sys.executable}" -m ds4jax "$@"; }}\n'
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        ["bash", "-euc", ours + command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def agree(wanted: str, got: str, *, vary: bool) -> bool:
    """Whether an output is the shown one, but for spaces at line ends, what `...` stands for, and numbers that vary."""
    wanted, got = (("\n".join(line.rstrip() for line in text.strip("\n").splitlines())) for text in (wanted, got))
    if vary:
        wanted, got = (re.sub(r"[ ]+", " ", re.sub(r"\d[\d.,]*", "N", text)) for text in (wanted, got))
    return doctest.OutputChecker().check_output(wanted + "\n", got + "\n", doctest.ELLIPSIS)


def run_python(block: Block, names: dict[str, Any], folder: Path) -> str:
    """Run a Python block in the namespace of its page and return what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(folder):
        exec(compile(block.text, "block", "exec"), names)
    return out.getvalue()


def differences(page: str, folder: Path, *, server: str | None = None) -> list[str]:
    """Run the blocks of a page: those for a server if one is given, else the others. Returns outputs that are not as shown."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for block in blocks(page):
        if block.needs != (SERVER if server else "") or block.kind not in ("python", "console"):
            continue
        if server:
            block = dataclasses.replace(block, text=block.text.replace(ADDRESS, server))
        if block.kind == "python":
            got = run_python(block, names, folder)
            if block.wanted is not None and not agree(block.wanted, got, vary=block.vary):
                found.append(f"{page}:\n{block.text}\nprints\n{got}")
            continue
        for command, wanted in commands(block):
            rest = installed(command)
            if not rest or rest.startswith("ds4jax serve"):
                continue
            got = printed(rest, folder)
            if wanted is not None and not agree(wanted, got, vary=block.vary):
                found.append(f"{page}: $ {command}\nprints\n{got}")
    return found
