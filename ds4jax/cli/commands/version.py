"""`ds4jax --version`: versions of ds4jax and JAX, JAX's device, and the kernel path of a decode step on it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ds4jax

# Starting JAX takes a second or two. If a driver hangs, the version must still be printed.
SECONDS = 10.0
PROBE = "from ds4jax.cli.commands.version import probe; probe()"
MARK = "ds4jax\t"
PATHS = {
    "pallas": "pallas share-warp",
    "xla": "jnp, quantised arithmetic",
    "dot": "jnp.dot, float32",
}


class Version(argparse.Action):
    """Prints the versions and exits with 0, even if JAX does not start."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(*lines(), sep="\n", flush=True)
        parser.exit()


def lines() -> list[str]:
    """The lines of --version: ds4jax, JAX, device and kernels."""
    device, path = _probed()
    return [f"ds4jax   {ds4jax.__version__}", f"jax      {_jax()}", f"device   {device}", f"kernels  {path}"]


def probe() -> None:
    """Start JAX, and print its device and the path of a Q8_0 product of one row there."""
    import jax

    from pallas_kernels.core.dispatch import choose
    from pallas_kernels.formats import Q8_0

    first, *others = jax.devices()
    strict = os.environ.get("DS4JAX_STRICT") == "1"
    choice = choose(1, Q8_0, strict=strict)
    path = choice.cuda if first.platform in ("gpu", "cuda") else choice.default
    device = f"{1 + len(others)} × {first.device_kind}" if others else first.device_kind
    print(f"{MARK}{device}\t{PATHS[path]} ({'DS4JAX_STRICT=1' if strict else choice.reason})")


def _jax() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _probed() -> tuple[str, str]:
    """Device and path, from a separate process: starting a backend may hang or abort."""
    nothing = "none without a device"
    # Without this, JAX would reserve three quarters of the GPU's memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"jax did not start within {SECONDS:.0f} s", nothing
    except OSError as error:
        return f"jax could not be started: {error}", nothing
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            device, path = line.removeprefix(MARK).split("\t", 1)
            return device, path
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"jax does not start: {last}", nothing
