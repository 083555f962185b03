"""What a shell completes with the printed script, asked as bash asks it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ds4jax.bounds import DRAFTERS
from ds4jax.cli import main as cli
from ds4jax.cli.commands import completion
from ds4jax.cli.commands.completion import SHELLS


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", "bash"]) == 0
    return capsys.readouterr().out


def completed(script: str, folder: Path, *words: str) -> set[str]:
    """The words that bash offers for the last of these, by the function that the script declares for ds4jax."""
    asked = f"""
{script}
function=$(complete -p ds4jax | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=(ds4jax {shlex.join(words)})
COMP_CWORD={len(words)}
$function ds4jax {shlex.quote(words[-1])} {shlex.quote(("ds4jax", *words)[-2])}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "--norc", "-c", asked], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash(script: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "keys").touch()
    assert completed(script, tmp_path, "ge") == {"generate"}
    assert {"generate", "serve", "doctor", "completion", "bench"} <= completed(script, tmp_path, "")
    assert completed(script, tmp_path, "generate", "--max-d") == {"--max-draft"}
    assert completed(script, tmp_path, "generate", "--drafter", "") == set(DRAFTERS)
    assert completed(script, tmp_path, "generate", "--model", "mo") == {"model.gguf", "models"}
    assert completed(script, tmp_path, "serve", "mo") == {"model.gguf", "models"}
    assert completed(script, tmp_path, "serve", "--prefix-dir", "") == {"models"}
    assert completed(script, tmp_path, "generate", "--temperature", "") & {"model.gguf"} == set()
    assert completed(script, tmp_path, "bench", "dec") == {"decode"}
    assert completed(script, tmp_path, "bench", "decode", "--synth") == {"--synthetic"}


def test_every_option_with_a_file_or_folder_completes_it() -> None:
    named = re.compile(r"(FILE|DIR|PATH|MODEL|IN|OUT)(\.\w+)?")
    actions = [action for action in completion.actions(cli.build_parser()) if named.fullmatch(str(action.metavar))]
    assert len(actions) > 40
    assert [action.dest for action in actions if completion.kind(action) is None] == []


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert [word for word in ("generate", "doctor", "max-draft", "prefix-dir") if word not in script] == []


def test_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["completion", "csh"])
    assert "invalid choice: 'csh'" in capsys.readouterr().err
