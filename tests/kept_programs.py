"""A small program on disk, for tests of those that keep and load programs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import runtime
from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.engine import kept, program_key

KEY = ("a program", 3, None, NgramDrafter())
SHAPE = jax.ShapeDtypeStruct((300,), jnp.float32)
COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def kept_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep programs in an empty folder, and yield it. The source counts as old, also while somebody edits it."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(program_key, "_source", lambda: "source")
    monkeypatch.setattr(kept, "_reported", [])
    monkeypatch.setattr(runtime, "process_of_a_command", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield folder / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def lowered(scale: float = 0.5) -> jax.stages.Lowered:
    """A program that takes the buffer of its first argument."""

    def smooth(x: jax.Array, tree: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.sin(x) * scale + jnp.cumsum(tree["y"]), {"sum": jnp.sum(x)}

    return jax.jit(smooth, donate_argnums=0).lower(SHAPE, {"y": SHAPE})


def results(executable: Any) -> list[np.ndarray]:
    """What the program returns for the same random arguments each time."""
    numbers = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    x, y = map(jnp.array, numbers)
    found = executable(x, {"y": y})
    assert x.is_deleted()
    assert not y.is_deleted()
    return [np.asarray(found[0]), np.asarray(found[1]["sum"])]


def compilations(work: Callable[[], Any]) -> int:
    """How many programs XLA compiles, or JAX reads from its own cache, meanwhile."""
    events: list[str] = []

    def heard(event: str, duration_secs: float, **_: str | int) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        work()
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    return events.count(COMPILED)


def filled(key: Any = KEY) -> tuple[str, list[np.ndarray]]:
    """The name of a program that is kept now, and its results."""
    name = kept.name_of(key)
    assert name is not None
    assert kept.load(name) is None
    executable, loaded = kept.compiled(name, lowered())
    assert not loaded
    return name, results(executable)
