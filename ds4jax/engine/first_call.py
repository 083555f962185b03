"""A program that was read from a file is trusted after its first call. If that call fails, the program is compiled.

XLA loads the machine code of a GPU's program, and finds the functions of a CPU's, when the program is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# XLA's word where memory is missing. A compiled program would need as much.
NO_MEMORY = "RESOURCE_EXHAUSTED"


class FirstCall:
    """A program from a file, called like a compiled one, whose other attributes it has."""

    def __init__(self, executable: Any, refuse: Callable[[str], None], compiled: Callable[[], Any]):
        """Nothing is called yet.

        Args:
            refuse: lets no other process load it, for this reason.
            compiled: the same program, compiled.
        """
        self._executable, self._refuse, self._compiled = executable, refuse, compiled
        self._trusted = False

    def __call__(self, *arguments: Any) -> Any:
        """What the program returns. On a GPU, where errors come late, the first call waits for the device.

        Raises:
            Exception: the first call failed, and took the buffers that a second one would need. The next process compiles.
        """
        if self._trusted:
            return self._executable(*arguments)
        try:
            results = self._executable(*arguments)
            if jax.default_backend() == "gpu":
                jax.block_until_ready(results)
        except Exception as error:
            # XLA raises errors of many kinds, as in `kept.load`.
            if NO_MEMORY in str(error):
                raise
            self._refuse(f"{type(error).__name__}: {error}")
            if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(arguments)):
                raise
            self._executable = self._compiled()
            results = self._executable(*arguments)
        self._trusted = True
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executable, name)
