"""Process set-up before the first computation: memory, and the cache of compiled programs."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import glob
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

MEMORY_FRACTION = "0.9"
YOUNG_OBJECTS = 20_000
# Bytes of freed memory that a process keeps. Programs of small models work in less.
KEPT_BYTES = 1 << 29
# glibc's numbers of the two bounds in `mallopt`.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Whether the process runs one command and nothing else, so that nobody has replaced a function of the package in it.
process_of_a_command = False
# Warnings of JAX about programs that it cannot read or write, and the notes printed instead.
_WARNING = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL)
_NOTES = {"reading": "holds programs that are damaged; they are compiled again", "writing": "programs cannot be kept"}


def cache_dir() -> Path:
    """Folder of compiled programs: `DS4JAX_CACHE`, else ds4jax/jax in the user's cache folder. It may be deleted any time."""
    chosen = os.environ.get("DS4JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ds4jax" / "jax"


def programs_folder() -> str | Path:
    """The folder that compiled programs are kept in: JAX's own, unless `DS4JAX_CACHE` names another. JAX's may be a URL."""
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return kept if kept and not os.environ.get("DS4JAX_CACHE") else cache_dir()


def require_writable(folder: Path) -> None:
    """Create a folder unless it exists, and write to it. Permissions do not show a read-only file system, and root has all.

    Raises:
        OSError: the folder cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def configure() -> None:
    """Set up memory and compilation before the first computation. Environment variables of the user take precedence.

    XLA flags stay at their defaults. With while loops and branches in CUDA graphs
    (`--xla_gpu_enable_command_buffer=..,WHILE,CONDITIONAL`) a step took 3 % longer on an H200, and no kernel here depends on
    XLA's choice of algorithms.
    """
    _claim_memory()
    _keep_freed_memory()
    _collect_less()
    _keep_programs()
    _forget_callers()


def _claim_memory() -> None:
    """Let JAX use nine tenths of a GPU's memory instead of three quarters.

    The 2-bit model takes 94 GB of an H200's 141 GB. The rest must hold the cache and the temporary arrays of a prompt. The last
    tenth is for CUDA itself and for the contexts of other processes.
    """
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = MEMORY_FRACTION


def _keep_freed_memory() -> None:
    """Let the process keep memory that a program has freed, for the next one.

    On a CPU every call of a program allocates its temporary arrays. By default glibc gives them back to the system at the end,
    and the system clears every page again at the next call: up to a third of the time of a decode step. Does nothing where the
    user has chosen bounds, or with another C library.

    Source: glibc manual, "Malloc Tunable Parameters".
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def _collect_less() -> None:
    """Run Python's garbage collector less often: it visits all objects of a trace, and most of them stay alive.

    Saves a fifth of the time of tracing and lowering, and costs almost no memory. At its end the interpreter would visit all
    objects again, several times.
    """
    if gc.get_threshold()[0] < YOUNG_OBJECTS:
        gc.set_threshold(YOUNG_OBJECTS, 20, 20)
        atexit.register(gc.freeze)


def _keep_programs() -> None:
    """Let JAX cache compiled programs between processes.

    If the folder cannot be written, one line on stderr says so and programs are compiled in each process. A cache that was
    configured before, by `JAX_COMPILATION_CACHE_DIR` or in Python, stays unless `DS4JAX_CACHE` names another.

    Source: jax documentation, "Persistent compilation cache".
    """
    import jax

    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if kept and not os.environ.get("DS4JAX_CACHE"):
        _replace_damaged(Path(kept))
        return
    try:
        folder = cache_dir()
        require_writable(folder)
    except (OSError, RuntimeError) as error:
        print(f"ds4jax: note: nothing compiled is kept for the next run: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A model is one large program and dozens of small ones. All small ones together compile as long as the large one, so
    # they are cached too. By default JAX caches no program that compiles in under a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _replace_damaged(folder)


@functools.cache
def _replace_damaged(folder: Path) -> None:
    """Remove damaged files of the cache, with one line on stderr instead of a warning for each program in each process.

    JAX compiles a program that it cannot read, but never overwrites its file. Its warning comes between the two and names the
    program. A program has one file for each shape; the warning does not say which is damaged, so all of them are removed.
    """
    others, said = warnings.showwarning, set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **file: Any) -> None:
        found = _WARNING.match(str(message))
        if not found:
            others(message, category, *place, **file)
            return
        doing, program, reason = found.groups()
        if doing == "reading":
            for damaged in folder.glob(f"{glob.escape(program)}-*-cache"):
                with contextlib.suppress(OSError):
                    damaged.unlink()
        if doing not in said:
            said.add(doing)
            print(f"ds4jax: note: {folder}: {_NOTES[doing]} ({' '.join(reason.split())[:100]})", file=sys.stderr)

    warnings.showwarning = show


def _forget_callers() -> None:
    """Leave line numbers of Python out of compiled programs.

    A Pallas kernel holds the lines of its callers and is part of a program's cache key. A function that JAX traces once for
    several kernels names the first caller. With line numbers the same step would be compiled again after other work, or in
    another checkout.
    """
    import jax

    if "JAX_TRACEBACK_IN_LOCATIONS_LIMIT" not in os.environ:
        jax.config.update("jax_traceback_in_locations_limit", 0)
