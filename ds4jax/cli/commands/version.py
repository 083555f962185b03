"""`ds4jax --version`: versions of ds4jax and JAX, JAX's device, and the kernel path of a decode step on it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import ds4jax
from ds4jax.doctor.probe import probe


class Version(argparse.Action):
    """Prints the versions and exits with 0, even if JAX does not start."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(*lines(), sep="\n", flush=True)
        parser.exit()


def lines() -> list[str]:
    """The lines of --version: ds4jax, JAX, device and kernels."""
    found = probe()
    return [f"ds4jax   {ds4jax.__version__}", f"jax      {_jax()}", f"device   {found.device}", f"kernels  {found.kernels}"]


def _jax() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
