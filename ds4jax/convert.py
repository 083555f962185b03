"""From a checkpoint directory to one GGUF file, a tensor at a time; what was interrupted goes on where it stopped.

Until the file is complete, its beginning (`unfinished.SUFFIX`) and a journal lie where it will be. The beginning is the file
itself but for its magic. The journal is lines of JSON: what is converted, then the checksum of each tensor that is complete.
What a second run builds on it has read again, so that neither a crash of the machine nor a damaged disk gets into the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ds4jax.errors import InputError
from ds4jax.files import replacing
from ds4jax.loading import gguf_header, unfinished
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_write import ALIGNMENT, header
from ds4jax.loading.hub import CONFIG, TOKENIZER, read_hub
from ds4jax.loading.hub_read import Source

JOURNAL = ".journal"
# Bytes checked together.
_CHUNK = 1 << 24

# Takes "checking" or "converting", how many bytes of the file are done, and how many it will have.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will write.

    Attributes:
        header: the file's bytes before its data.
        sources: tensors in the order of the file, by their names there.
        origin: a digest of the header and of the shards' names, sizes and times: another, and the results may differ.
        nbytes: bytes of the whole file.
    """

    header: bytes
    sources: dict[str, Source]
    origin: str
    nbytes: int


def plan(directory: Path, *, dense: str = "q8_0") -> Plan:
    """Read all headers of a checkpoint directory and lay the GGUF file out.

    Args:
        dense: type of dense matrices, "q8_0", "bf16" or "f32"; what becomes of the rest is told at `open_hub`.

    Raises:
        InputError: the directory is no checkpoint that can be converted.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: not a directory; give a checkpoint directory with {CONFIG} in it")
    hub = read_hub(directory, dense=dense)
    by_name = {source.name: source for source in hub.sources}
    sources = {slot.gguf_name: by_name[slot.name] for slot in slots(hub.config)}
    vocabulary = {}
    if (directory / TOKENIZER).exists():
        from ds4jax.loading.hub_vocabulary import read_vocabulary

        vocabulary = read_vocabulary(directory / TOKENIZER, hub.config)
    rows = [(name, source.shape, source.form, source.nbytes) for name, source in sources.items()]
    beginning = header(hub.config, rows, **vocabulary, metadata={"ds4jax.converted_dense": dense})
    digest = hashlib.sha256(beginning)
    for file in sorted({part.entry.file for source in hub.sources for part in source.parts}):
        status = file.stat()
        digest.update(json.dumps([file.name, status.st_size, status.st_mtime_ns]).encode())
    data = sum(source.nbytes + -source.nbytes % ALIGNMENT for source in hub.sources)
    return Plan(beginning, sources, digest.hexdigest(), len(beginning) + data)


def convert(directory: Path, out: Path, *, dense: str = "q8_0", force: bool = False, progress: Progress | None = None) -> Plan:
    """Write a checkpoint directory as one GGUF file, or go on where an interrupted run of the same stopped.

    `out` appears when it is complete, with the same bytes however often the run was interrupted.

    Args:
        dense: as for `plan`.
        force: replace a file that is there, and begin anew where an unfinished conversion is one of something else.
        progress: called after each few megabytes.

    Raises:
        InputError: the directory cannot be converted, `out` is there or cannot be written, another process is at it, what is
            unfinished beside it comes from something else, or the disk has too little room.
        OSError: writing failed half way; the next run goes on.
    """
    if out.exists() and not (force and out.is_file()):
        advice = "give --force to replace it" if out.is_file() else "give the name of a file"
        raise InputError(f"{out}: exists already; {advice}")
    layout = plan(directory, dense=dense)
    tell = progress or (lambda stage, done, total: None)
    partial = out.with_name(out.name + unfinished.SUFFIX)
    with _journal(partial.with_name(partial.name + JOURNAL)) as journal:
        done = _resume(partial, journal, layout, force=force, tell=tell)
        with partial.open("r+b") as file:
            _append(file, journal, layout, done, tell)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            file.write(gguf_header.MAGIC)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
        Path(journal.name).unlink()
    return layout


@contextlib.contextmanager
def _journal(path: Path) -> Iterator[BinaryIO]:
    """The journal, for this process alone."""
    try:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield file
            finally:
                # A run that was refused leaves nothing behind.
                if not file.seek(0, os.SEEK_END):
                    path.unlink()
    except BlockingIOError as error:
        raise InputError(f"{path}: another process is at this conversion; wait until it has ended") from error
    except (PermissionError, FileNotFoundError) as error:
        raise InputError(f"{error.filename}: cannot be written: {error.strerror}") from error


def _resume(partial: Path, journal: BinaryIO, layout: Plan, *, force: bool, tell: Progress) -> int:
    """Bring file and journal to the end of the last tensor that is whole; returns how many are."""
    first = json.dumps({"origin": layout.origin}).encode()
    journal.seek(0)
    # What follows the last end of a line was not written to its end.
    lines = journal.read().split(b"\n")[:-1] if partial.exists() else []
    if lines and lines[0] != first and not force:
        raise InputError(
            f"{partial}: began from other files or with another --dense; give the same again, delete it, or begin anew by --force"
        )
    _require_room(partial, layout)
    done, end, magic = 0, len(layout.header), len(unfinished.MAGIC)
    if lines[:1] == [first]:
        with partial.open("rb") as file:
            if file.read(end)[magic:] == layout.header[magic:]:
                done, end = _checked(file, lines[1:], layout, tell)
    if done:
        with partial.open("r+b") as file:
            # It may have been killed between the last byte and the renaming.
            file.write(unfinished.MAGIC)
            file.truncate(end)
        journal.truncate(sum(len(line) + 1 for line in lines[: 1 + done]))
        return done
    journal.truncate(0)
    with replacing(partial) as beginning:
        beginning.write_bytes(unfinished.MAGIC + layout.header[magic:])
    journal.write(first + b"\n")
    journal.flush()
    return 0


def _checked(file: BinaryIO, lines: list[bytes], layout: Plan, tell: Progress) -> tuple[int, int]:
    """How many tensors have the checksums of the journal, and where in the file the last of these ends."""
    done, end = 0, len(layout.header)
    for line, (name, source) in zip(lines, layout.sources.items(), strict=False):
        left, checksum = source.nbytes, 0
        while left and (chunk := file.read(min(left, _CHUNK))):
            checksum = zlib.crc32(chunk, checksum)
            left -= len(chunk)
        if left or line != _line(name, checksum):
            break
        padding = -source.nbytes % ALIGNMENT
        if len(file.read(padding)) < padding:
            break
        done, end = done + 1, end + source.nbytes + padding
        tell("checking", end, layout.nbytes)
    return done, end


def _append(file: BinaryIO, journal: BinaryIO, layout: Plan, done: int, tell: Progress) -> None:
    """Write the tensors that are missing, each with its line in the journal."""
    end = file.seek(0, os.SEEK_END)
    for name, source in list(layout.sources.items())[done:]:
        checksum = 0
        for piece in source.pieces():
            data = piece.tobytes()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
            end += len(data)
            tell("converting", end, layout.nbytes)
        end += file.write(bytes(-source.nbytes % ALIGNMENT))
        file.flush()
        journal.write(_line(name, checksum) + b"\n")
        journal.flush()
    tell("converting", end, layout.nbytes)


def _line(name: str, checksum: int) -> bytes:
    return json.dumps({"tensor": name, "crc32": checksum}).encode()


def _require_room(partial: Path, layout: Plan) -> None:
    """Refuse to begin what cannot end for want of space."""
    needed = layout.nbytes - (partial.stat().st_size if partial.exists() else 0)
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise InputError(
            f"{partial.parent}: free space: the conversion needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free; "
            "make room or write to another disk"
        )
