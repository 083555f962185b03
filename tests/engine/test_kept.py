"""Programs on disk: what is loaded is what was compiled, and nothing else is ever loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf_files import write_small
from kept_programs import KEY, compilations, filled, kept_in, lowered, results

from ds4jax import runtime
from ds4jax.engine import kept, program_key


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of programs."""
    with kept_in(tmp_path, monkeypatch) as made:
        yield made


def test_a_loaded_program_has_the_bits_of_the_compiled_one() -> None:
    name, expected = filled()
    found = []
    assert compilations(lambda: found.append(kept.load(name))) == 0
    for ours, theirs in zip(results(found[0]), expected, strict=True):
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_the_same_program_by_another_name_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a change of the source that does not concern it."""
    name, expected = filled()
    monkeypatch.setattr(program_key, "_source", lambda: "another source")
    other, found = kept.name_of(KEY), []
    assert other not in (None, name)
    assert kept.load(other) is None
    program = lowered()
    assert compilations(lambda: found.append(kept.compiled(other, program))) == 0
    executable, loaded = found[0]
    assert loaded
    assert results(executable)[0].tobytes() == expected[0].tobytes()
    assert kept.load(other) is not None


def test_another_program_by_another_name_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = filled()
    executable, loaded = kept.compiled(kept.name_of(("another",)), lowered(0.25))
    assert not loaded
    assert results(executable)[0].tobytes() != expected[0].tobytes()


@pytest.mark.parametrize("which", [kept.LINK, kept.CODE])
@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw[:60], lambda raw: raw[:-1] + b"x"])
def test_a_damaged_file_is_made_again(
    folder: Path, which: str, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    name, expected = filled()
    (path,) = (path for path in folder.iterdir() if path.read_bytes().splitlines()[1].startswith(which.encode()))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert kept.load(name) is None
    assert not path.exists()
    note = capsys.readouterr().err
    assert note.startswith(f"ds4jax: note: {folder}: holds programs that are damaged; they are compiled again (")
    assert note.count("\n") == 1
    executable, _ = kept.compiled(name, lowered())
    assert results(executable)[0].tobytes() == expected[0].tobytes()
    assert kept.load(name) is not None
    assert path.exists()


def test_a_program_that_xla_does_not_take_is_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The digest is right, and the contents are not."""
    name, _ = filled()
    (code,) = (path.name for path in folder.iterdir() if b"code" in path.read_bytes()[:30])
    kept._write(code, kept.CODE, b"not a program")
    assert kept.load(name) is None
    assert "they are compiled again" in capsys.readouterr().err
    assert not kept.compiled(name, lowered())[1]
    assert kept.load(name) is not None


def test_a_file_of_another_name_is_not_loaded(folder: Path) -> None:
    name, _ = filled()
    other = kept.name_of(("another",))
    (folder / str(other)).write_bytes((folder / name).read_bytes())
    assert kept.load(other) is None


def test_what_others_could_have_written_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    name, _ = filled()
    for path, mode in [(path, mode) for path in (folder, *folder.iterdir()) for mode in (0o770, 0o707)]:
        before = path.stat().st_mode
        path.chmod(mode)
        assert kept.load(name) is None
        path.chmod(before)
        assert kept.load(name) is not None
    moved = tmp_path / "moved"
    (folder / name).rename(moved)
    (folder / name).symlink_to(moved)
    assert kept.load(name) is None
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (folder / name).unlink()
    moved.rename(folder / name)
    assert kept.load(name) is None


def test_a_file_of_another_user_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = filled()
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert kept.load(name) is None


KILLED = """
import os, signal, sys
from pathlib import Path
import jax
from ds4jax.engine import kept
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
kept._write(sys.argv[2], kept.CODE, b"something" * 1000)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_no_program(folder: Path) -> None:
    name = kept.name_of(KEY)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder.parent), str(name)])
    assert done.returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.name.endswith(".unfinished")
    filled()
    assert kept.load(name) is not None


def test_the_folder_does_not_grow_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [kept.name_of((number,)) for number in range(3)]
    for number, name in enumerate(names):
        kept.compiled(name, lowered(float(number)))
        for path in folder.iterdir():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**12))
    assert kept.load(names[0]) is not None
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(kept, "MAX_BYTES", size)
    kept.compiled(kept.name_of(("new",)), lowered(7.0))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= size
    assert kept.load(names[1]) is None
    assert kept.load(names[0]) is not None, "it was used last"


@dataclasses.dataclass(frozen=True)
class OfSomebody:
    """A drafter from outside the package: nobody knows when its code changes."""


def test_what_is_unknown_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept.name_of((*KEY, OfSomebody())) is None
    assert kept.name_of(([1],)) is None
    assert kept.load(None) is None
    executable, loaded = kept.compiled(None, lowered())
    assert (len(results(executable)), loaded) == (2, False)


def test_a_source_newer_than_the_process_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for package in program_key.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "old.py").touch()
        os.utime(tmp_path / package / "old.py", (0, 0))
    monkeypatch.setattr(program_key, "ROOT", tmp_path)
    source = program_key._source.__wrapped__
    before = source()
    (tmp_path / "ds4jax" / "old.py").write_text("pass")
    with pytest.raises(program_key.NotAFactError, match="newer than this process"):
        source()
    os.utime(tmp_path / "ds4jax" / "old.py", (0, 0))
    assert source() != before


def test_each_fact_is_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [kept.name_of(key) for key in (KEY, (*KEY, 1), (*KEY, True), (*KEY, 1.0), (*KEY, "1"), (*KEY, (1,)))]
    monkeypatch.setenv("DS4JAX_CACHE", "/another/folder")
    assert kept.name_of(KEY) == names[0]
    for variable, value in (("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"), ("DS4JAX_NO_SHARE_WARP", "1")):
        monkeypatch.setenv(variable, value)
        names.append(kept.name_of(KEY))
    with jax.default_matmul_precision("float32"):
        names.append(kept.name_of(KEY))
    precision = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "bfloat16")
    try:
        names.append(kept.name_of(KEY))
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    for index, value in enumerate(program_key._machine()):
        changed = [*program_key._machine()]
        changed[index] = f"{value} and more"
        with monkeypatch.context() as patch:
            patch.setattr(program_key, "_machine", lambda changed=changed: changed)
            names.append(kept.name_of(KEY))
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[0-9a-f]{64}", str(name)) for name in names)


def test_where_no_program_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept.refusal() is None
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "process_of_a_command", False)
        assert kept.refusal().startswith("functions that programs are made of may have been replaced")
        assert kept.name_of(KEY) is None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert kept.refusal() is None
        patch.setattr(jax, "default_backend", lambda: "tpu")
        assert kept.refusal() == "programs for tpu were never loaded"
        assert kept.name_of(KEY) is None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 2)
        assert kept.refusal() == "there are several devices"
    for elsewhere in (None, "gs://bucket/cache"):
        jax.config.update("jax_compilation_cache_dir", elsewhere)
        assert kept.refusal() == "JAX has no local cache folder"


STARTS = """
import collections, json, sys
import jax
from ds4jax.cli.main import main

events = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.update([event.rsplit("/")[-1]]))
code = main()
print(json.dumps(events), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.long
def test_a_warm_process_traces_no_program(tmp_path: Path) -> None:
    """Nor does one without the files trace another one's, and all of them say the same."""
    model, programs = tmp_path / "small.gguf", tmp_path / "kept" / "programs"
    write_small(model)
    line = ["--model", model, "In the beginning", "--max-new-tokens", "20", "--ignore-eos", "--chunk", "32", "--json"]

    def start() -> tuple[dict[str, Any], dict[str, int]]:
        environment = os.environ | {"DS4JAX_CACHE": str(tmp_path / "kept")}
        command = [sys.executable, "-c", STARTS, "generate", *map(str, line)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        return {name: told[name] for name in ("tokens", "fingerprint")}, json.loads(done.stderr.splitlines()[-1])

    first, events = start()
    assert events["backend_compile_duration"] >= 3
    second, events = start()
    assert second == first
    assert not {"backend_compile_duration", "jaxpr_to_mlir_module_duration"} & events.keys(), events
    # The shapes of the state, by which the chunk of a prompt is chosen.
    assert events.get("jaxpr_trace_duration", 0) <= 1
    for path in programs.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    third, events = start()
    assert third == first
    assert events["backend_compile_duration"] >= 3
