"""What a process that computes should set up first, in one place: memory, and a cache of programs that outlives it."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

MEMORY_FRACTION = "0.9"
YOUNG_OBJECTS = 20_000


def cache_dir() -> Path:
    """Folder of compiled programs: `DS4JAX_CACHE`, else ds4jax/jax in the user's cache folder. May be deleted at any time."""
    chosen = os.environ.get("DS4JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ds4jax" / "jax"


def configure() -> None:
    """Set up memory and compilation; call it before the first computation. What the user has set in the environment stays.

    The compiler's own flags are left alone: with while loops and branches in CUDA graphs too
    (`--xla_gpu_enable_command_buffer=..,WHILE,CONDITIONAL`) a step took 3 % longer on an H200 than with the graphs that jax makes
    by itself, and no kernel of ours depends on how XLA chooses among algorithms.
    """
    _claim_memory()
    _collect_less()
    _keep_programs()
    _forget_callers()


def _claim_memory() -> None:
    """Let jax have nine tenths of a GPU's memory in place of three quarters.

    The 2-bit model takes 94 GB of an H200's 141, and what is left over must hold a cache and a prompt's temporaries; the tenth
    is for CUDA itself and for other processes' contexts.
    """
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = MEMORY_FRACTION


def _collect_less() -> None:
    """Let Python look for garbage in cycles less often: it walks through all that tracing makes, most of which stays.

    A fifth of the time in which programs are traced and lowered, at no memory to speak of.
    """
    if gc.get_threshold()[0] < YOUNG_OBJECTS:
        gc.set_threshold(YOUNG_OBJECTS, 20, 20)


def _keep_programs() -> None:
    """Let jax keep compiled programs between processes.

    A folder that cannot be written costs one line on stderr and the compile time, nothing else. A cache that was set up
    already, by `JAX_COMPILATION_CACHE_DIR` or in Python, is kept unless `DS4JAX_CACHE` names another.

    Source: jax documentation, "Persistent compilation cache".
    """
    import jax

    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if kept and not os.environ.get("DS4JAX_CACHE"):
        return
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        # Asking for permissions tells nothing on a read-only file system, nor to root.
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        print(f"ds4jax: note: nothing compiled is kept for the next run: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A model is one large program and dozens of small ones; the small ones together cost as much, so none is left out for
    # having compiled in under a second, which is jax's default, or for its size.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _forget_callers() -> None:
    """Let programs not say which lines of Python they come from.

    A Pallas kernel's program has these lines in it and is part of the key under which the whole program is kept. What jax traces
    once for several kernels names the first of them, so that the same step would be compiled again after other work, or in a
    checkout elsewhere.
    """
    import jax

    if "JAX_TRACEBACK_IN_LOCATIONS_LIMIT" not in os.environ:
        jax.config.update("jax_traceback_in_locations_limit", 0)
