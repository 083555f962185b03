"""Write GGUF files from a model's files, a tensor at a time. An interrupted conversion resumes where it stopped.

Until all files are complete, a partial file (`unfinished.SUFFIX`) stands next to the path of each, and a journal next to that of
the model. A partial file differs from the final one in its magic. The journal is lines of JSON: the conversion's origin, then the
checksum of each complete tensor, file after file. A second run checks all checksums before it appends, so a crash or a damaged
disk cannot corrupt the result. The files get their names together, the model's last.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ds4jax.errors import InputError
from ds4jax.files import replacing, same_file
from ds4jax.loading import unfinished
from ds4jax.loading.convert_sources import SideBySide, Source
from ds4jax.loading.gguf_write import ALIGNMENT, Entry, header

JOURNAL = ".journal"
# The file of a model's MTP block or DSpark drafter has the model's name after one of these.
MTP_PREFIX, DSPARK_PREFIX = "mtp-", "dspark-"
# Bytes of one checksum step.
_CHUNK = 1 << 24

# Called with "checking" or "converting", the bytes of the files that are done, and the bytes of the complete files.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Output:
    """A file to write.

    Attributes:
        path: its name when it is complete.
        header: its bytes before its data.
        sources: its tensors in order.
        alignment: multiple of bytes at which each tensor ends, filled up with zeros.
    """

    path: Path
    header: bytes
    sources: dict[str, Source]
    alignment: int = ALIGNMENT

    @property
    def partial(self) -> Path:
        """Its name until then."""
        return self.path.with_name(self.path.name + unfinished.SUFFIX)

    @property
    def nbytes(self) -> int:
        """Bytes of the complete file."""
        return len(self.header) + sum(source.nbytes + self.padding(source) for source in self.sources.values())

    def padding(self, source: Source) -> int:
        """Zeros after a tensor."""
        return -source.nbytes % self.alignment


@dataclasses.dataclass(frozen=True)
class Plan:
    """The files that a conversion writes.

    Attributes:
        outputs: the model's file first, then that of its drafter.
        origin: a digest of the headers and of the names, sizes and times of the files that are read. A conversion resumes only
            if it is equal.
        files: every file of the checkpoint, its drafter's too, also where it is not read; none is written over.
        note: tensors that are not used, as by `checkpoint.note`, and what became of the drafter's file.
        beside: paths at which a file would be read with the new ones, such as a drafter's.
    """

    outputs: tuple[Output, ...]
    origin: str
    files: tuple[Path, ...]
    note: str
    beside: tuple[Path, ...]

    @property
    def stale(self) -> tuple[Path, ...]:
        """Files of an earlier model that would be read with the new ones: neither written nor of the checkpoint."""
        written = {output.path for output in self.outputs}
        return tuple(path for path in self.beside if path.exists() and path not in written and not same_file(path, self.files))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(output.nbytes for output in self.outputs)


def write(plan: Plan, *, force: bool = False, progress: Progress | None = None) -> tuple[Path, ...]:
    """Write the files of a plan, or resume an interrupted conversion with the same plan.

    The files appear when all are complete. Their bytes do not depend on interruptions.

    Args:
        force: replace existing files, but never one of the checkpoint, remove those of `Plan.stale`, and discard an unfinished
            conversion of other files.
        progress: called every few megabytes.

    Returns:
        The files that it removed.

    Raises:
        InputError: a file exists, is one of the checkpoint, or cannot be written; another process converts to it; an
            unfinished conversion there has another origin; a partial file there is of something else; a file of `Plan.stale`
            is there without `force`; or the disk has too little space. If writing failed midway, the next run resumes.
    """
    report = progress or (lambda stage, done, total: None)
    main = plan.outputs[0]
    require_free(main.path, force=force)
    stale = plan.stale
    if stale and not force:
        raise InputError(f"{stale[0]}: would be read with {main.path.name}; move it away, or give --force to remove it")
    journal_path = main.partial.with_name(main.partial.name + JOURNAL)
    _require_own([journal_path, *stale, *(path for output in plan.outputs for path in (output.path, output.partial))], plan.files)
    with _journal(journal_path) as journal:
        done = _resume(plan, journal, force=force, report=report)
        _append(plan, journal, done, report)
        for output in plan.outputs:
            with _writing(output.partial), output.partial.open("r+b") as file:
                file.write(output.header[: len(unfinished.MAGIC)])
                file.flush()
                os.fsync(file.fileno())
        for path in stale:
            path.unlink()
        for output in reversed(plan.outputs):
            os.replace(output.partial, output.path)
        journal_path.unlink()
    return stale


def drafters_of(out: Path) -> tuple[Path, ...]:
    """The names of the drafter's file of a model's file; none where the name does not end as those that are looked for."""
    return tuple(out.with_name(prefix + out.name) for prefix in (MTP_PREFIX, DSPARK_PREFIX)) if out.suffix == ".gguf" else ()


def joined(names: Mapping[str, Sequence[str]], by_name: Mapping[str, Source]) -> dict[str, Source]:
    """The tensors of a file from parameters; those that lie in one tensor are side by side."""
    return {
        gguf_name: by_name[parts[0]] if len(parts) == 1 else SideBySide(tuple(by_name[part] for part in parts))
        for gguf_name, parts in names.items()
    }


def output(path: Path, architecture: str, metadata: Iterable[Entry], sources: dict[str, Source]) -> Output:
    """A file of these tensors with this metadata.

    Raises:
        InputError: matrices that would lie side by side have two types.
    """
    for name, source in sources.items():
        forms = sorted({part.form for part in source.parts}) if isinstance(source, SideBySide) else []
        if len(forms) > 1:
            raise InputError(
                f"{path}: {name}: would be made of {' and '.join(forms)}; give them one type by --dense or --requantise"
            )
    rows = [(name, source.shape, source.form, source.nbytes) for name, source in sources.items()]
    return Output(path, header(architecture, metadata, rows), sources)


def digest(outputs: Iterable[Output], files: Iterable[Path]) -> str:
    """The origin of a conversion: a digest of its headers and of the names, sizes and times of the files that it reads."""
    found = hashlib.sha256()
    for output in outputs:
        found.update(output.header)
    for file in sorted(files):
        status = file.stat()
        found.update(json.dumps([file.name, status.st_size, status.st_mtime_ns]).encode())
    return found.hexdigest()


def require_free(path: Path, *, force: bool) -> None:
    """Refuse to write over an existing file without `force`, and over anything else.

    Raises:
        InputError: it exists.
    """
    if path.exists() and not (force and path.is_file()):
        advice = "give --force to replace it" if path.is_file() else "give the name of a file"
        raise InputError(f"{path}: exists already; {advice}")


def _require_own(paths: Iterable[Path], inputs: tuple[Path, ...]) -> None:
    """Refuse to write over anything but files that an earlier run may have left."""
    for path in paths:
        other = same_file(path, inputs)
        if other is not None:
            raise InputError(f"{path}: is {other.name} of the checkpoint that is being converted; give another name")
        if os.path.lexists(path) and not path.is_file():
            raise InputError(f"{path}: the conversion writes here, and something else than a file is in the way; remove it")


@contextlib.contextmanager
def _journal(path: Path) -> Iterator[BinaryIO]:
    """The journal, locked for this process."""
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
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file of an error while it is written: a full disk tells no name."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}; when that is mended, the same command goes on from here"
        ) from error


def _resume(plan: Plan, journal: BinaryIO, *, force: bool, report: Progress) -> int:
    """Truncate files and journal to the end of the last complete tensor; returns the number of complete tensors."""
    first = json.dumps({"origin": plan.origin}).encode()
    journal.seek(0)
    # The last line is incomplete unless it ends in a newline.
    lines = journal.read().split(b"\n")[:-1]
    if lines and lines[0] != first and not force and plan.outputs[0].partial.exists():
        raise InputError(
            f"{plan.outputs[0].partial}: began from other files or with other options; give the same again, delete it, "
            "or begin anew by --force"
        )
    if not lines and not force:
        _require_begun(plan)
    ours = lines[:1] == [first]
    for output in plan.outputs:
        if ours:
            _take_back(output)
        require_free(output.path, force=force)
    _require_room(plan)
    done, ends = _checked(plan, lines[1:], report) if ours else (0, [])
    if not done:
        _begin(plan, journal, first)
        return 0
    for output, end in zip(plan.outputs, ends, strict=True):
        with output.partial.open("r+b") as file:
            # A run may have been killed between the final magic and the new name.
            file.write(unfinished.MAGIC)
            file.truncate(end)
    journal.truncate(sum(len(line) + 1 for line in lines[: 1 + done]))
    return done


def _require_begun(plan: Plan) -> None:
    """Refuse partial files that nothing but their names would say to be this conversion's: there is no journal."""
    for output in plan.outputs:
        if not output.partial.exists():
            continue
        with output.partial.open("rb") as file:
            begin = file.read(len(output.header))
        if begin not in (output.header, unfinished.MAGIC + output.header[len(unfinished.MAGIC) :]):
            raise InputError(f"{output.partial}: is not of this conversion; move it away, or give --force to replace it")


def _take_back(output: Output) -> None:
    """Give a file that a killed run has finished the name of a partial one, since the other files are not finished."""
    if output.partial.exists() or not output.path.exists():
        return
    with output.path.open("rb") as file:
        own = file.read(len(output.header)) == output.header
    if own:
        os.replace(output.path, output.partial)


def _begin(plan: Plan, journal: BinaryIO, first: bytes) -> None:
    """Write all headers anew, then the journal's first line."""
    journal.truncate(0)
    for output in plan.outputs:
        with _writing(output.partial), replacing(output.partial) as beginning:
            beginning.write_bytes(unfinished.MAGIC + output.header[len(unfinished.MAGIC) :])
    journal.write(first + b"\n")
    journal.flush()


def _checked(plan: Plan, lines: list[bytes], report: Progress) -> tuple[int, list[int]]:
    """Number of tensors that have the journal's checksums, and the offset in each file at which the last of them ends.

    Without one of the headers, nothing is complete.
    """
    ends = [len(output.header) for output in plan.outputs]
    done, total = 0, 0
    for i, output in enumerate(plan.outputs):
        if not output.partial.exists():
            return 0, ends
        with output.partial.open("rb") as file:
            if file.read(ends[i])[len(unfinished.MAGIC) :] != output.header[len(unfinished.MAGIC) :]:
                return 0, ends
            total += ends[i]
            # A file is begun when the one before it is complete.
            whole = done == sum(len(before.sources) for before in plan.outputs[:i])
            for line, (name, source) in zip(lines[done:], output.sources.items(), strict=False) if whole else ():
                if not _equals(file, name, source, output.padding(source), line):
                    break
                done += 1
                ends[i] += source.nbytes + output.padding(source)
                total += source.nbytes + output.padding(source)
                report("checking", total, plan.nbytes)
    return done, ends


def _equals(file: BinaryIO, name: str, source: Source, padding: int, line: bytes) -> bool:
    """Whether the file goes on with a tensor as the journal says."""
    left, checksum = source.nbytes, 0
    while left and (chunk := file.read(min(left, _CHUNK))):
        checksum = zlib.crc32(chunk, checksum)
        left -= len(chunk)
    return not left and line == _line(name, checksum) and len(file.read(padding)) == padding


def _append(plan: Plan, journal: BinaryIO, done: int, report: Progress) -> None:
    """Append the missing tensors to the files, and each one's line to the journal."""
    written = 0
    for output in plan.outputs:
        with _writing(output.partial), output.partial.open("r+b") as file:
            start = written
            written += file.seek(0, os.SEEK_END)
            for name, source in list(output.sources.items())[max(done, 0) :]:
                checksum = 0
                for piece in source.pieces():
                    data = piece.tobytes()
                    file.write(data)
                    checksum = zlib.crc32(data, checksum)
                    written += len(data)
                    report("converting", written, plan.nbytes)
                written += file.write(bytes(output.padding(source)))
                file.flush()
                journal.write(_line(name, checksum) + b"\n")
                journal.flush()
            os.fsync(file.fileno())
            assert written - start == output.nbytes, output.path
        done -= len(output.sources)
    report("converting", written, plan.nbytes)


def _line(name: str, checksum: int) -> bytes:
    return json.dumps({"tensor": name, "crc32": checksum}).encode()


def _require_room(plan: Plan) -> None:
    """Refuse a conversion for which the disk has too little free space."""
    needed = sum(output.nbytes - (output.partial.stat().st_size if output.partial.exists() else 0) for output in plan.outputs)
    folder = plan.outputs[0].path.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: free space: the conversion needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free; "
            "make room or write to another disk"
        )
