"""Reads a model's parameters onto the devices that keep them: the parts of those that are cut, and the others on each device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ds4jax.bounds import DEVICE_COUNT, GROUP_COUNT, shown
from ds4jax.config import Config
from ds4jax.decode.groups import GROUPS, WHOLE
from ds4jax.decode.groups import count as groups_of
from ds4jax.errors import InputError
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.cuts import cut_names
from ds4jax.loading.tensor_reader import read_ahead
from pallas_kernels.formats import Quantized
from pallas_kernels.formats.base import row_axes
from pallas_kernels.linear.cut import AXIS

Value = jax.Array | Quantized
# A number of devices, "all", devices or their indices; None is the first.
Devices = int | str | Sequence[jax.Device | int] | None


def chosen(devices: Devices) -> tuple[jax.Device, ...]:
    """The devices that a user names: a number of them, "all", a list of devices or of their indices; None is the first.

    Raises:
        InputError: there are not so many, they are of several kinds, one is named twice, or processes have unlike
            numbers of them. One device must be the first.
    """
    present = jax.devices()
    if isinstance(devices, str):
        if devices != "all":
            raise InputError(f"devices is {devices!r}; it must be a number, all, or a list")
        found = tuple(present)
    elif isinstance(devices, Sequence):
        found = tuple(_device(one, present) for one in devices)
        if not found:
            raise InputError("devices names 0 devices; name at least one")
        if len(set(map(id, found))) < len(found):
            raise InputError(f"devices names {len(found)} devices, {len(set(map(id, found)))} of them different; name each once")
    else:
        count = 1 if devices is None else DEVICE_COUNT.checked("devices", devices)
        if count > len(present):
            raise InputError(f"devices is {count}; there are {len(present)} {present[0].platform} devices, so name at most these")
        found = tuple(present[:count])
    if jax.process_count() > 1 and len(found) < len(present):
        raise InputError(
            f"devices is {len(found)} of {len(present)}; several processes use all their devices, so hide the others"
        )
    if jax.process_count() > 1:
        _require_equal_processes(present)
    if kinds := {one.device_kind for one in found} - {found[0].device_kind}:
        raise InputError(f"devices are of several kinds, {found[0].device_kind} and {min(kinds)}; take equal ones")
    if len(found) == 1 and found[0] is not present[0]:
        raise InputError(f"devices is device {present.index(found[0])} alone; one device must be the first, so hide the others")
    return found


def _require_equal_processes(present: Sequence[jax.Device]) -> None:
    counts = [sum(one.process_index == index for one in present) for index in range(jax.process_count())]
    other = next((index for index, count in enumerate(counts) if count != counts[0]), None)
    if other is not None:
        raise InputError(f"process {other} has {counts[other]} devices, process 0 has {counts[0]}; give each the same number")


def _device(one: jax.Device | int, present: Sequence[jax.Device]) -> jax.Device:
    if isinstance(one, jax.Device):
        return one
    if not isinstance(one, int):
        raise InputError(f"devices names {shown(one)}; it must list devices or their indices")
    if not 0 <= one < len(present):
        raise InputError(f"devices names device {one}; there are devices 0 to {len(present) - 1}")
    return present[one]


def checked_groups(groups: int, devices: Sequence[jax.Device]) -> int:
    """The number of equal groups that a user divides the devices into.

    Raises:
        InputError: the devices do not divide into so many groups, or there are several processes.
    """
    count = GROUP_COUNT.checked("groups", groups)
    if len(devices) % count:
        raise InputError(f"groups is {count}; it must divide the number of devices, {len(devices)}; see --devices")
    if count > 1 and jax.process_count() > 1:
        raise InputError(f"groups is {count}; several processes are one group, so leave it out")
    return count


@contextlib.contextmanager
def read(checkpoint: Checkpoint, devices: Sequence[jax.Device], groups: int = 1) -> Iterator[Iterator[Value]]:
    """Yield the parameters of a checkpoint in order, on the devices that keep them; see `tensor_reader.read_ahead`."""
    if len(devices) == 1:
        with read_ahead(tuple(tensor.start(None) for tensor in checkpoint.tensors)) as values:
            yield values
        return
    placement = Placement.of(checkpoint.config, devices, groups)
    parts = [(tensor, placement.parts(tensor.name, tensor.shape)) for tensor in checkpoint.tensors]
    readings = [dataclasses.replace(tensor.start(rows), device=device) for tensor, of in parts for device, rows in of]
    with read_ahead(readings) as values:
        yield (placement.joined(tensor.name, [next(values) for _ in of]) for tensor, of in parts)


def abstract(checkpoint: Checkpoint, devices: Sequence[jax.Device], groups: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield names and values of a checkpoint's parameters on these devices, with `jax.ShapeDtypeStruct` in place of arrays."""
    placement = Placement.of(checkpoint.config, devices, groups)
    for tensor in checkpoint.tensors:
        yield tensor.name, tensor.abstract if len(devices) == 1 else placement.abstract(tensor.name, tensor.abstract)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh of several devices, and the parameters that are cut over the devices of each of its groups.

    Attributes:
        cut: their names.
    """

    mesh: Mesh | AbstractMesh
    cut: frozenset[str]

    @classmethod
    def of(cls, config: Config, devices: Sequence[jax.Device], groups: int = 1) -> Placement:
        """The placement of a model on these devices, which are cut into groups in their order."""
        array, size = np.array(devices), len(devices) // groups
        mesh = Mesh(array, (AXIS,)) if groups == 1 else Mesh(array.reshape(groups, size), (GROUPS, AXIS))
        return cls(mesh, cut_names(config, size))

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """The devices of the first group, in order."""
        return tuple(self.mesh.devices.reshape(groups_of(self.mesh), -1)[0])

    def parts(self, name: str, shape: tuple[int, ...]) -> list[tuple[jax.Device, slice | None]]:
        """What this process reads of a parameter: devices, and the rows of the second axis from the end that each keeps.

        The first group reads, and the others get copies. A parameter that is whole on all devices is read once, onto the first of
        this process; its rows are None.
        """
        own = [(i, device) for i, device in enumerate(self.devices) if device.process_index == jax.process_index()]
        if name not in self.cut:
            return [(own[0][1], None)]
        size = shape[-2] // len(self.devices)
        return [(device, slice(i * size, (i + 1) * size)) for i, device in own]

    def joined(self, name: str, values: Sequence[Value]) -> Value:
        """The parameter on all devices, from what `parts` lists; without groups, no bytes of a cut one move."""
        if name not in self.cut:
            whole: Value = everywhere(values[0], self.mesh)  # type: ignore[arg-type]
            return whole
        planes = zip(*map(jax.tree.leaves, values), strict=True)
        made = [self._plane(parts, axis) for parts, axis in zip(planes, _axes(values[0]), strict=True)]
        value: Value = jax.tree.unflatten(jax.tree.structure(values[0]), made)
        return value

    def abstract(self, name: str, value: Any) -> Any:
        """The parameter as `joined` places it, with `jax.ShapeDtypeStruct` in place of arrays."""
        planes, tree = jax.tree.flatten(value)
        specs = [_spec(plane.ndim, axis) if name in self.cut else WHOLE for plane, axis in zip(planes, _axes(value), strict=True)]
        made = [
            jax.ShapeDtypeStruct(plane.shape, plane.dtype, sharding=NamedSharding(self.mesh, spec))
            for plane, spec in zip(planes, specs, strict=True)
        ]
        return jax.tree.unflatten(tree, made)

    def _plane(self, parts: Sequence[jax.Array], axis: int) -> jax.Array:
        shape = list(parts[0].shape)
        shape[axis] *= self.mesh.shape[AXIS]
        sharding = NamedSharding(self.mesh, _spec(len(shape), axis))
        if groups_of(self.mesh) > 1:
            parts = [jax.device_put(part, to) for row in self.mesh.devices for part, to in zip(parts, row, strict=True)]
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, list(parts))


Arrays = TypeVar("Arrays")


def everywhere(arrays: Arrays, mesh: Mesh) -> Arrays:
    """A tree of arrays on each device of a mesh. Every process has the same values."""
    whole = NamedSharding(mesh, WHOLE)
    if jax.process_count() == 1:
        placed: Arrays = jax.device_put(arrays, whole)
        return placed
    # `jax.device_put` would send all values to the other processes to compare them.
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]

    def put(array: jax.Array) -> jax.Array:
        copies = [jax.device_put(array, device, may_alias=False) for device in own]
        return jax.make_array_from_single_device_arrays(array.shape, whole, copies)

    placed = jax.tree.map(put, arrays)
    return placed


def _axes(value: Any) -> tuple[int, ...]:
    """The axis of rows of each plane of a value, from the end."""
    return row_axes(type(value)) if isinstance(value, Quantized) else (-2,)


def _spec(dimensions: int, axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * (dimensions + axis), AXIS)
