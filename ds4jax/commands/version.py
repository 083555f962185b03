"""`ds4jax --version`: this package, jax, the device that jax finds, and the path that decode's products take there."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ds4jax

# Starting jax takes a second or two; a driver that hangs must not take the version with it.
SECONDS = 10.0
PROBE = "from ds4jax.commands.version import probe; probe()"
MARK = "ds4jax\t"
PATHS = {
    "pallas": "pallas share-warp",
    "xla": "jnp, quantised arithmetic",
    "dot": "jnp.dot, float32",
}


class Version(argparse.Action):
    """Prints the versions and ends the process with 0, whatever state jax is in."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(*lines(), sep="\n", flush=True)
        parser.exit()


def lines() -> list[str]:
    """ds4jax, jax, device and kernels, a line each."""
    device, path = _probed()
    return [f"ds4jax   {ds4jax.__version__}", f"jax      {_jax()}", f"device   {device}", f"kernels  {path}"]


def probe() -> None:
    """Start jax and print what it runs on, and the path that the gate chooses there for a Q8_0 product of one row."""
    import jax

    from pallas_kernels.dispatch import choose

    first, *others = jax.devices()
    strict = os.environ.get("DS4JAX_STRICT") == "1"
    choice = choose(1, True, strict=strict)
    path = choice.cuda if first.platform in ("gpu", "cuda") else choice.default
    device = f"{1 + len(others)} × {first.device_kind}" if others else first.device_kind
    print(f"{MARK}{device}\t{PATHS[path]} ({'DS4JAX_STRICT=1' if strict else choice.reason})")


def _jax() -> str:
    try:
        return importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _probed() -> tuple[str, str]:
    """Device and path, asked of another process: starting a backend may hang or abort."""
    nothing = "none without a device"
    # The answer must not cost three quarters of a GPU's memory.
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
