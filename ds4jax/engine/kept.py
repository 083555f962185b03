"""Compiled programs on disk, found by facts alone: the next process neither traces nor lowers them.

A program has two names, see `ds4jax.engine.program_key`. A file of the name by facts is a link to a file of the name by content,
which holds the machine code. So a change of the source that leaves a program as it is costs one trace, and no compilation.

JAX's own persistent cache needs the lowered program, so it cannot save the trace. It does not hold a CPU's programs: XLA cannot
serialise one that it has read from a file. The copy loads, and its first call fails, because functions are missing (jax 0.10.2).
It does hold a GPU's: one that cannot be loaded by its name is found there as without this module.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import pickle
import stat
import sys
import zlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import jax
from jax._src import config as jax_settings
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from ds4jax import runtime
from ds4jax.engine.program_key import by_content, by_facts
from ds4jax.files import temporary_name

# As `jax.default_backend` names them.
PLATFORMS = ("cpu", "gpu")
FORMAT = "ds4jax program 1"
LINK, CODE = "link", "code"
# Body of a link that leads nowhere, see `refuse`.
REFUSED = b""
DIGEST_BYTES = 32
# The folder may take this much; the files that were not used for the longest time go first. A program of V4-Flash takes 7 to
# 25 MB on an H200, and `ds4jax warmup` for a long context makes some fifty.
MAX_BYTES = 1 << 32
# How much zlib compresses, by platform. XLA has compressed a GPU's program already.
LEVELS = {"cpu": 1, "gpu": 0}
# With an option of its own, a program has another name in JAX's cache than the same function under `jax.jit`. The value is XLA's
# default, so it changes no code.
_APART: dict[str, str | bool] = {"xla_embed_ir_in_executable": False}


def refusal() -> str | None:
    """Why this process keeps no programs; None if it does."""
    if not runtime.process_of_a_command:
        return "functions that programs are made of may have been replaced in this process, which no fact tells of"
    root = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not root or "://" in root or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return "JAX has no local cache folder"
    if jax.default_backend() not in PLATFORMS:
        return f"programs for {jax.default_backend()} were never loaded"
    return "there are several devices" if jax.device_count() > 1 else None


def folder() -> Path:
    """Where programs are kept: in the folder of JAX's cache."""
    return Path(jax.config.jax_compilation_cache_dir) / "programs"  # type: ignore[attr-defined]


def name_of(key: Hashable) -> str | None:
    """The program's name by facts; None if it is not kept, see `refusal` and `program_key.by_facts`."""
    return None if refusal() else by_facts(key)


def load(name: str | None) -> Any:
    """The program of a name by facts, without tracing; None if there is none, or its file is damaged."""
    content = _read(name, LINK) if name else None
    return _loaded(content.decode()) if content else None


def compiled(name: str | None, lowered: jax.stages.Lowered) -> tuple[Any, bool]:
    """Compile a lowered program, or load it if it was compiled before, and keep it by its name.

    Returns:
        The executable, and whether it was loaded.
    """
    if name is None or _read(name, LINK) == REFUSED:
        return lowered.compile(), False
    content = by_content(lowered)
    executable = _loaded(content)
    loaded = executable is not None
    if executable is None:
        executable = _made(lowered)
        if not _keep(content, executable):
            return executable, False
    _write(name, LINK, content.encode())
    _remove_oldest()
    return executable, loaded


def _made(lowered: jax.stages.Lowered) -> Any:
    """The program, compiled; on a GPU by way of JAX's cache."""
    if jax.default_backend() != "cpu":
        return lowered.compile()
    # JAX's cache takes no program that compiles in less time than this.
    with jax_settings.persistent_cache_min_compile_time_secs(float("inf")):
        return lowered.compile(_APART)


def _keep(content: str, executable: Any) -> bool:
    """Keep a program by its content. False if it has something that cannot be serialised, such as large constants."""
    try:
        body = pickle.dumps(serialize(executable))
    except Exception:
        # As in `_loaded`. Every process then traces this program.
        return False
    _write(content, CODE, zlib.compress(body, LEVELS[jax.default_backend()]))
    return True


def _loaded(content: str) -> Any:
    """The program of a name by content; None if there is none that can be used."""
    body = _read(content, CODE)
    if body is None:
        return None
    try:
        _find_tools()
        code, arguments, results = pickle.loads(zlib.decompress(body))
        return deserialize_and_load(code, arguments, results, execution_devices=jax.devices())
    except Exception as error:
        # Pickle and XLA raise errors of many kinds. Whatever it is, the program is compiled again.
        _damaged(content, f"{type(error).__name__}: {error}")
        return None


@functools.cache
def _find_tools() -> None:
    """Let a GPU's program that was not traced here find what its Mosaic kernels are assembled with.

    That happens when it is loaded or first called, by environment variables that the import sets and a trace would have set.
    """
    if jax.default_backend() == "gpu":
        with contextlib.suppress(ImportError):
            importlib.import_module("jax.experimental.mosaic.gpu")


def refuse(name: str, reason: str) -> None:
    """Load no program by this name by facts any more, nor keep one: what was loaded by it cannot be called. Said in one line."""
    content = _read(name, LINK)
    if content:
        _damaged(content.decode(), reason)
    _write(name, LINK, REFUSED)


def _head(name: str, kind: str) -> bytes:
    """What a file begins with; then the digest of the body, then the body."""
    return f"{FORMAT}\n{kind} {name}\n".encode()


def _read(name: str, kind: str) -> bytes | None:
    """The checked body of a file; None if there is none, it is damaged, or another user could have written it."""
    path, head = folder() / name, _head(name, kind)
    try:
        if _is_foreign(os.lstat(path.parent)):
            return None
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or _is_foreign(status):
                return None
            with contextlib.suppress(OSError):
                os.utime(file.fileno())
            found = file.read()
    except OSError:
        return None
    expected, body = found[len(head) :][:DIGEST_BYTES], found[len(head) + DIGEST_BYTES :]
    if not found.startswith(head) or hashlib.sha256(body).digest() != expected:
        _damaged(name, "a digest differs")
        return None
    return body


def _is_foreign(status: os.stat_result) -> bool:
    """Whether another user could have written a file or folder. Loading a pickle runs what its writer wants."""
    return status.st_uid != os.geteuid() or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _write(name: str, kind: str, body: bytes) -> None:
    """Write a complete file or none. If that fails, the next process compiles again."""
    path = folder() / name
    made = temporary_name(path)
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(_head(name, kind) + hashlib.sha256(body).digest() + body)
            made.replace(path)
        except OSError:
            made.unlink()


def _damaged(name: str, reason: str) -> None:
    """Remove a file that cannot be used. The first one of a process is reported in one line."""
    with contextlib.suppress(OSError):
        (folder() / name).unlink()
    if not _reported:
        _reported.append(name)
        reason = " ".join(reason.split())[:100]
        print(f"ds4jax: note: {folder()}: holds programs that are damaged; they are compiled again ({reason})", file=sys.stderr)


_reported: list[str] = []


def _remove_oldest() -> None:
    """Remove files until the others take at most `MAX_BYTES`."""
    with contextlib.suppress(OSError):
        files = sorted(((path, path.stat()) for path in folder().iterdir()), key=lambda file: file[1].st_mtime)
        total = sum(status.st_size for _, status in files)
        for path, status in files:
            if total <= MAX_BYTES:
                return
            path.unlink()
            total -= status.st_size
