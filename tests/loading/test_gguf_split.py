"""Split files: a whole set opens as one file, and a set that is not whole is refused with the shard at fault."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SMALL, random_tensors
from split_files import CASES, key, shard, shards, split_keys, unpacked, write_set

from ds4jax.errors import InputError
from ds4jax.loading import gguf_values
from ds4jax.loading.gguf_header import Header, read_header
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.gguf_values import reading
from ds4jax.loading.gguf_write import write_gguf
from ds4jax.loading.limits import MAX_SHARDS

SHARED = Path(__file__).resolve().parents[3] / "shared"
CONTAINER = [name for name, case in CASES.items() if case["stage"] == "container"]
MAX_BYTES = 50e6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in one file, of the published types."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    write_gguf(path, SMALL, random_tensors(SMALL), quantize=True)
    return path


def assert_same(found: Header, expected: Header) -> None:
    """The same tensors with the same bytes, and the same metadata in the same order."""
    assert found.tensors.keys() == expected.tensors.keys()
    for name, info in expected.tensors.items():
        ours = found.tensors[name]
        assert (ours.type, ours.shape) == (info.type, info.shape)
        np.testing.assert_array_equal(found.raw(ours), expected.raw(info), err_msg=name)
    plain = {key: value for key, value in expected.metadata.items() if not key.startswith("split.")}
    assert list(found.metadata) == list(plain)
    for name, value in plain.items():
        assert found.metadata[name].type == value.type
        np.testing.assert_array_equal(found.metadata[name].value, value.value, err_msg=name)


@pytest.mark.parametrize("sizes", [(0, 20), (15, 1), (0, 0, 7)], ids=str)
def test_a_set_is_the_file_that_was_cut(sizes: tuple[int, ...], whole: Path, tmp_path: Path) -> None:
    paths = write_set(tmp_path, shards(whole, sizes))
    expected = read_header(whole)
    for given in paths:
        found = open_set(given)
        assert_same(found, expected)
        assert (found.path, found.files) == (paths[0], tuple(paths))
    order = sorted(found.tensors.values(), key=lambda info: info.place)
    assert [info.name for info in order] == list(expected.tensors)
    last = order[-1]
    assert found.where(last) == f"{paths[-1]}: {last.name}"


@pytest.mark.parametrize("name", ["ok_split", "ok_split_tensors_first", "second_shard_given"])
def test_golden_sets_are_the_control(name: str, tmp_path: Path) -> None:
    assert_same(open_set(unpacked(name, tmp_path)), read_header(unpacked("ok_control", tmp_path)))


@pytest.mark.parametrize(
    ("first", "whole_file"),
    [
        ("golden_mainline/split/tensors_first-00001-of-00003.gguf", "golden_mainline/mxfp4_moe.gguf"),
        ("golden_llamacpp/split/Q4_K_M-00001-of-00003.gguf", "golden_llamacpp/Q4_K_M.gguf"),
    ],
)
def test_shared_sets_are_their_whole_files(first: str, whole_file: str) -> None:
    if not (SHARED / first).exists():
        pytest.skip("the golden sets of split files lie beside the checkout only where they were shared")
    assert_same(open_set(SHARED / first), open_set(SHARED / whole_file))


def test_values_of_a_later_shard(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read with the bytes before them, as large tensors are."""
    monkeypatch.setattr(gguf_values, "_SMALL", 0)
    found, expected = open_set(write_set(tmp_path, shards(whole, (0, 20)))[1]), read_header(whole)
    for name in ("token_embd.weight", "blk.2.attn_q_b.weight"):
        ours, theirs = found.tensors[name], expected.tensors[name]
        assert ours.shard
        one, other = reading(found, ours, 4).value(), reading(expected, theirs, 4).value()
        np.testing.assert_array_equal(getattr(one, "quants", one), getattr(other, "quants", other), err_msg=name)


def test_a_broken_value_names_its_shard(whole: Path, tmp_path: Path) -> None:
    paths = write_set(tmp_path, shards(whole, (0, 20)))
    name = "output_norm.weight"
    info = read_header(paths[1]).tensors[name]
    with paths[1].open("r+b") as file:
        file.seek(info.offset)
        file.write(struct.pack("<f", float("nan")))
    found = open_set(paths[0])
    with pytest.raises(InputError) as error:
        reading(found, found.tensors[name], 4).value()
    assert str(error.value) == f"{paths[1]}: {name}: value [0] is not finite"


def refused(path: Path, shard_at_fault: Path) -> str:
    """The message of a refusal without the shard's path, with which it begins; it comes quickly and takes little memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(InputError) as error:
            open_set(path)
        assert time.process_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.startswith(f"{shard_at_fault}: ")
    assert "\n" not in message
    assert len(message) < 400 + len(str(shard_at_fault))
    return message.removeprefix(f"{shard_at_fault}: ")


@pytest.mark.parametrize("name", [name for name in CONTAINER if CASES[name]["expect"] == "refuse"] + ["shards_swapped"])
def test_golden_broken_files(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    with pytest.raises(InputError) as error:
        open_set(path)
    message = str(error.value)
    refused(path, Path(message.split(": ")[0]))
    for alternatives in CASES[name]["must_mention"]:
        assert any(alternative in message for alternative in alternatives), message


def exchange(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


# What is done to the files of a set of three, the shard at fault, and the message.
BROKEN: dict[str, tuple[Callable[[list[Path]], object], int, str]] = {
    "second is missing": (lambda paths: paths[1].unlink(), 1, "no such file: shard 2 of 3 is missing; put all of them into one"),
    "first is missing": (lambda paths: paths[0].unlink(), 0, "no such file: shard 1 of 3 is missing; put all of them into one"),
    "a folder": (lambda paths: (paths[1].unlink(), paths[1].mkdir()), 1, "not a file"),
    "a pipe": (lambda paths: (paths[1].unlink(), os.mkfifo(paths[1])), 1, "cannot be read: a pipe"),
    "empty": (lambda paths: paths[2].write_bytes(b""), 2, "the file is empty"),
    "cut in its data": (lambda paths: os.truncate(paths[2], paths[2].stat().st_size - 1), 2, "past the end of file"),
    "cut in its header": (lambda paths: os.truncate(paths[2], 60), 2, "tensor count is "),
    "a copy": (lambda paths: paths[2].write_bytes(paths[1].read_bytes()), 2, "split.no: is 1; shard 3 of 3 must have 2"),
    "exchanged": (lambda paths: exchange(*paths[1:]), 1, "split.no: is 2; shard 2 of 3 must have 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_set_with_a_broken_shard(case: str, whole: Path, tmp_path: Path) -> None:
    """Given by any of its shards that are there."""
    paths = write_set(tmp_path, shards(whole, (0, 20)))
    change, at_fault, message = BROKEN[case]
    change(paths)
    for given in filter(Path.exists, paths):
        assert message in refused(given, paths[at_fault])


NO, COUNT, TOTAL = split_keys(1, 3, 5)
FLOAT = struct.pack("<Q", 11) + b"split.count" + struct.pack("<If", 6, 3.0)
OTHER = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 6) + b"dflash"
# The metadata entries of the second of three shards with 5 tensors in all, and the message.
WRONG = {
    "count": ([NO, key("split.count", "H", 4), TOTAL], "split.count: is 4; shard 2 of 3 must have 3"),
    "no number": ([COUNT, TOTAL], "split.no: this key is missing"),
    "no count": ([NO, TOTAL], "split.count: this key is missing"),
    "no keys": ([], "split.count: this key is missing"),
    "total": (split_keys(1, 3, 7), "split.tensors.count: is 7, and 5 in set-00001-of-00003.gguf; this shard belongs"),
    "float": ([NO, FLOAT, TOTAL], "split.count: it must be an integer, not f32"),
    "negative": ([key("split.no", "i", -1), COUNT, TOTAL], "split.no: is -1; shard 2 of 3 must have 1"),
    "architecture": ([NO, COUNT, TOTAL, OTHER], "general.architecture: differs from set-00001-of-00003.gguf"),
}


@pytest.mark.parametrize("case", WRONG)
def test_keys_of_a_shard(case: str, whole: Path, tmp_path: Path) -> None:
    header = read_header(whole)
    infos = list(header.tensors.values())[:5]
    entries, message = WRONG[case]
    raw = [
        shard(header, infos[:2], split_keys(0, 3, 5), metadata=True),
        shard(header, infos[2:3], entries, metadata=False),
        shard(header, infos[3:], split_keys(2, 3, 5), metadata=False),
    ]
    paths = write_set(tmp_path, raw)
    for given in (paths[0], paths[2]):
        assert refused(given, paths[1]).startswith(message)


@pytest.mark.parametrize(("total", "twice", "at_fault"), [(6, False, 0), (4, False, 0), (6, True, 1)])
def test_tensors_of_a_set(total: int, twice: bool, at_fault: int, whole: Path, tmp_path: Path) -> None:
    header = read_header(whole)
    infos = list(header.tensors.values())[:5]
    first = shard(header, infos[:3], split_keys(0, 2, total), metadata=True)
    second = shard(header, infos[2 if twice else 3 :], split_keys(1, 2, total), metadata=False)
    paths = write_set(tmp_path, [first, second])
    message = refused(paths[1], paths[at_fault])
    if twice:
        assert message == f"{infos[2].name}: this tensor is in set-00001-of-00002.gguf as well"
    else:
        assert message == f"split.tensors.count: is {total}; its 2 shards have 5 tensors together"


def test_a_shard_may_repeat_metadata(whole: Path, tmp_path: Path) -> None:
    header = read_header(whole)
    infos = list(header.tensors.values())
    first = shard(header, infos[:3], split_keys(0, 2, len(infos)), metadata=True)
    second = shard(header, infos[3:], split_keys(1, 2, len(infos)), metadata=True)
    assert_same(open_set(write_set(tmp_path, [first, second])[0]), header)


# What a file says of itself and its name: with other shards beside it or not, it opens or is refused with a message.
ALONE = {
    "no keys, plain name": ([], "model.gguf", ""),
    "no keys, a shard's name": ([], "set-00001-of-00003.gguf", ""),
    "no keys, the name of a later shard": ([], "set-00003-of-00003.gguf", ""),
    "merged": (split_keys(0, 0, 5), "model.gguf", ""),
    "merged, a shard's name": (split_keys(0, 0, 5), "set-00001-of-00003.gguf", ""),
    "merged from more": (split_keys(0, 0, 6), "model.gguf", "split.tensors.count: is 6; the file is not split and has 5 tensors"),
    "one of one": (split_keys(0, 1, 5), "set-00001-of-00001.gguf", ""),
    "one of one, renamed": (split_keys(0, 1, 5), "model.gguf", ""),
    "one of one, a name of three": (split_keys(0, 1, 5), "set-00001-of-00003.gguf", "split.count: is 1; 3 is expected"),
    "negative": ([NO, TOTAL, key("split.count", "i", -3)], "model.gguf", "split.count: is -3; 1 is expected"),
    "renamed shard": (split_keys(1, 3, 5), "model.gguf", "it is shard 2 of 3; name it NAME-00002-of-00003.gguf and put"),
    "a name of four": (split_keys(1, 3, 5), "set-00002-of-00004.gguf", "split.count: is 3; its name says 4"),
    "the fourth of three": (split_keys(3, 3, 5), "set-00004-of-00003.gguf", "its name says shard 4 of 3"),
    "shard 0": (split_keys(0, 3, 5), "set-00000-of-00003.gguf", "its name says shard 0 of 3"),
    "too many": (
        [NO, TOTAL, key("split.count", "I", 99999)],
        "set-00001-of-99999.gguf",
        f"split.count: is 99999; at most {MAX_SHARDS} shards can be read: merge them",
    ),
    "a billion": ([NO, TOTAL, key("split.count", "I", 1 << 30)], "set-00002-of-00003.gguf", "split.count: is 1073741824"),
}


@pytest.mark.parametrize("case", ALONE)
def test_a_file_alone(case: str, whole: Path, tmp_path: Path) -> None:
    entries, name, message = ALONE[case]
    header, path = read_header(whole), tmp_path / name
    path.write_bytes(shard(header, list(header.tensors.values())[:5], entries, metadata=True))
    if message:
        assert refused(path, path).startswith(message)
        return
    found = open_set(path)
    assert (len(found.tensors), found.files, list(found.metadata)) == (5, (path,), list(header.metadata))


def test_a_file_without_keys_beside_other_shards(whole: Path, tmp_path: Path) -> None:
    paths = write_set(tmp_path, shards(whole, (0, 20)))
    paths[2].write_bytes(whole.read_bytes())
    message = "split.count: this key is missing; its name says shard 3 of 3, and set-00001-of-00003.gguf lies beside it"
    assert refused(paths[2], paths[2]) == message


def test_links_lead_to_the_set(whole: Path, tmp_path: Path) -> None:
    """One under another name, and those of a folder whose files have none, as the hub's cache makes them."""
    folder, cache = tmp_path / "set", tmp_path / "cache"
    folder.mkdir()
    cache.mkdir()
    paths = write_set(folder, shards(whole, (0, 20)))
    link = tmp_path / "model.gguf"
    link.symlink_to(paths[1])
    assert open_set(link).files == tuple(paths)
    for number, path in enumerate(paths):
        path.rename(cache / f"blob{number}")
        path.symlink_to(cache / f"blob{number}")
    assert_same(open_set(paths[2]), read_header(whole))


def test_a_stem_of_any_characters(whole: Path, tmp_path: Path) -> None:
    paths = write_set(tmp_path, shards(whole, (0, 20)), stem="line\nbreak")
    assert len(open_set(paths[1]).shards) == 3
