"""The place of a process in a job, as its options name it. Needs no JAX."""

from __future__ import annotations

import dataclasses

from ds4jax.bounds import Integers
from ds4jax.errors import InputError

COUNT = Integers(2, None, "it must be at least 2")
INDEX = Integers(0, None, "it must be at least 0")
PATIENCE = Integers(1, None, "it must be at least 1")
# Seconds that processes wait for each other before they load.
WAIT = 300
PORT = Integers(1, 65535, "it must be 1 to 65535")


@dataclasses.dataclass(frozen=True)
class Seat:
    """A process's place in a job.

    Attributes:
        host, port: where process 0 listens.
        index, count: this process, and the number of processes.
        patience: seconds that the processes wait for each other.
    """

    host: str
    port: int
    index: int
    count: int
    patience: int

    @property
    def where(self) -> str:
        """The option that names the address, for error messages."""
        return f"--coordinator {self.host}:{self.port}"

    @classmethod
    def of(cls, coordinator: str, index: int | None, count: int | None, patience: int = WAIT) -> Seat:
        """Check the options of a process.

        Raises:
            InputError: one is missing or outside its range.
        """
        host, _, port = coordinator.rpartition(":")
        if not host.strip("[]") or not port.isdecimal() or not PORT.holds(int(port)):
            raise InputError(f"--coordinator {coordinator}: it must be HOST:PORT, the address of process 0")
        if index is None or count is None:
            raise InputError(f"--coordinator {coordinator}: give --process and --processes, too")
        if index >= count:
            raise InputError(f"--process {index}: of {count} processes, it must be 0 to {count - 1}")
        return cls(host.strip("[]"), int(port), index, count, patience)
