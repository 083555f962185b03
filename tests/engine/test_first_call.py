"""A loaded program that cannot be called is compiled, in one line, and its file goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kept_programs import KEY, compilations, filled, kept_in, lowered, results

from ds4jax.engine import compile, kept


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of programs."""
    with kept_in(tmp_path, monkeypatch) as made:
        yield made


def unusable(message: str, *, takes: bool = False, late: bool = False) -> Callable[..., Any]:
    """A program whose calls fail: after they took their first argument's buffer, or when somebody waits for the results."""

    class Late:
        def block_until_ready(self) -> None:
            raise RuntimeError(message)

    def call(x: jax.Array, _: Any) -> Any:
        if takes:
            x.delete()
        if late:
            return Late()
        raise RuntimeError(message)

    return call


def begun(monkeypatch: pytest.MonkeyPatch, program: Callable[..., Any]) -> Any:
    """The executable of `KEY` in a process that finds this program in its file."""
    filled()
    compile.forget()
    with monkeypatch.context() as patch:
        patch.setattr(kept, "deserialize_and_load", lambda *_, **__: program)
        executable = compile.begin(KEY, lowered).result()
    compile.forget()
    return executable


@pytest.mark.parametrize("late", [False, True])
def test_a_loaded_program_that_cannot_be_called_is_compiled(
    late: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors of a GPU may come late."""
    executable = begun(monkeypatch, unusable("NOT_FOUND: a\nfunction", late=late))
    assert capsys.readouterr().err == ""
    if late:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    expected = results(lowered().compile())
    found: list[list[np.ndarray]] = []
    assert compilations(lambda: found.append(results(executable))) == 1
    note = capsys.readouterr().err
    assert "they are compiled again (RuntimeError: NOT_FOUND: a function)" in note
    assert note.count("\n") == 1
    assert compilations(lambda: found.append(results(executable))) == 0
    assert [one[0].tobytes() for one in found] == [expected[0].tobytes()] * 2
    assert capsys.readouterr().err == ""


def test_a_loaded_program_that_fails_and_takes_its_buffers_is_not_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    executable = begun(monkeypatch, unusable("INTERNAL", takes=True))
    with pytest.raises(RuntimeError, match="INTERNAL"):
        results(executable)
    assert kept.load(kept.name_of(KEY)) is None
    # Nor is it kept again: XLA might write the same file.
    assert not kept.compiled(kept.name_of(KEY), lowered())[1]
    assert kept.load(kept.name_of(KEY)) is None


def test_a_loaded_program_stays_where_memory_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    executable = begun(monkeypatch, unusable("RESOURCE_EXHAUSTED: out of memory"))
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        results(executable)
    assert kept.load(kept.name_of(KEY)) is not None


def test_a_loaded_program_has_the_attributes_of_a_compiled_one() -> None:
    filled()
    compile.forget()
    executable = compile.begin(KEY, lowered).result()
    compile.forget()
    assert executable.out_tree == lowered().out_tree
    assert executable.memory_analysis().argument_size_in_bytes == 2400
