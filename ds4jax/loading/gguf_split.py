"""Open a GGUF file, or all shards of a split one as if they were one file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, TensorInfo, Value, read_header, shown
from ds4jax.loading.limits import MAX_SHARDS

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
# STEM-00002-of-00004.gguf is the second of four.
_NAME = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class _Set:
    """The shards of one model, by the name of one of them: all lie in one folder."""

    folder: Path
    stem: str
    count: int

    def shard(self, number: int) -> Path:
        """The file of a shard, counted from 1."""
        return self.folder / f"{self.stem}-{number:05}-of-{self.count:05}.gguf"


def open_set(path: Path) -> Header:
    """Read the headers of a GGUF file or, if it is a shard of a split one, of the whole set, as one header.

    The shards of a set lie in one folder under names that end in `-00001-of-00003.gguf` and so on; any one of them may be given.
    The header's path is that of the first shard. Its metadata is the first shard's without `split.*`; keys that a later shard
    repeats must have the same value there. The first shard may have no tensors.

    What a file says of itself counts more than its name:
    - without `split.*`, or with a `split.count` of 0 as merging leaves it, a file is whole, whatever its name; but a file without
      these keys beside other shards of the set that it is named after is refused;
    - a `split.count` of 1 says the same, and a name that asks for more shards contradicts it;
    - with two shards or more, number and count must be those of the name. A link under another name leads to the set.

    Raises:
        InputError: a file that `read_header` refuses, or a set that is not complete or contradicts itself; the message names the
            shard at fault and what is expected of it.

    Source: llama.cpp, `gguf-split` and the model loader.
    """
    given = read_header(path)
    if not any(key in given.metadata for key in (NO, COUNT, TENSORS)):
        _require_no_others(path)
        return given
    count = _number(given, COUNT)
    if count < 2:
        return _whole(given, count)
    return _merged(_opened(_set_of(given, count), given))


def _number(header: Header, key: str) -> int:
    """The value of one of the three keys of a shard."""
    found = header.metadata.get(key)
    if found is None:
        raise InputError(f"{header.path}: {key}: this key is missing; a shard of a split file has it")
    if not isinstance(found.value, int) or isinstance(found.value, bool):
        raise InputError(f"{header.path}: {key}: it must be an integer, not {found.type}")
    return found.value


def _named(path: Path) -> tuple[_Set, int] | None:
    """The set that a file belongs to by its name, and its number there from 1; None for other names."""
    match = _NAME.fullmatch(path.name)
    return (_Set(path.parent, match["stem"], int(match["count"])), int(match["number"])) if match else None


def _require_no_others(path: Path) -> None:
    """Refuse a file without `split.*` that lies beside a shard of its set: its model is not whole."""
    named = _named(path)
    if named is None:
        return
    members, number = named
    for other in {1, 2, members.count} - {number}:
        if 0 < other <= members.count and members.shard(other).exists():
            raise InputError(
                f"{path}: {COUNT}: this key is missing; its name says shard {number} of {members.count}, "
                f"and {members.shard(other).name} lies beside it"
            )


def _whole(header: Header, count: int) -> Header:
    """A file that says that it has all tensors."""
    named = _named(header.path)
    if count < 0 or (count == 1 and named is not None and named[0].count != 1):
        expected = named[0].count if named is not None else 1
        raise InputError(f"{header.path}: {COUNT}: is {count}; {expected} is expected")
    if TENSORS in header.metadata and len(header.tensors) < (total := _number(header, TENSORS)):
        raise InputError(f"{header.path}: {TENSORS}: is {total}; the file is not split and has {len(header.tensors)} tensors")
    return dataclasses.replace(header, metadata=_own(header.metadata))


def _set_of(given: Header, count: int) -> _Set:
    """The set of a shard, whose name agrees with what the shard says of itself."""
    number = _number(given, NO) + 1
    # A link may have any name.
    named = _named(given.path) or _named(Path(os.path.realpath(given.path)))
    if named is None:
        name = f"NAME-{number:05}-of-{count:05}.gguf"
        raise InputError(f"{given.path}: it is shard {number} of {count}; name it {name} and put the others beside it")
    members, by_name = named
    if members.count != count:
        raise InputError(f"{given.path}: {COUNT}: is {count}; its name says {members.count}")
    if count > MAX_SHARDS:
        raise InputError(f"{given.path}: {COUNT}: is {count}; at most {MAX_SHARDS} shards can be read: merge them")
    if not 1 <= by_name <= count:
        raise InputError(f"{given.path}: its name says shard {by_name} of {count}, and its {NO} shard {number}")
    return members


def _opened(members: _Set, given: Header) -> list[Header]:
    """The headers of all shards, each checked against its name and the first shard."""
    shards: list[Header] = []
    for number in range(1, members.count + 1):
        path = members.shard(number)
        header = given if path == given.path else _read(path, number, members.count)
        for key, expected in ((COUNT, members.count), (NO, number - 1)):
            if (found := _number(header, key)) != expected:
                raise InputError(f"{path}: {key}: is {found}; shard {number} of {members.count} must have {expected}")
        shards.append(header)
        _require_same_model(shards[0], header)
    return shards


def _read(path: Path, number: int, count: int) -> Header:
    try:
        return read_header(path)
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            what = f"shard {number} of {count} is missing; put all of them into one folder"
            raise InputError(f"{path}: no such file: {what}") from error
        raise


def _require_same_model(first: Header, shard: Header) -> None:
    """Refuse a shard that another model's first shard belongs to."""
    expected, found = _number(first, TENSORS), _number(shard, TENSORS)
    if found != expected:
        raise InputError(
            f"{shard.path}: {TENSORS}: is {found}, and {expected} in {first.path.name}; this shard belongs to another model"
        )
    for key, value in _own(shard.metadata).items():
        if key in first.metadata and not _equal(value, first.metadata[key]):
            raise InputError(f"{shard.path}: {shown(key)}: differs from {first.path.name}; this shard belongs to another model")


def _own(metadata: dict[str, Value]) -> dict[str, Value]:
    """Metadata of the model: without that of the shards."""
    return {key: value for key, value in metadata.items() if not key.startswith("split.")}


def _equal(one: Value, other: Value) -> bool:
    if one.type != other.type:
        return False
    return one.value == other.value if not one.type.endswith("[]") else list(one.value) == list(other.value)


def _merged(shards: list[Header]) -> Header:
    """One header of all shards."""
    tensors: dict[str, TensorInfo] = {}
    for info in _infos(shards):
        if info.name in tensors:
            before = shards[tensors[info.name].shard].path.name
            raise InputError(f"{shards[info.shard].path}: {shown(info.name)}: this tensor is in {before} as well")
        tensors[info.name] = info
    first, total = shards[0], _number(shards[0], TENSORS)
    if len(tensors) != total:
        raise InputError(f"{first.path}: {TENSORS}: is {total}; its {len(shards)} shards have {len(tensors)} tensors together")
    files = tuple(shard for header in shards for shard in header.shards)
    return Header(first.path, _own(first.metadata), tensors, files)


def _infos(shards: list[Header]) -> Iterator[TensorInfo]:
    for index, header in enumerate(shards):
        for info in header.tensors.values():
            yield dataclasses.replace(info, shard=index)
