"""Every bad input is told in one line on stderr, with exit code 2, before anything is computed or written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ds4jax.cli import main as cli


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the cases name, as the working directory."""
    np.save(tmp_path / "good.npy", np.arange(4, dtype=np.int32))
    np.save(tmp_path / "float.npy", np.ones(4, np.float32))
    np.save(tmp_path / "square.npy", np.ones((2, 2), np.int32))
    np.save(tmp_path / "none.npy", np.zeros(0, np.int32))
    np.save(tmp_path / "negative.npy", np.array([1, -5]))
    np.save(tmp_path / "wide.npy", np.array([1, 2**40]))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", ids=np.arange(4))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-3])
    promise = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    (tmp_path / "promise.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(promise).to_bytes(2, "little") + promise + bytes(64))
    (tmp_path / "words.npy").write_text("not an array")
    (tmp_path / "empty").touch()
    (tmp_path / "words.gguf").write_text("In the beginning")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert re.fullmatch(r"ds4jax: error: [^\n]+\n", err), err
    return err


OPTIONS = [
    ("", "COMMAND"),
    ("nonsense", "nonsense"),
    ("generate", "PROMPT"),
    ("generate text --temprature 1", "--temprature 1; did you mean --temperature?"),
    ("generate text --max-tokens 5", "--max-tokens 5; did you mean --max-new-tokens?"),
    ("serve --slot=2", "--slot=2; did you mean --slots?"),
    ("generate text --temp 1", "--temp"),
    ("generate text more", "more"),
    ("generate text --temperature nan", "--temperature"),
    ("generate text --temperature inf", "--temperature"),
    ("generate text --temperature -0.5", "--temperature"),
    ("generate text --temperature warm", "--temperature"),
    ("generate text --top-p 0", "--top-p"),
    ("generate text --top-p 1.01", "--top-p"),
    ("generate text --top-p nan", "--top-p"),
    ("generate text --min-p -0.1", "--min-p"),
    ("generate text --min-p 1.5", "--min-p"),
    ("generate text --top-k -1", "--top-k"),
    ("generate text --top-k 2.5", "--top-k"),
    ("generate text --max-new-tokens 0", "--max-new-tokens"),
    ("generate text --max-new-tokens -3", "--max-new-tokens"),
    ("generate text --max-new-tokens many", "--max-new-tokens"),
    ("generate text --max-new-tokens 99999999999", "--max-new-tokens"),
    ("generate text --seed 1.5", "--seed"),
    ("generate text --seed zero", "--seed"),
    ("generate text --seed 9223372036854775808", "--seed"),
    ("generate text --draft -1", "--draft: -1 is out of range; it must be 0 to 7"),
    ("generate text --draft 8", "--draft: 8 is out of range; it must be 0 to 7"),
    ("generate text --draft most", "--draft: 'most' is not an integer"),
    ("generate text --max-draft -1", "--max-draft: -1 is out of range"),
    ("generate text --max-draft 8", "--max-draft: 8 is out of range"),
    ("generate text --max-draft auto", "--max-draft: 'auto' is not an integer"),
    ("generate text --ids good.npy", "--ids"),
    ("generate --ids missing.npy", "missing.npy: No such file"),
    ("generate --ids folder", "folder: Is a directory"),
    ("generate --ids float.npy", "float.npy: holds float32[4]"),
    ("generate --ids square.npy", "square.npy: holds int32[2, 2]"),
    ("generate --ids none.npy", "none.npy: the prompt is empty"),
    ("generate --ids negative.npy", "negative.npy: token id -5"),
    ("generate --ids wide.npy", "wide.npy: token id 1099511627776"),
    ("generate --ids object.npy", "object.npy: not a .npy file of integers"),
    ("generate --ids archive.npz", "archive.npz: not a .npy file"),
    ("generate --ids cut.npy", "cut.npy: not a .npy file of integers"),
    ("generate --ids promise.npy", "promise.npy: not a .npy file of integers"),
    ("generate --ids words.npy", "words.npy: not a .npy file"),
    ("generate --ids empty", "empty: not a .npy file"),
    ("generate text --model missing.gguf", "missing.gguf: no such file"),
    ("logits --out out.npz", "--prompt"),
    ("logits --prompt text", "--out"),
    ("logits --prompt text --ids good.npy --out out.npz", "--ids"),
    ("logits --prompt text --out missing/out.npz", "missing/out.npz: cannot be written: No such file"),
    ("logits --prompt text --out good.npy/out.npz", "good.npy/out.npz: cannot be written: Not a directory"),
    ("logits --prompt text --out folder", "folder: exists and is not a file"),
    ("logits --prompt text --out /dev/null", "/dev/null: exists and is not a file"),
    ("logits --prompt text --decode-from -1 --out out.npz", "--decode-from"),
    ("logits --ids good.npy --decode-from 5 --out out.npz", "--decode-from is 5; the sequence has 4 tokens"),
    ("eval --text missing.txt", "missing.txt: No such file"),
    ("eval --text latin.txt", "latin.txt: not UTF-8 at byte 0"),
    ("eval --text empty", "empty: the file is empty"),
    ("eval --text folder", "folder: Is a directory"),
    ("check --max-draft 8", "--max-draft: 8 is out of range; it must be 0 to 7"),
    ("check --max-draft auto", "--max-draft: 'auto' is not an integer"),
    ("check --prompt-file missing.txt", "missing.txt: No such file"),
    ("check --prompt-file empty", "empty: the file is empty"),
    ("check --prompt-file latin.txt", "latin.txt: not UTF-8 at byte 0"),
    ("check --model missing.gguf", "missing.gguf: no such file"),
    ("check text", "text"),
    ("bench reference --max-new-tokens 0", "--max-new-tokens"),
    ("bench reference --model missing.gguf", "missing.gguf: no such file"),
    ("bench load --bytes 0", "--bytes"),
    ("bench load --bytes 1GB", "--bytes: '1GB' is not a number"),
    ("bench load --json no/such/folder/load.json", "--json"),
]


@pytest.mark.parametrize(("line", "names"), OPTIONS, ids=[line or "nothing" for line, _ in OPTIONS])
def test_options(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, names: str
) -> None:
    monkeypatch.setattr("ds4jax.cli.commands.model.open_model", lambda options, **_: pytest.fail("a model was opened"))
    before = sorted(folder.rglob("*"))
    assert names in told(capsys, line.split())
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "\udcff"], "not valid UTF-8"),
        (["generate", "text", "--two\nlines"], "--two lines"),
        (["logits", "--prompt", "", "--out", "out.npz"], "the prompt is empty"),
        (["generate", "text", "--model", ""], "--model"),
    ],
    ids=["empty prompt", "bytes that are no text", "a line break", "empty prompt to score", "empty path"],
)
def test_words_that_split_would_lose(capsys: pytest.CaptureFixture[str], arguments: list[str], names: str) -> None:
    assert names in told(capsys, arguments)


@pytest.mark.parametrize("path", ["empty", "folder", "words.gguf"])
@pytest.mark.parametrize(
    "command",
    [
        "generate text --model",
        "logits --prompt text --out out.npz --model",
        "inspect",
        "eval --model",
        "check --model",
        "bench reference --model",
    ],
)
def test_files_that_are_no_model(folder: Path, capsys: pytest.CaptureFixture[str], command: str, path: str) -> None:
    before = sorted(folder.rglob("*"))
    assert path in told(capsys, [*command.split(), path])
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "folder").chmod(0o500)
    assert "cannot be written" in told(capsys, "logits --prompt text --out folder/out.npz".split())


def test_a_wrong_option_is_told_at_once() -> None:
    call = "cli.main(['generate', 'x', '--seed', 'y'])"
    program = f"import sys; from ds4jax.cli import main as cli\ntry: {call}\nfinally: print(*sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert time.perf_counter() - began < 10
    assert done.returncode == 2
    assert done.stderr == "ds4jax: error: argument --seed: 'y' is not an integer\n"
    assert not {"jax", "flax", "tokenizers", "rich"} & set(done.stdout.split())


def in_an_ascii_locale(*arguments: bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """`ds4jax`, with a `generate` that only says what it was given and what the first line of stdin is."""
    program = """if True:
        import sys
        from ds4jax.cli import main as cli
        from ds4jax.cli.commands import generate
        generate.run = lambda options: print(options.prompt, options.stop[0], sys.stdin.readline()) or 0
        sys.exit(cli.main(sys.argv[1:]))
    """
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, "generate", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, env=os.environ | locale)


def test_texts_are_utf_8_where_the_locale_knows_ascii_alone() -> None:
    done = in_an_ascii_locale("é日".encode(), b"--stop", "ß".encode(), stdin="ç\n".encode())
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "é日 ß ç\n\n", b"")
    done = in_an_ascii_locale(b"\xff")
    assert (done.returncode, done.stderr) == (2, b"ds4jax: error: argument PROMPT: the prompt is not valid UTF-8\n")
