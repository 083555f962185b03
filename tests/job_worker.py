"""A process of a job with two devices: joins, gathers once with all others, says so and waits.

Usage: job_worker.py PORT PROCESS PROCESSES.
"""

from __future__ import annotations

import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ds4jax.processes.job import begin
from ds4jax.processes.seat import Seat


def gathered() -> list[int]:
    """The numbers 0, 1, .. of all devices, each from the device that has it."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    numbers = np.arange(mesh.size, dtype=np.int32)
    cut = NamedSharding(mesh, PartitionSpec("devices"))
    array = jax.make_array_from_callback(numbers.shape, cut, lambda index: numbers[index])
    found: list[int] = np.asarray(jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)).tolist()
    return found


def main(port: int, index: int, count: int) -> None:
    """Run the process. Process 0 ends the job when its stdin ends; the others end with it."""
    job = begin(Seat("127.0.0.1", port, index, count, 60), {})
    job.meet()
    print(gathered(), len(jax.local_devices()), flush=True)
    if index:
        with job.together():
            for message in job.orders():
                print(message.fields, flush=True)
                if message.fields["do"] == "fail":
                    raise RuntimeError("no memory\nleft")
        return
    for line in sys.stdin:
        job.order(line.strip())
    job.close()
    time.sleep(0.1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
