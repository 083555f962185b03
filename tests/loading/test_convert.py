"""`ds4jax.convert`: the same GGUF file, whether or not the conversion was killed."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import v4_vocabulary
from numerics import GOLDEN, arrays, assert_bits_equal

import ds4jax
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel
from ds4jax.loading import hub, open_checkpoint
from ds4jax.loading.convert import convert, plan
from ds4jax.loading.gguf_write import write_gguf
from ds4jax.loading.hub import open_hub
from ds4jax.loading.hub_vocabulary import read_vocabulary
from ds4jax.model.parameters import build
from ds4jax.text.tokenizer import BOS, BYTE_OF, EOS, Tokenizer, build_bpe
from pallas_kernels.formats import MXFP4, Quantized

HUB = GOLDEN / "hub"
GIB = 1 << 30


@pytest.fixture(autouse=True)
def shapes_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing the model takes a second, and every conversion here is one of the same model."""
    monkeypatch.setattr(hub, "shapes", functools.cache(hub.shapes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's file of a conversion without interruption; that of its MTP block lies beside it."""
    out = tmp_path_factory.mktemp("whole") / "golden.gguf"
    convert(HUB, out)
    return out


def mtp_of(out: Path) -> Path:
    return out.with_name(f"mtp-{out.name}")


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def journal_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial.journal")


def refusal(path: Path) -> str:
    """The one-line error of opening it."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_unfinished(out: Path) -> None:
    """No file can be loaded, under its own name or another."""
    assert not out.exists()
    assert not mtp_of(out).exists()
    partial = partial_of(out)
    told = "an unfinished conversion, not a model; the same `ds4jax convert` again goes on with it"
    assert refusal(partial) == f"{partial}: {told}"
    assert refusal(partial_of(mtp_of(out))) == f"{partial_of(mtp_of(out))}: {told}"
    renamed = Path(shutil.copy(partial, out.with_name("renamed.gguf")))
    assert "an unfinished conversion" in refusal(renamed)
    renamed.unlink()


def assert_finished(out: Path, whole: Path) -> None:
    assert out.read_bytes() == whole.read_bytes()
    assert mtp_of(out).read_bytes() == mtp_of(whole).read_bytes()
    assert sorted(out.parent.iterdir()) == [out, mtp_of(out)]


class Watch:
    """Counts the bytes of each stage, and raises after a number of converted bytes."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.last: collections.Counter[str] = collections.Counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.last[stage] = done
        if stage == "converting" and self.limit is not None and done >= self.limit:
            raise KeyboardInterrupt


def interrupted(out: Path, limit: int, **options: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(HUB, out, progress=Watch(limit), **options)


@pytest.mark.parametrize("dense", ["q8_0", "bf16", "f32"])
def test_antirez_flavour_is_one_file(dense: str, tmp_path: Path) -> None:
    out = tmp_path / "golden.gguf"
    layout = convert(HUB, out, flavour="antirez", dense=dense)
    assert out.stat().st_size == layout.nbytes
    assert list(tmp_path.iterdir()) == [out]
    converted, directory = open_checkpoint(out), open_hub(HUB, dense=dense)
    assert converted.config == directory.config
    assert converted.no_mtp == ""
    assert converted.ignored == ()
    assert converted.metadata["ds4jax.converted_dense"] == dense
    values = {tensor.name: tensor.read() for tensor in converted.tensors}
    assert len(values) == len(directory.tensors)
    for tensor in directory.tensors:
        value, other = tensor.read(), values[tensor.name]
        assert type(value) is type(other), tensor.name
        if isinstance(value, Quantized):
            value, other = value.to_bytes(), other.to_bytes()
        assert_bits_equal(other, value)


def test_written_at_once_it_is_the_same_file(tmp_path: Path) -> None:
    out, again = tmp_path / "golden.gguf", tmp_path / "again.gguf"
    convert(HUB, out, flavour="antirez", dense="f32")
    directory = open_hub(HUB, dense="f32")
    tensors = {tensor.name: tensor.read() for tensor in directory.tensors}
    metadata = {"ds4jax.converted_dense": "f32"}
    write_gguf(again, directory.config, tensors, metadata=metadata, small="F32", embedding="F32")
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.long
def test_the_same_logits(tmp_path: Path) -> None:
    out = tmp_path / "golden.gguf"
    convert(HUB, out, flavour="antirez")
    directory = open_hub(HUB, dense="q8_0")
    weights = ((tensor.name, tensor.read()) for tensor in directory.tensors)
    ids = arrays("golden")["ids"][:9]
    expected = LanguageModel(build(directory.config, weights), None).logits(ids)["logits"]
    assert_bits_equal(ds4jax.load(out).logits(ids)["logits"], expected)


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 10))])
def test_killed_at_a_random_point(seed: int, whole: Path, tmp_path: Path) -> None:
    """The partial file ends at any byte, and the journal may list more than it holds."""
    out, size = tmp_path / "golden.gguf", whole.stat().st_size + mtp_of(whole).stat().st_size
    at = random.Random(seed).randrange(1, size)
    interrupted(out, at)
    with partial_of(out).open("r+b") as file:
        file.truncate(min(at, partial_of(out).stat().st_size))
    if at % 2:
        # An incomplete line of the journal.
        with journal_of(out).open("ab") as file:
            file.write(b'{"tensor": "blk')
    assert_unfinished(out)
    watch = Watch()
    convert(HUB, out, progress=watch)
    kept = watch.last["checking"]
    assert kept <= at
    # Only the interrupted tensor is converted twice.
    outputs = plan(HUB, out).outputs
    largest = max(source.nbytes for output in outputs for source in output.sources.values())
    assert at - max(kept, len(outputs[0].header)) <= largest + 32
    assert_finished(out, whole)


def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "golden.gguf"
    for at in np.linspace(1e5, whole.stat().st_size + mtp_of(whole).stat().st_size - 1, 6).astype(int):
        interrupted(out, int(at))
        assert_unfinished(out)
    convert(HUB, out)
    assert_finished(out, whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from ds4jax.loading.convert import convert

def kill(stage, done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)
"""


def test_kill_9(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "golden.gguf"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(HUB), str(out)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert_unfinished(out)
    watch = Watch()
    convert(HUB, out, progress=watch)
    assert watch.last["checking"] > len(plan(HUB, out).outputs[0].header)
    assert_finished(out, whole)


@pytest.mark.parametrize("last", ["golden.gguf", "mtp-golden.gguf"])
def test_killed_before_a_file_gets_its_name(last: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is complete, with its magic; only its name says that it is unfinished. The model's file gets its name last."""
    out = tmp_path / "golden.gguf"
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target == out.with_name(last):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(HUB, out)
    assert not out.exists()
    assert mtp_of(out).exists() == (last == out.name)
    assert partial_of(out).read_bytes() == whole.read_bytes()
    assert "an unfinished conversion" in refusal(partial_of(out))
    convert(HUB, out)
    assert_finished(out, whole)


@pytest.mark.parametrize("damage", ["header", "data", "padding missing", "journal", "no journal", "no file"])
def test_what_a_disk_can_do(damage: str, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "golden.gguf"
    interrupted(out, 2_000_000)
    content = bytearray(partial_of(out).read_bytes())
    lines = journal_of(out).read_bytes().splitlines(keepends=True)
    start = len(plan(HUB, out).outputs[0].header)
    if damage == "header":
        content[100] ^= 1
    elif damage == "data":
        content[start + 500_000] ^= 1
    elif damage == "padding missing":
        content = content[: start + 1_000_000]
    elif damage == "journal":
        lines[5] = lines[5].replace(b"crc32", b"crc33")
    partial_of(out).write_bytes(content)
    journal_of(out).write_bytes(b"".join(lines))
    if damage == "no journal":
        journal_of(out).unlink()
    elif damage == "no file":
        partial_of(out).unlink()
    convert(HUB, out)
    assert_finished(out, whole)


def test_refuses_a_beginning_of_something_else(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "golden.gguf"
    interrupted(out, 1_000_000, dense="bf16")
    before = partial_of(out).read_bytes(), journal_of(out).read_bytes()
    with pytest.raises(InputError, match="partial: began from other files or with other options"):
        convert(HUB, out)
    assert (partial_of(out).read_bytes(), journal_of(out).read_bytes()) == before
    convert(HUB, out, force=True)
    assert_finished(out, whole)


@pytest.mark.parametrize("name", ["golden.gguf", "mtp-golden.gguf"])
@pytest.mark.parametrize("content", [b"", pytest.param(b"precious", marks=pytest.mark.long), b"part and something else"])
def test_a_partial_file_of_another_program_stays(name: str, content: bytes, whole: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "golden.gguf", tmp_path / f"{name}.partial"
    other.write_bytes(content)
    with pytest.raises(InputError, match=f"{other}: is not of this conversion; move it away, or give --force to replace it"):
        convert(HUB, out)
    assert other.read_bytes() == content
    assert list(tmp_path.iterdir()) == [other]
    convert(HUB, out, force=True)
    assert_finished(out, whole)


def test_other_files_of_the_same_names_and_sizes(tmp_path: Path) -> None:
    copy, out = tmp_path / "hub", tmp_path / "golden.gguf"
    shutil.copytree(HUB, copy)
    with pytest.raises(KeyboardInterrupt):
        convert(copy, out, progress=Watch(1_000_000))
    shard = copy / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="began from other files"):
        convert(copy, out)


def test_a_file_that_is_there_stays(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "golden.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(InputError, match=f"{out}: exists already; give --force to replace it"):
        convert(HUB, out)
    mtp_of(out).write_bytes(b"precious, too")
    out.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{mtp_of(out)}: exists already; give --force to replace it"):
        convert(HUB, out)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "elsewhere").rename(out)
    # With --force the old file stays until the new one is complete.
    with pytest.raises(KeyboardInterrupt):
        convert(HUB, out, force=True, progress=Watch(1_000_000))
    assert (out.read_bytes(), mtp_of(out).read_bytes()) == (b"precious", b"precious, too")
    convert(HUB, out, force=True)
    assert_finished(out, whole)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: exists already; give the name of a file"):
        convert(HUB, tmp_path / "folder", force=True)


def test_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, usage = tmp_path / "golden.gguf", collections.namedtuple("usage", "total used free")
    total = plan(HUB, out).nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GIB, 0, total - 1))
    message = rf"{tmp_path}: free space: the conversion needs 0\.00 GB more, 0\.00 GB are free; make room"
    with pytest.raises(InputError, match=message):
        convert(HUB, out)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GIB, 0, total))
    interrupted(out, 2_000_000)
    # Bytes that are already written need no more space.
    left = total - partial_of(out).stat().st_size - partial_of(mtp_of(out)).stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GIB, 0, left))
    convert(HUB, out)


def test_two_at_once(tmp_path: Path) -> None:
    out = tmp_path / "golden.gguf"
    with journal_of(out).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is at this conversion"):
            convert(HUB, out)


def test_refuses_places(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: No such file"):
        convert(HUB, tmp_path / "none" / "out.gguf")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        convert(tmp_path, tmp_path / "out.gguf")


def with_tokenizer(folder: Path) -> tuple[Path, Tokenizer]:
    """The golden checkpoint with a vocabulary of 256 bytes, two merges and markers, the last of them not special."""
    shutil.copytree(HUB, folder)
    tokens = [BOS, EOS, *BYTE_OF, "th", "Ġth"]
    bpe = build_bpe(tokens, ["t h", "Ġ th"], [BOS, EOS, "<｜User｜>"])
    bpe.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    bpe.save(str(folder / "tokenizer.json"))
    return folder, Tokenizer.from_file(folder / "tokenizer.json")


def test_tokenizer(tmp_path: Path) -> None:
    directory, short = with_tokenizer(tmp_path / "hub")
    assert short.vocab_size == 262
    tokenizer = open_checkpoint(directory).tokenizer
    out = tmp_path / "golden.gguf"
    convert(directory, out)
    converted = open_checkpoint(out)
    assert tokenizer is not None
    assert converted.tokenizer is not None
    assert tokenizer.vocab_size == converted.tokenizer.vocab_size == converted.config.vocab_size == 512
    # Every id that the model may choose has a text, the same from the directory and from the file.
    assert [tokenizer.token_bytes(i) for i in range(512)] == [converted.tokenizer.token_bytes(i) for i in range(512)]
    assert tokenizer.decode([386]) == "[PAD386]"
    for text in ("in the  beginning 1234", f"{BOS}the<｜User｜> <think>\n\n语言", "[PAD300]"):
        for parse_special in (False, True):
            ids = tokenizer.encode(text, parse_special=parse_special)
            assert converted.tokenizer.encode(text, parse_special=parse_special) == ids
            assert converted.tokenizer.decode(ids) == tokenizer.decode(ids) == text
    types = collections.Counter(converted.metadata["tokenizer.ggml.token_type"].tolist())
    assert types == {1: 258, 3: 3, 4: 1, 5: 512 - 262}


def test_the_published_vocabulary() -> None:
    vocabulary = read_vocabulary(v4_vocabulary.path(), Config())
    assert len(vocabulary["tokens"]) == 129280
    assert vocabulary["tokens"][128803] == "<｜User｜>"
    raw = json.loads(v4_vocabulary.path().read_text("utf-8"))
    assert vocabulary["merges"] == raw["model"]["merges"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer: V4 has none"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}, "pre_tokenizer: is not V4's"),
        ({"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2}}}, "model: is not V4's byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": {"a": 2}, "merges": []}}, "of the 256 bytes have no token"),
    ],
)
def test_refuses_other_tokenizers(change: dict, says: str, tmp_path: Path) -> None:
    directory, _ = with_tokenizer(tmp_path / "hub")
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change))
    with pytest.raises(InputError, match=r"tokenizer\.json: ") as caught:
        convert(directory, tmp_path / "out.gguf")
    assert says in str(caught.value)
    assert not partial_of(tmp_path / "out.gguf").exists()


def test_refuses_more_tokens_than_the_model_has(tmp_path: Path) -> None:
    directory, _ = with_tokenizer(tmp_path / "hub")
    config = dataclasses.replace(open_hub(HUB).config, vocab_size=261)
    with pytest.raises(InputError, match="has 262 tokens; the model of config.json has 261"):
        read_vocabulary(directory / "tokenizer.json", config)


def test_no_stack_is_ever_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert's rows leave the reader in their final form, a part at a time."""
    source = plan(HUB, Path("out.gguf")).outputs[0].sources["blk.3.ffn_down_exps.weight"]
    pieces = list(source.pieces())
    assert [piece.shape for piece in pieces] == [(128, 2 * MXFP4.BLOCK_BYTES)] * 8
    assert sum(piece.nbytes for piece in pieces) == source.nbytes
