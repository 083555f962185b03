"""A saved session goes on to the last bit, a save that fails leaves the old file, and no broken file is taken for a session."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from numerics import arrays, assert_bits_equal, golden_model

import ds4jax
from ds4jax import decode, fingerprint, session_file
from ds4jax.drafter import MTPDrafter
from ds4jax.errors import InputError
from ds4jax.generation import Generation, Options, Snapshot
from ds4jax.language_model import LanguageModel
from ds4jax.sampling import Sampling
from ds4jax.saving import save
from ds4jax.session import Mark, Session

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"strict": True, "ignore_eos": True, "max_new_tokens": 40}
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, top_p=0.95, seed=3))
WANTED = 40


def text(start: int, count: int) -> list[int]:
    """Tokens of the golden text, from anywhere on."""
    return np.roll(arrays("golden")["ids"], -start)[:count].tolist()


def assert_same_text(actual: Generation, expected: Generation) -> None:
    """The same tokens, each chosen from the same bits."""
    first, second = actual.result(), expected.result()
    assert first.ids == second.ids
    assert_bits_equal(first.fingerprints, second.fingerprints)


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A fresh interpreter with this one's modules and cache."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, cwd=ROOT)


SAVES_UNTIL_KILLED = """
import sys
import conftest, test_saving as t
from ds4jax.session import Session
model = t.golden_model().with_max_draft(int(sys.argv[1]))
sessions = [Session(model, sampling=sampling, **t.OPTIONS) for sampling in t.SAMPLINGS]
generations = [session.stream(t.text(5, 30)) for session in sessions]
for i in range(10**9):
    for session, generation, path in zip(sessions, generations, sys.argv[2:]):
        generation.advance(1 + i % 3 if len(generation.ids) < t.WANTED - 15 else 0)
        session.save(path)
    if i == 3:
        print("saved", flush=True)
"""


@pytest.mark.parametrize("max_draft", [0, 2])
def test_killed_and_restored_it_says_what_it_would_have_said(max_draft: int, tmp_path: Path) -> None:
    paths = [tmp_path / "greedy", tmp_path / "sampled"]
    with child(SAVES_UNTIL_KILLED, max_draft, *paths) as process:
        assert process.stdout
        assert process.stdout.readline() == "saved\n"
        time.sleep(random.random() / 4)
        process.kill()
    model = golden_model().with_max_draft(max_draft)
    for path, sampling in zip(paths, SAMPLINGS, strict=True):
        uninterrupted = model.stream(text(5, 30), sampling=sampling, **OPTIONS)
        uninterrupted.advance(WANTED)
        session = ds4jax.restore(path, model)
        given = len(session.ids)
        assert 0 < given < WANTED
        generation = session.resume()
        assert session.reused >= 30 + given - 1
        generation.advance(WANTED - given)
        assert_same_text(generation, uninterrupted)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return golden_model()


@pytest.fixture(scope="module")
def whole(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session that was saved in the middle of its continuation."""
    session = Session(model, **OPTIONS)
    session.stream(text(0, 40)).advance(7)
    path = tmp_path_factory.mktemp("saved") / "whole"
    session.save(path)
    return path


def test_a_longer_prompt_goes_on_from_what_was_saved(model: LanguageModel, whole: Path, tmp_path: Path) -> None:
    kept = Session(model, **OPTIONS)
    prompt = text(0, 40)
    reply = kept.stream(prompt).advance(7)
    for longer in ([*prompt, *reply, *text(9, 12)], [*prompt[:-1], *text(9, 12)]):
        # What is asked of the session itself comes last: it is what the others are copies of.
        restored, forked = ds4jax.restore(whole, model), kept.fork()
        forked.save(tmp_path / "fork")
        assert restored.prompt_ids == kept.prompt_ids
        assert restored.ids == kept.ids
        branches = [restored, forked, ds4jax.restore(tmp_path / "fork", model), kept.fork()]
        generations = [branch.stream(longer) for branch in branches]
        for generation in generations:
            generation.advance(8)
        for branch, generation in zip(branches, generations, strict=True):
            assert_same_text(generation, generations[-1])
            assert branch.reused == branches[-1].reused
        assert branches[-1].reused == (len(prompt) + len(reply) - 1 if longer[: len(prompt)] == prompt else len(prompt) - 2)
        assert generations[-1].ids == list(model.generate(longer, **OPTIONS | {"max_new_tokens": 8}).ids)


def test_branches_do_not_touch_each_other(model: LanguageModel) -> None:
    alone = model.stream(text(5, 30), **OPTIONS)
    alone.advance(25)
    session = Session(model, **OPTIONS)
    generation = session.stream(text(5, 30))
    generation.advance(10)
    branch = session.fork()
    branch.fork().stream([*text(5, 30), 7]).advance(3)
    other = branch.resume()
    for part in (4, 11):
        other.advance(part)
        generation.advance(part)
    assert_same_text(generation, alone)
    assert_same_text(other, alone)


def test_tokens_taken_back_are_said_again(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, **OPTIONS)
    generation = session.stream(text(5, 30))
    said = generation.advance(40)
    assert generation.advance(1) == []
    assert generation.finish_reason == "length"
    generation.unread(6)
    session.save(tmp_path / "saved")
    resumed = ds4jax.restore(tmp_path / "saved", model, max_new_tokens=4).resume()
    assert resumed.ids == said[:34]
    assert sum(resumed, []) == said[34:38]
    assert resumed.finish_reason == "length"


@pytest.mark.long
def test_a_continuation_outgrows_its_cache(model: LanguageModel, tmp_path: Path) -> None:
    session, prompt = Session(model, **OPTIONS | {"max_new_tokens": 20}), [*text(0, 300), *text(11, 190)]
    session.stream(prompt).advance(20)
    session.save(tmp_path / "saved")
    resumed = ds4jax.restore(tmp_path / "saved", model).resume()
    resumed.advance(20)
    assert len(resumed.state.tokens) == 1024
    assert resumed.ids == list(model.generate(prompt, **OPTIONS | {"max_new_tokens": 20 + 20}).ids)


def test_an_empty_session_and_a_lost_one(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, **OPTIONS)
    assert (session.prompt_ids, session.ids) == ((), ())
    for refused in (session.resume, session.fork, lambda: session.save(tmp_path / "saved")):
        with pytest.raises(InputError, match="the session is empty; stream a prompt first"):
            refused()
    generation = session.stream([17])
    session.save(tmp_path / "saved")
    assert ds4jax.restore(tmp_path / "saved", model).resume().advance(3) == generation.advance(3)
    for leaf in jax.tree.leaves(generation.state):
        leaf.delete()
    with pytest.raises(InputError, match="cache is gone"):
        session.save(tmp_path / "saved")


def test_the_file_is_safetensors_and_holds_what_is_filled(model: LanguageModel, whole: Path) -> None:
    with safetensors.safe_open(whole, framework="numpy") as file:
        about = file.metadata()
        rows = file.get_tensor("state.cache.layers.2.compressor.rows")
    length = int(about["length"])
    assert 46 <= length < 50
    assert (about["format"], about["version"], about["max_draft"]) == ("ds4jax session", "1", "2")
    assert about["fingerprint"] == model.fingerprint
    # One row for every four positions, and the slack of a step.
    assert rows.shape[1] == -(-length // 4) + 3
    assert whole.stat().st_size < 400_000


def test_a_narrow_cache_comes_back(tmp_path: Path) -> None:
    model, path, random = golden_model(True, "narrow"), tmp_path / "saved", np.random.default_rng(0)
    state = decode.start(model.config, 512, 7, drafter=MTPDrafter(), max_draft=2)

    def filled(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(np.frombuffer(random.bytes(leaf.nbytes), leaf.dtype).reshape(leaf.shape))

    cache = jax.tree.map(filled, state.cache)
    state = dataclasses.replace(state, cache=dataclasses.replace(cache, length=jnp.full(1, 90, jnp.int32)))
    save(path, model, Options(), Snapshot(np.arange(91, dtype=np.int32), state, 0, 0.0), Mark.of(state))
    found = ds4jax.restore(path, model).resume().state
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.cache)} == {"float32", "int32", "int8", "uint8"}
    layers = zip(found.cache.layers, state.cache.layers, model.config.layer_ratios, strict=True)
    for actual, expected, ratio in layers:
        for part in ("compressor", "indexer") if ratio else ():
            rows = [jax.tree.leaves(getattr(layer, part)) for layer in (actual, expected)]
            for left, right in zip(*rows, strict=True):
                assert left.shape == right.shape
                assert_bits_equal(left[:, : 90 // ratio], right[:, : 90 // ratio])


def test_every_type_comes_back(tmp_path: Path) -> None:
    path, saved = tmp_path / "saved", {}
    for i, (name, dtype) in enumerate(session_file.DTYPES.items()):
        raw = np.random.default_rng(i).integers(0, 2, (3, 5 * dtype.itemsize), np.uint8)
        saved[name] = raw.view(dtype)
    saved["nothing"], saved["one"] = np.zeros((0, 4), np.float32), np.float32(3).reshape(())
    session_file.write(path, {"note": "é\n"}, [(name, array, lambda array=array: array) for name, array in saved.items()])
    with session_file.opened(path) as file:
        file.check_bytes()
        assert file.fields["note"] == "é\n"
        for name, array in saved.items():
            found = file.read(name)
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    with safetensors.safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == set(saved)


def test_fingerprints_tell_weights_apart(model: LanguageModel) -> None:
    assert model.fingerprint == model.with_max_draft(0).fingerprint
    weights = {
        "a": jnp.arange(12, dtype=jnp.float32).reshape(3, 4),
        "b": jnp.ones(5, jnp.bfloat16),
        "c": jnp.arange(7, dtype=jnp.int8),
    }
    changed = [
        weights | {"a": weights["a"].at[1, 2].add(1e-6)},
        weights | {"a": weights["a"][::-1]},
        weights | {"a": weights["a"].reshape(4, 3)},
        weights | {"b": -weights["b"]},
        weights | {"c": weights["c"].at[0].set(-1)},
        {"a": weights["a"], "b": weights["b"], "d": weights["c"]},
    ]
    digests = {fingerprint.of_weights(model.config, one) for one in [weights, *changed]}
    assert len(digests) == 1 + len(changed)
    assert fingerprint.of_weights(model.config, jax.tree.map(jnp.copy, weights)) in digests
    for piece in (1, 5, 12):
        assert_bits_equal(fingerprint.sums(weights["a"], piece), fingerprint.sums(weights["a"]))


def test_a_full_disk_leaves_the_old_file(model: LanguageModel, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(whole.read_bytes())
    session = ds4jax.restore(path, model)
    session.stream(text(3, 60)).advance(20)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = 0
    for part in range(10):
        try:
            # Python ignores the signal that comes with it, so that a write beyond the limit fails like one to a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) * part // 10, limits[1]))
            with pytest.raises(OSError, match=r"cannot be saved \(.*\); what was there before still is"):
                session.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        failed += path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert failed == 10
    session.save(path)
    assert ds4jax.restore(path, model).ids == session.ids


WRITES_UNTIL_KILLED = """
import sys
from pathlib import Path
import numpy as np
from ds4jax import session_file
for i in range(10**9):
    array = np.full(2_000_000, i % 2, np.float32)
    session_file.write(Path(sys.argv[1]), {}, [(f"part {k}", array, lambda: array) for k in range(4)])
    print(i, flush=True)
"""


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    versions = []
    for i in range(2):
        array = np.full(2_000_000, i, np.float32)
        session_file.write(path, {}, [(f"part {k}", array, lambda array=array: array) for k in range(4)])
        versions.append(path.read_bytes())
    intact = 0
    for _ in range(10):
        with child(WRITES_UNTIL_KILLED, path) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(random.random() / 10)
            process.send_signal(signal.SIGKILL)
        intact += path.read_bytes() in versions
        # What the last one left beside it was removed by this one; its own may be there.
        assert len(list(tmp_path.iterdir())) <= 2
    assert intact == 10
    session_file.write(path, {}, [])
    assert list(tmp_path.iterdir()) == [path]


Header = dict[str, Any]


def remade(data: bytes, change: Callable[[Header, bytearray], None]) -> bytes:
    """A file with another header and a digest that is right, as someone would make it by hand."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    change(header, body)
    header["__metadata__"]["digest"] = "0" * 64
    raw = json.dumps(header).encode()
    raw = len(raw).to_bytes(8, "little") + raw
    digest = hashlib.sha256(raw + body).hexdigest()
    return raw.replace(b"0" * 64, digest.encode(), 1) + bytes(body)


def field(name: str, value: str) -> Callable[[bytes], bytes]:
    return lambda data: remade(data, lambda header, body: header["__metadata__"].update({name: value}))


def entry(name: str, **changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: remade(data, lambda header, body: header[name].update(changes))


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def padded(data: bytes) -> bytes:
    """Spaces after the header's JSON, which change nothing of what it says."""
    length = int.from_bytes(data[:8], "little")
    return (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]


def without(name: str) -> Callable[[bytes], bytes]:
    """The last tensor goes, bytes and all."""

    def change(header: Header, body: bytearray) -> None:
        start, end = header.pop(name)["data_offsets"]
        assert end == len(body)
        del body[start:]

    return lambda data: remade(data, change)


def with_more(header: Header, body: bytearray) -> None:
    header["more\nof it"] = {"dtype": "U8", "shape": [3], "data_offsets": [len(body), len(body) + 3]}
    body += b"abc"


def other_token(header: Header, body: bytearray) -> None:
    start, _ = header["prompt_ids"]["data_offsets"]
    body[start : start + 4] = (10**6).to_bytes(4, "little")


def config_of(data: bytes) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["config"])
    return config


WINDOW, LAST = "state.cache.layers.0.window", "drafting.h_ND"
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "header: 0 bytes in a file of 0 bytes"),
    "words": (lambda data: b"In the beginning God created the heaven", "header: "),
    "another format": (field("format", "pt"), "format: 'pt', not 'ds4jax session'"),
    "header cut": (lambda data: data[:500], "header: "),
    "header not JSON": (lambda data: data[:8] + b"[" + data[9:], "header: not that of a saved session"),
    "absurd header": (lambda data: b"\xff" * 8 + data[8:], "header: 18,446,744,073,709,551,615 bytes in a file of"),
    "deep header": (lambda data: (10**6).to_bytes(8, "little") + b"[" * 10**6, "header: not that of a saved session"),
    "data cut": (lambda data: data[:-5], "the file has .* bytes, and its header tells of .* bytes"),
    "data longer": (lambda data: data + b"more", "the file has .* bytes, and its header tells of .* bytes"),
    "data altered": (flipped(-9000), "digest: its bytes are not those that were saved"),
    "last byte altered": (flipped(-2), "digest: its bytes are not those that were saved"),
    "header altered": (lambda data: data.replace(b'"given": "7"', b'"given": "6"'), "digest: "),
    "header padded": (padded, "digest: "),
    "newer version": (field("version", "2"), "version: 2; this ds4jax reads 1; use a newer ds4jax"),
    "no version": (field("version", "new"), "header: not that of a saved session"),
    "other weights": (field("fingerprint", "0" * 63 + "1"), "fingerprint: not that of the model, whose weights differ"),
    "other config": (
        lambda data: field("config", json.dumps(config_of(data) | {"norm_eps": 1e-5}))(data),
        "config: norm_eps is 1e-05, and 1e-06 in the model",
    ),
    "other depth": (field("max_draft", "1"), "max_draft: 1, and 2 in the model; open the model with max_draft 1"),
    "other drafter": (field("drafter", "mine.Oracle"), "drafter: mine.Oracle, and ds4jax.drafter.MTPDrafter here"),
    "no options": (field("options", "{}"), "options: not those of a session"),
    "length not a number": (field("length", "NaN"), "length: missing or not what it should be"),
    "length beyond capacity": (field("length", "513"), "length: 513, where 0 to 512 are possible"),
    "absurd capacity": (field("capacity", str(1 << 39)), "capacity: 549755813888, where 1 to 1024 are possible"),
    "another length": (field("length", "45"), "is needed"),
    "too much given": (field("given", "40"), "length: .* prompt and tokens do not agree"),
    "tensor missing": (without(LAST), f"{LAST}: missing"),
    "tensor too many": (lambda data: remade(data, with_more), "more of it: not part of a session"),
    "wrong type": (entry(WINDOW, dtype="I32"), f"{WINDOW}: int32.* where float32.* is needed"),
    "unknown type": (entry(WINDOW, dtype="F64"), f"{WINDOW}: type, shape and place do not agree"),
    "wrong shape": (entry(WINDOW, shape=[1, 96, 19]), rf"{WINDOW}: float32\[1, 96, 19\], where float32\[1, 19, 96\] is needed"),
    "absurd shape": (entry(WINDOW, shape=[1 << 39, 1 << 39]), f"{WINDOW}: type, shape and place do not agree"),
    "not in order": (entry(WINDOW, data_offsets=[0, 19 * 96 * 4]), f"{WINDOW}: type, shape and place do not agree"),
    "token outside": (lambda data: remade(data, other_token), "prompt_ids: token id 1000000 is outside the vocabulary"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(name: str, model: LanguageModel, whole: Path, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    data, path = whole.read_bytes(), tmp_path / "broken"
    path.write_bytes(change(data))
    assert path.read_bytes() != data
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as raised:
            ds4jax.restore(path, model)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert ";" in str(raised.value)


def test_what_is_no_file_and_what_no_option(model: LanguageModel, whole: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(InputError, match=message):
            ds4jax.restore(path, model)
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        ds4jax.restore(whole, model).save(tmp_path)
    for options, message in (
        ({"strict": False}, "strict: the session was saved with strict True"),
        ({"sampler": 1}, "sampler: no such option"),
        ({"max_new_tokens": 0}, "max-new-tokens is 0"),
    ):
        with pytest.raises(InputError, match=message):
            ds4jax.restore(whole, model, **options)
    with pytest.raises(InputError, match="config: "):
        ds4jax.restore(whole)
    renamed = tmp_path / "moved"
    renamed.write_bytes(field("model", "/nowhere/model.gguf")(whole.read_bytes()))
    with pytest.raises(InputError, match="model: /nowhere/model.gguf is not there any more; say where the model is"):
        ds4jax.restore(renamed)
