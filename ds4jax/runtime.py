"""What a process that computes should set up first: a compilation cache that outlives it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Folder of compiled programs: `DS4JAX_CACHE`, else ds4jax/jax in the user's cache folder. May be deleted at any time."""
    chosen = os.environ.get("DS4JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ds4jax" / "jax"


def configure() -> None:
    """Let jax keep compiled programs between processes; call it before the first computation.

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
