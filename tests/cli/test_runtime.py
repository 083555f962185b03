"""The compilation cache: where it is, and that doing without costs nothing but time."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cuda import kernel_calls, lowered_for_cuda

from ds4jax import runtime
from pallas_kernels.experts import swiglu
from pallas_kernels.formats import BLOCK
from pallas_kernels.linear.activation import quantize


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS4JAX_CACHE", "/some/where")
    assert runtime.cache_dir() == Path("/some/where")
    monkeypatch.delenv("DS4JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert runtime.cache_dir() == Path("/cache/ds4jax/jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/someone")
    assert runtime.cache_dir() == Path("/someone/.cache/ds4jax/jax")


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("DS4JAX_CACHE", str(tmp_path / "file" / "jax"))
    runtime.configure()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ds4jax: note: nothing compiled is kept")
    assert err.count("\n") == 1
    assert jax.config.jax_compilation_cache_dir == before


def test_a_cache_that_jax_has_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("DS4JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime.configure()
    assert jax.config.jax_compilation_cache_dir == before
    assert list(tmp_path.iterdir()) == []


def new_pages(chosen: dict[str, str]) -> int:
    """What the second of two arrays of 64 MB costs in a process that is set up."""
    code = "\n".join(
        [
            "import resource",
            "from ds4jax import runtime",
            "runtime.configure()",
            "faults = []",
            "for _ in range(3):",
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt",
            "    bytes([len(faults)]) * (1 << 26)",
            "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)",
            "print(min(faults[1:]))",
        ]
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment | chosen, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_kept_unless_the_user_has_chosen() -> None:
    assert 10 * new_pages({}) < new_pages({"MALLOC_MMAP_THRESHOLD_": "131072"})


def test_memory_is_claimed_unless_the_user_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    runtime.configure()
    assert os.environ.pop(names[0]) == runtime.MEMORY_FRACTION
    for name in names:
        monkeypatch.setenv(name, "0.5")
        runtime.configure()
        assert {other: os.environ[other] for other in names if other in os.environ} == {name: "0.5"}
        monkeypatch.delenv(name)


def test_a_kernel_does_not_tell_who_called_it() -> None:
    """Its code is part of the key under which its program is kept, and the first caller may be anybody."""
    x = jax.ShapeDtypeStruct((1, 256), jnp.float32)

    def one() -> str:
        return lowered_for_cuda(jax.jit(lambda x: quantize.__wrapped__(x)), x)

    def another() -> str:
        return lowered_for_cuda(jax.jit(lambda x: quantize.__wrapped__(x)), x)

    assert one() == another()
    assert kernel_calls(one(), "q8_activation") == 1


def test_a_kernel_does_not_tell_which_was_traced_before_it() -> None:
    """What several kernels call with the same shapes is traced once, for the first of them."""
    values = jax.ShapeDtypeStruct((4, swiglu.BLOCKS_A_PROGRAM * BLOCK), jnp.float32)

    def one() -> str:
        return lowered_for_cuda(jax.jit(functools.partial(swiglu.swiglu, limit=10.0)), values, values)

    jax.clear_caches()
    alone = one()
    jax.clear_caches()
    lowered_for_cuda(jax.jit(lambda x: quantize(x)), values)
    assert one() == alone


FILLS_A_FOLDER_TWICE = """
import sys
from pathlib import Path
import jax
from ds4jax import runtime
runtime.configure()
folder = Path(sys.argv[1])

def work():
    jax.clear_caches()
    return [float(jax.jit(lambda x: x * by)(2.0)) for by in (3.0, 4.0)]

expected = work()
kept = {path: path.read_bytes() for path in folder.iterdir()}
assert len(kept) > 1
for path in kept:
    path.write_bytes(b"noise" * 100)
assert work() == expected
assert not any(path.read_bytes().startswith(b"noise") for path in folder.iterdir())
assert {path.name for path in folder.iterdir()} == {path.name for path in kept}
assert work() == expected
"""


def test_damaged_programs_are_replaced_and_told_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"DS4JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", FILLS_A_FOLDER_TWICE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"ds4jax: note: {tmp_path}: holds programs that are damaged; they are compiled again (")
    assert done.stderr.count("\n") == 1
