"""`ds4jax convert` as its users meet it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from hub_files import write_raw
from numerics import GOLDEN

from ds4jax.cli import main as cli
from ds4jax.cli import progress
from ds4jax.loading.convert import convert
from ds4jax.random_models.hub import write_hub
from ds4jax.text.tokenizer import BOS, BYTE_OF, EOS, build_bpe

HUB = GOLDEN / "hub"
SHARD = "model-00001-of-00003.safetensors"


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a command that refuses its input."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint without loss as a GGUF file, its MTP block beside it."""
    out = tmp_path_factory.mktemp("exact") / "exact.gguf"
    convert(HUB, out, dense="bf16")
    return out


def test_converts_and_refuses_to_replace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, same = tmp_path / "golden.gguf", tmp_path / "same.gguf"
    assert cli.main(["convert", str(HUB), str(out), "--dense", "bf16"]) == 0
    mtp = tmp_path / "mtp-golden.gguf"
    lines = [f"{out}: 178 tensors, {out.stat().st_size / 1e6:,.1f} MB", f"{mtp}: 34 tensors, {mtp.stat().st_size / 1e6:,.1f} MB"]
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in lines))
    convert(HUB, same, dense="bf16")
    assert out.read_bytes() == same.read_bytes()
    assert "exists already; give --force to replace it" in error(capsys, "convert", HUB, out)
    assert out.read_bytes() == same.read_bytes()
    assert cli.main(["convert", str(HUB), str(out), "--force"]) == 0
    assert out.stat().st_size < same.stat().st_size
    capsys.readouterr()
    assert cli.main(["inspect", str(out), "--json"]) == 0
    assert '"MXFP4": {"count": 21' in capsys.readouterr().out


def test_tells_what_the_file_leaves_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hub, out = Path(shutil.copytree(HUB, tmp_path / "hub")), tmp_path / "golden.gguf"
    shard, index = "extra.safetensors", hub / "model.safetensors.index.json"
    write_raw(hub / shard, {"strange.weight": ("F32", [1], bytes(4))})
    places = json.loads(index.read_text())
    index.write_text(json.dumps(places | {"weight_map": places["weight_map"] | {"strange.weight": shard}}))
    assert cli.main(["convert", str(hub), str(out)]) == 0
    first, last, _ = capsys.readouterr().err.splitlines()
    assert first == f"ds4jax: {hub}: 1 tensor is not used, strange.weight"
    assert last.startswith(f"{out}: 178 tensors")


def test_ctrl_c_and_what_is_left(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "golden.gguf", tmp_path / "whole.gguf"
    convert(HUB, whole)

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(progress, "stages_bar", lambda _: contextlib.nullcontext(stop))
        assert cli.main(["convert", str(HUB), str(out)]) == cli.INTERRUPTED
    assert capsys.readouterr() == ("", f"ds4jax: {out}: interrupted; the same command goes on from here\n")
    assert not out.exists()
    for arguments in (["inspect", f"{out}.partial"], ["generate", "a", "--model", f"{out}.partial"]):
        message = error(capsys, *arguments)
        assert f"{out}.partial: an unfinished conversion, not a model; the same `ds4jax convert` again" in message
    assert "began from other files or with other options" in error(capsys, "convert", HUB, out, "--dense", "f32")
    assert cli.main(["convert", str(HUB), str(out)]) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """As soon as something is there, the command is killed; what it has reached by then is chance."""
    out = tmp_path / "golden.gguf"
    partial = tmp_path / "golden.gguf.partial"
    line = [sys.executable, "-m", "ds4jax", "convert", str(HUB), str(out)]
    running = subprocess.Popen(line, stderr=subprocess.PIPE)
    while not partial.exists() and running.poll() is None:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    # It may have been quicker than the signal.
    assert out.exists() != partial.exists()
    if not out.exists():
        subprocess.run(line, check=True, capture_output=True)
    convert(HUB, tmp_path / "whole.gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none", "out.gguf"], "none: no such file or directory"),
        (["hub", "none/out.gguf"], "none/out.gguf: cannot be written"),
        (["hub", "hub"], "hub: exists and is not a file"),
        (["hub", "out.gguf", "--dense", "f16"], "argument --dense: invalid choice: 'f16'"),
        (["hub", "out.gguf", "--requantise", "q8_0"], "requantise: it is for a GGUF file"),
        (["hub", "out.gguf", "--flavour", "vanilla"], "argument --flavour: invalid choice: 'vanilla'"),
        (["hub", "out.gguf", "--mtp-file", "empty"], "empty: drafter file: it goes with a GGUF model"),
        (["empty", "out.gguf", "--dense", "bf16"], "dense: it is for a checkpoint directory"),
        (["empty", "out.gguf"], "empty: the file is empty"),
    ],
)
def test_refuses(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "hub").symlink_to(HUB)
    assert says in error(capsys, "convert", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "hub"]


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json", "link.gguf", "hard.gguf"])
def test_never_writes_over_the_checkpoint(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hub = Path(shutil.copytree(HUB, tmp_path / "hub"))
    (hub / "link.gguf").symlink_to(SHARD)
    os.link(hub / SHARD, hub / "hard.gguf")
    before = {path.name: path.read_bytes() for path in hub.iterdir()}
    says = error(capsys, "convert", hub, hub / name, "--force")
    assert f"is {name if name in before and 'gguf' not in name else SHARD} of the checkpoint that is being converted" in says
    assert {path.name: path.read_bytes() for path in hub.iterdir()} == before


@pytest.mark.parametrize("kind", ["partial", "partial.journal"])
def test_something_else_where_the_unfinished_file_goes(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A link to a shard would be written through, a folder cannot be written at all."""
    hub = Path(shutil.copytree(HUB, tmp_path / "hub"))
    way = tmp_path / f"out.gguf.{kind}"
    way.mkdir()
    assert f"{way}: the conversion writes here, and something else" in error(capsys, "convert", hub, tmp_path / "out.gguf")
    way.rmdir()
    way.symlink_to(hub / SHARD)
    before = (hub / SHARD).read_bytes()
    assert f"{way}: is {SHARD} of the checkpoint" in error(capsys, "convert", hub, tmp_path / "out.gguf")
    assert (hub / SHARD).read_bytes() == before


def test_a_vocabulary_without_merges(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hub = Path(shutil.copytree(HUB, tmp_path / "hub"))
    build_bpe([BOS, EOS, *BYTE_OF], [], [BOS, EOS]).save(str(hub / "tokenizer.json"))
    assert "tokenizer.json: model.merges: none, and GGUF files hold no empty list" in error(
        capsys, "convert", hub, tmp_path / "out.gguf"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_no_room(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert f"{tmp_path}: free space: the conversion needs " in error(capsys, "convert", HUB, tmp_path / "out.gguf")


LIMITED = """
import resource, sys
from ds4jax.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
sys.exit(main.main(["convert", *sys.argv[1:]]))
"""


def test_writing_fails_midway(tmp_path: Path) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    partial = f"{out}.partial"
    ended = subprocess.run([sys.executable, "-c", LIMITED, str(HUB), str(out)], capture_output=True, text=True)
    begins = f"ds4jax: error: {partial}: cannot be written: File too large; "
    assert ended.stderr == f"{begins}when that is mended, the same command goes on from here\n"
    assert (ended.returncode, ended.stdout) == (2, "")
    assert 1_000_000 < os.path.getsize(partial) <= 2_000_000
    checked: list[int] = []
    convert(HUB, out, progress=lambda stage, done, total: checked.append(done) if stage == "checking" else None)
    assert checked[-1] > 1_000_000
    convert(HUB, whole)
    assert out.read_bytes() == whole.read_bytes()


def test_no_empty_folder_is_left(
    exact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    assert "none/folder: cannot be written: No such file" in error(
        capsys, "convert", exact, tmp_path / "none" / "folder", "--flavour", "hub"
    )

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        says = error(capsys, "convert", exact, folder, "--flavour", "hub")
    assert f"{folder / 'model.safetensors.partial'}: cannot be written: No space left on device; " in says
    assert not folder.exists()


def test_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert cli.main(["convert", str(HUB), str(tmp_path / "out.gguf")]) == 0
    shown = screen.getvalue()
    assert "converting" in shown
    assert shown.endswith(" MB\n")


def test_the_drafter_of_an_earlier_model_does_not_stay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It would draft for the new model, whose shapes are the same."""
    out, hub = tmp_path / "a.gguf", tmp_path / "hub"
    old = [out.with_name(f"{prefix}-a.gguf") for prefix in ("mtp", "dspark")]
    write_hub(hub, drafter="none")
    for path in old:
        path.write_bytes(b"old")
    assert error(capsys, "convert", hub, out) == (
        f"ds4jax: error: {old[0]}: would be read with a.gguf; move it away, or give --force to remove it\n"
    )
    assert all(path.exists() for path in old)
    assert cli.main(["convert", str(hub), str(out), "--force"]) == 0
    assert sorted(tmp_path.iterdir()) == [out, hub]
    removed = "; ".join(f"removed {path}, which would be read with the new files" for path in old)
    assert capsys.readouterr().err.splitlines()[0] == f"ds4jax: {hub}: {removed}"


def test_one_of_two_mtp_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, out = tmp_path / "source.gguf", tmp_path / "new" / "out.gguf"
    out.parent.mkdir()
    convert(HUB, source, dense="bf16")
    one = (tmp_path / "mtp-source.gguf").rename(tmp_path / "mtp-one.gguf")
    two = str(shutil.copy(one, tmp_path / "mtp-two.gguf"))
    for more in ([], ["--flavour", "antirez"]):
        says = error(capsys, "convert", source, out, *more)
        assert "mtp-one.gguf and mtp-two.gguf both lie beside it; say which one to use by --drafter-file" in says
    assert cli.main(["convert", str(source), str(out), "--flavour", "antirez", "--drafter-file", two]) == 0
    assert "the MTP block is taken from mtp-two.gguf" in capsys.readouterr().err
    # The file that is named is protected, too, wherever it lies.
    elsewhere = Path(two).rename(out.with_name("mtp-elsewhere.gguf"))
    says = error(capsys, "convert", source, elsewhere, "--drafter-file", elsewhere, "--force")
    assert f"{elsewhere}: is mtp-elsewhere.gguf of the checkpoint that is being converted" in says


def test_shards_and_flavours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, antirez, q8 = (tmp_path / name for name in ("first.gguf", "antirez.gguf", "q8.gguf"))
    convert(HUB, first, dense="bf16")
    assert cli.main(["convert", str(first), str(antirez), "--flavour", "antirez"]) == 0
    told, written = capsys.readouterr().err.splitlines()
    assert told == f"ds4jax: {first}: the MTP block is taken from mtp-first.gguf"
    assert written.startswith(f"{antirez}: 210 tensors, ")
    assert cli.main(["convert", str(antirez), str(q8), "--requantise", "q8_0"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(q8), "--json"]) == 0
    metadata = json.loads(capsys.readouterr().out)["metadata"]
    said = metadata["ds4jax.requantised"]
    assert said.startswith("Q8_0: ")
    assert said.endswith(" from BF16")
    assert metadata["ds4jax.converted_flavour"] == "antirez from mainline"
