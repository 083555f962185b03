"""Names of compiled programs, made of facts that are known before tracing: source, versions, device, settings, caller's key.

Two processes have the same name for a program only if they would compile the same code for it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from jax._src.lib import xla_client  # type: ignore[attr-defined]
from jaxlib.version import __version__ as jaxlib_version

from ds4jax import nvidia
from ds4jax.decode.module import Graph
from ds4jax.device import processor
from ds4jax.timing import process_began

ROOT = Path(__file__).parents[2]
# Packages and types of files that decide what is traced: source, tiles and tables of times.
PACKAGES = ("ds4jax", "pallas_kernels")
SUFFIXES = (".py", ".json")
# Settings of JAX that no program depends on: folders, limits and logs.
_UNUSED = ("jax_compilation_cache_", "jax_persistent_cache_", "jax_log_", "jax_logging_", "jax_dump_", "jax_debug_log_")
# Environment variables that XLA or a gate of the kernels may read, and those that no program depends on.
_PREFIXES = ("XLA_", "TF_", "DS4JAX_")
_UNREAD = ("DS4JAX_CACHE", "DS4JAX_STRICT", "DS4JAX_WEIGHTS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# Those that say where CUDA's libraries and assembler are, and how they multiply.
_CUDA = ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "LD_LIBRARY_PATH", "NVIDIA_TF32_OVERRIDE")


class NotAFactError(Exception):
    """A value that another process may not know by the same text."""


def by_facts(key: Hashable) -> str | None:
    """The name of a program before it is traced, 64 hexadecimal digits.

    Args:
        key: what the program depends on besides the process: numbers, texts, tuples, dataclasses of this package, and graphs of
            its models.

    Returns:
        None if the key has something else, such as a drafter from outside the package, or the source has changed since the
        process began.
    """
    try:
        return digest(_source(), _process(), json.dumps(_fact(key)))
    except NotAFactError:
        return None


def by_content(lowered: jax.stages.Lowered) -> str:
    """The name of a lowered program, 64 hexadecimal digits."""
    code = io.BytesIO()
    lowered.compiler_ir("stablehlo").operation.write_bytecode(file=code)  # type: ignore[union-attr]
    return digest(_process(), str(lowered.in_tree), str(lowered.out_tree), code.getvalue())


def digest(*parts: str | bytes) -> str:
    """64 hexadecimal digits of parts in this order."""
    found = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        found.update(len(raw).to_bytes(8, "little") + raw)
    return found.hexdigest()


@functools.cache
def _source() -> str:
    """A digest of the source that this process runs.

    Raises:
        NotAFactError: a file is newer than the process, which may have imported an older one.
    """
    began = time.time() - (time.monotonic() - process_began())
    parts: list[str | bytes] = []
    for package in PACKAGES:
        for path in sorted(path for path in (ROOT / package).rglob("*") if path.suffix in SUFFIXES):
            if path.stat().st_mtime > began:
                raise NotAFactError(f"{path} is newer than this process")
            parts += [str(path.relative_to(ROOT)), path.read_bytes()]
    return digest(*parts)


def _process() -> str:
    """Versions, device and settings of this process, which decide what a program is compiled to."""
    settings = {name: repr(value) for name, value in sorted(jax.config.values.items()) if not name.startswith(_UNUSED)}
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_PREFIXES) and name not in _UNREAD}
    return json.dumps([_machine(), settings, variables])


@functools.cache
def _machine() -> list[str | int]:
    """Versions, and the device. XLA compiles for the features of the CPU, and divides work by the number of its cores."""
    device = jax.devices()[0]
    versions = [sys.version, jax.__version__, jaxlib_version, flax.__version__, np.__version__]
    facts = [*versions, device.platform, device.device_kind, device.client.platform_version, processor(), os.cpu_count() or 1]
    return facts if device.platform == "cpu" else [*facts, *_accelerator(device)]


def _accelerator(device: jax.Device) -> list[str | int]:
    """What XLA and kernels compile a GPU's program for and with.

    All numbers of the GPU in XLA's description, by the digest that JAX's own cache uses, and its multiprocessors, among which
    kernels divide their work; the driver, and the libraries of NVIDIA, which assemble the code and of which XLA chooses products.

    Raises:
        NotAFactError: XLA does not describe such a device.
    """
    try:
        described = xla_client.get_topology_for_devices([device]).fingerprint()
    except jax.errors.JaxRuntimeError as error:
        raise NotAFactError(str(error)) from error
    where = [f"{name}={os.environ.get(name, '')}" for name in _CUDA]
    return [described, getattr(device, "core_count", 0), *where, *nvidia.installed()]


def _fact(value: Any) -> Any:
    """A value as JSON that is equal in another process exactly if the value is.

    Raises:
        NotAFactError: nothing is known about such a value.
    """
    if value is None or type(value) in (bool, int, float, str):
        return [type(value).__name__, repr(value)]
    if type(value) is tuple:
        return ["tuple", *map(_fact, value)]
    if isinstance(value, Graph):
        # An address is another one in another process, and may be that of another object.
        if " at 0x" in value.text:
            raise NotAFactError("a graph with an object that only this process knows")
        return ["graph", value.text]
    if type(value).__module__.split(".")[0] == "ds4jax" and dataclasses.is_dataclass(value):
        fields = [[field.name, _fact(getattr(value, field.name))] for field in dataclasses.fields(value)]
        return [f"{type(value).__module__}.{type(value).__qualname__}", *fields]
    raise NotAFactError(type(value).__name__)
