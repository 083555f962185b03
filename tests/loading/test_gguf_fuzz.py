"""Mutated files and sets of shards: each opens or is refused in one line, quickly and with little memory.

Case `n` is the same in every run: `mutated_set(..., n)` makes it again.
"""

from __future__ import annotations

import dataclasses
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SMALL, random_tensors, vocabulary
from split_files import shards

from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.loading.gguf_header import read_header
from ds4jax.loading.gguf_write import write_gguf

QUICK, ALL = 40, 1700
MAX_BYTES = 50e6
# Values that a count, length, type or offset may turn into.
INTERESTING = [0, 1, 2, 3, 4, 8, 9, 12, 31, 39, 139, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**60, 2**63 - 1, 2**64 - 1]


@dataclasses.dataclass(frozen=True)
class Whole:
    """The bytes of a file, the length of its header, and where its numbers are: beside names lie lengths, types and values."""

    raw: bytes
    end: int
    numbers: list[int]


def whole(raw: bytes, scratch: Path) -> Whole:
    scratch.write_bytes(raw)
    header = read_header(scratch)
    end = min((info.offset for info in header.tensors.values()), default=len(raw))
    names = [name.encode() for name in (*header.metadata, *header.tensors)]
    starts = [raw.index(struct.pack("<Q", len(name)) + name) for name in names]
    numbers = [place for start, name in zip(starts, names, strict=True) for place in (start, start + 8 + len(name))]
    return Whole(raw, end, [4, 8, 16, *numbers])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[list[Whole]]:
    """A small model with its MTP block and without a vocabulary or with one, whole and in shards of both kinds."""
    folder = tmp_path_factory.mktemp("whole")
    plain, full = folder / "plain.gguf", folder / "full.gguf"
    write_gguf(plain, SMALL, random_tensors(SMALL), quantize=True)
    write_gguf(full, SMALL, random_tensors(SMALL), quantize=True, **vocabulary())
    made = [[plain.read_bytes()], [full.read_bytes()], shards(plain, (0, 30)), shards(full, (50, 30))]
    return [[whole(raw, folder / "scratch.gguf") for raw in one] for one in made]


def mutated(one: Whole, random: np.random.Generator) -> bytes:
    """The file with one to three parts of its header overwritten, half of them at a number, and possibly cut off."""
    raw = bytearray(one.raw)
    for _ in range(random.integers(1, 4)):
        at_number = random.integers(2)
        place = int(random.choice(one.numbers) + random.integers(8) * 4 if at_number else random.integers(one.end))
        number = struct.pack("<Q", INTERESTING[random.integers(len(INTERESTING))])
        patch = [random.bytes(random.integers(1, 9)), number, number[:4], number[:2]][random.integers(4)]
        raw[place : place + len(patch)] = patch
    return bytes(raw[: random.integers(len(raw) + 1)] if random.integers(5) == 0 else raw)


def disturb(paths: list[Path], random: np.random.Generator) -> None:
    """Lose, exchange, copy, rename or empty files of a set, or put a folder or another number into a name."""
    one, other = random.choice(len(paths), 2)
    kept = paths[one].read_bytes()
    match random.integers(7):
        case 0:
            paths[one].unlink()
        case 1:
            paths[one].write_bytes(paths[other].read_bytes())
            paths[other].write_bytes(kept)
        case 2:
            paths[other].write_bytes(kept)
        case 3:
            paths[one].unlink()
            paths[one].mkdir()
        case 4:
            count = random.choice([0, 1, 2, 4, 99999])
            paths[one] = paths[one].rename(paths[one].with_name(f"set-{random.integers(5):05}-of-{count:05}.gguf"))
        case 5:
            paths[one] = paths[one].rename(paths[one].with_name("renamed.gguf"))
        case _:
            paths[one].write_bytes(b"")


def mutated_set(sets: list[list[Whole]], folder: Path, case: int) -> Path:
    """Write case `case` into an empty folder; returns the file to open."""
    random = np.random.default_rng(case)
    members = sets[case % len(sets)]
    paths = [folder / f"set-{number:05}-of-{len(members):05}.gguf" for number in range(1, len(members) + 1)]
    for path, one in zip(paths, members, strict=True):
        path.write_bytes(one.raw)
    if len(members) > 1 and random.integers(2):
        disturb(paths, random)
    chosen = int(random.integers(len(paths)))
    if len(members) == 1 or random.integers(2):
        if paths[chosen].is_file():
            paths[chosen].write_bytes(mutated(members[chosen], random))
    return paths[int(random.integers(len(paths)))]


@pytest.mark.parametrize(
    "cases",
    [pytest.param(range(2 * QUICK), id="quick"), pytest.param(range(2 * QUICK, 2 * ALL), id="all", marks=pytest.mark.slow)],
)
def test_mutated_files_open_or_are_refused(cases: range, sets: list[list[Whole]], tmp_path: Path) -> None:
    opened = 0
    # The first call for a folder imports the hub's loader, which takes longer than a case may.
    with pytest.raises(InputError):
        open_checkpoint(tmp_path)
    for case in cases:
        folder = tmp_path / str(case)
        folder.mkdir()
        path = mutated_set(sets, folder, case)
        message = ""
        tracemalloc.start()
        start = time.process_time()
        try:
            open_checkpoint(path)
        except InputError as error:
            message = str(error)
        taken, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert taken < 1, case
        assert peak < MAX_BYTES, case
        assert not message or message.startswith(f"{folder}/"), (case, message)
        assert "\n" not in message, case
        opened += not message
        shutil.rmtree(folder)
    # Neither all of them are harmless nor all fatal.
    assert 0.05 * len(cases) < opened < 0.8 * len(cases)
