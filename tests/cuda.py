"""Lowering for CUDA on a machine without a GPU: catches most mistakes in kernels at no cost."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

# Since jax 0.11 a kernel's lowering asks for the kind of device, inside `shard_map` that of the mesh.
NAMED_DEVICES = jax.__version_info__ >= (0, 11)


def lowered_for_cuda(jitted: Any, *args: Any, **options: Any) -> str:
    """The program of a jitted function as text, lowered for an NVIDIA GPU. Triton itself is not run."""

    def text() -> str:
        return jitted.trace(*args, **options).lower(lowering_platforms=("cuda",)).as_text()

    if not NAMED_DEVICES:
        return text()
    with jax.sharding.use_abstract_mesh(gpus()):
        return text()


def gpus(**axes: int) -> AbstractMesh:
    """A mesh of these axes and sizes of GPUs that need not be there; without axes, one GPU."""
    # As of a mesh of devices. Since jax 0.12 an abstract one has other types unless told.
    sizes, names, types = tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes)
    if not NAMED_DEVICES:
        return AbstractMesh(sizes, names, axis_types=types)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return AbstractMesh(sizes, names, axis_types=types, abstract_device=device)


def exchanging(text: str) -> set[str]:
    """Which devices of a lowered program exchange with each other: lists of them, or since jax 0.12 the axis of the mesh."""
    listed = re.findall(r"replica_groups = dense<(.*?)>", text)
    named = re.findall(r"replica_groups = #stablehlo\.replica_group_mesh_axes<.*?axes = \[(.*?)\]", text)
    return {*listed, *(", ".join(re.findall(r'name = "(\w+)"', axes)) for axes in named)}


def kernel_calls(text: str, name: str) -> int:
    """How often a lowered program calls the Pallas kernel of this name.

    A launch that several kernels share has their names joined by "__", and a kernel's name may end in its shape. The rest of a
    launch's line is the kernel's program, with names of source files in it.
    """
    launches = re.findall(r'custom_call @__gpu\$xla\.gpu\.triton\(.*?\bname = "([^"]*)"', text)
    parts = (part for launch in launches for part in launch.split("__"))
    return sum(part == name or part.startswith(f"{name}_") for part in parts)


def pallas_calls(text: str) -> int:
    """How often a lowered program calls any Pallas kernel."""
    return text.count("@__gpu$xla.gpu.triton")


def executed_calls(text: str, name: str) -> int:
    """How often one run of a lowered program starts a kernel of this name; the body of a loop counts once.

    A jitted function is lowered once however often it is called, so that calls are counted along the graph of functions.
    """
    bodies = dict(re.findall(r"^  func\.func \w+ @([\w.]+)\((.*?)^  }", text, re.MULTILINE | re.DOTALL))

    @functools.cache
    def count(function: str) -> int:
        called = re.findall(r"\bcall @([\w.]+)\(", bodies[function])
        return kernel_calls(bodies[function], name) + sum(map(count, called))

    return count("main")
