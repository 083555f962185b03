"""Find the tensor of every parameter in GGUF files, and check its shape and type."""

from __future__ import annotations

import dataclasses

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.dspark_names import Dspark
from ds4jax.loading.gguf_header import QUANTISED, Header, TensorInfo
from ds4jax.loading.gguf_names import TOGETHER, Slot, device_form, dspark_slots, slots
from ds4jax.loading.mtp_names import MtpBlock

Drafter = MtpBlock | Dspark
# Copies of the model's tables in the file of a drafter, which are not used.
_COPIES = ("token_embd.weight", "output.weight", "output_norm.weight")


@dataclasses.dataclass(frozen=True)
class Found:
    """A parameter and the tensor that holds it.

    Attributes:
        header: the file, or the set of files, that the tensor is in.
        form: how the device will hold the parameter, as in `Tensor`.
        columns: the part of the tensor's inputs that is the parameter; None for all.
    """

    slot: Slot
    header: Header
    info: TensorInfo
    form: str
    columns: slice | None = None

    @property
    def has_whole_blocks(self) -> bool:
        """Whether a row of the parameter is whole blocks of the stored type. Half a joined projection may end within one."""
        return self.slot.shape[-1] % QUANTISED.get(self.info.type, 1) == 0


def match(header: Header, config: Config, drafter: Drafter | None = None) -> tuple[list[Found], tuple[str, ...]]:
    """Find every parameter in a file; also returns the names of tensors that the model does not use.

    Args:
        drafter: the drafter that the configuration has, in this file or in one of its own; None without one.

    Raises:
        InputError: a tensor that is missing or has a wrong shape or a type that this tensor never has.
    """
    found = [_find(header, drafter, slot) for slot in slots(config)]
    used = {(id(one.header), one.info.name) for one in found}
    side = drafter.header if drafter is not None and drafter.header is not header else None
    sources = (header,) if side is None else (header, side)
    used |= {(id(side), name) for name in _COPIES} if side is not None else set()
    ignored = [name for source in sources for name in source.tensors if (id(source), name) not in used]
    return _in_one_type(found), tuple(ignored)


def match_drafter(config: Config, drafter: Drafter) -> None:
    """Check that a file holds every parameter of a drafter for a model of this configuration, which has it.

    Raises:
        InputError: as for `match`.
    """
    for slot in slots(config):
        if slot.name.startswith(("mtp.", "dspark.")):
            _find(drafter.header, drafter, slot)


def require_tensors(drafter: Dspark) -> None:
    """Check that a file holds every tensor of a DSpark drafter in types that can be read, whatever its model.

    Raises:
        InputError: a tensor that is missing or has another type.
    """
    for slot in dspark_slots(dataclasses.replace(Config(), n_mtp=0, n_dspark=drafter.numbers.stages)):
        _typed(drafter.header, drafter.place(slot.gguf_name), slot)


def _typed(header: Header, name: str, slot: Slot) -> TensorInfo:
    """A tensor that has one of the types of a parameter."""
    info = header.tensors.get(name)
    if info is None:
        raise InputError(f"{header.path}: {name}: this tensor is missing")
    if info.type not in slot.types:
        types = " or ".join(slot.types)
        raise InputError(f"{header.where(info)}: type {info.type} is not supported for this tensor; it must be {types}")
    return info


def _find(header: Header, drafter: Drafter | None, slot: Slot) -> Found:
    source, name, half = header, slot.gguf_name, None
    if isinstance(drafter, MtpBlock) and slot.name.startswith("mtp."):
        source = drafter.header
        name, half = drafter.place(slot.gguf_name.removeprefix("mtp.0."))
    elif isinstance(drafter, Dspark) and slot.name.startswith("dspark."):
        source, name = drafter.header, drafter.place(slot.gguf_name)
    info = _typed(source, name, slot)
    shape = slot.shape if half is None else (*slot.shape[:-1], 2 * slot.shape[-1])
    if shape[:1] == (1,) and info.shape == shape[1:]:
        # ggml drops a last dimension of 1 when it writes a file again.
        info = dataclasses.replace(info, shape=shape)
    if info.shape != shape:
        asked = list(shape[::-1])
        raise InputError(f"{source.where(info)}: dimensions {list(info.shape[::-1])}; the metadata asks for {asked}")
    columns = None if half is None else slice(half * slot.shape[-1], (half + 1) * slot.shape[-1])
    return Found(slot, source, info, device_form(slot, info.type), columns)


def _in_one_type(found: list[Found]) -> list[Found]:
    """The same with float32 for the compressor and indexer matrices of a block whose types differ."""
    forms: dict[str, set[str]] = {}
    for one in found:
        forms.setdefault(_launch(one.slot.name), set()).add(one.form)
    mixed = {block for block, kinds in forms.items() if block and len(kinds) > 1}
    return [dataclasses.replace(one, form="F32") if _launch(one.slot.name) in mixed else one for one in found]


def _launch(name: str) -> str:
    """The block in which a matrix is multiplied in one launch with others, such as `layers.3`; empty for other parameters."""
    block, index, rest = (*name.split(".", 2), "", "")[:3]
    return f"{block}.{index}" if rest in TOGETHER else ""
