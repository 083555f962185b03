"""A saved session goes on to the last bit, and a save that fails leaves the old file."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from numerics import assert_bits_equal, golden_model
from saved_sessions import OPTIONS, interrupted, text

import ds4jax
from ds4jax.decode import loop as decode
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.sampling import Sampling
from ds4jax.decode.width import ROOM
from ds4jax.engine import session_file
from ds4jax.engine.generation import Generation
from ds4jax.engine.options import Options, Snapshot
from ds4jax.engine.rewind import RewindPoint
from ds4jax.engine.session import Session
from ds4jax.engine.session_state import save
from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel
from ds4jax.loading import fingerprint

ROOT = Path(__file__).resolve().parents[2]
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, top_p=0.95, seed=3))
WANTED = 40


def assert_same_text(actual: Generation, expected: Generation) -> None:
    """The same tokens, each chosen from the same bits."""
    first, second = actual.result(), expected.result()
    assert first.ids == second.ids
    assert_bits_equal(first.fingerprints, second.fingerprints)


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A fresh interpreter with this one's modules and cache."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, cwd=ROOT)


SAVES_UNTIL_KILLED = """
import sys
import conftest, test_saving as t
from ds4jax.engine.session import Session
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


@pytest.mark.parametrize("max_draft", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.long)])
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
    return interrupted(model, tmp_path_factory.mktemp("saved"))


@pytest.mark.slow
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


@pytest.mark.long
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


@pytest.mark.slow
def test_a_continuation_outgrows_its_cache(model: LanguageModel, tmp_path: Path) -> None:
    session, prompt = Session(model, **OPTIONS | {"max_new_tokens": 20}), [*text(0, 300), *text(11, 190)]
    session.stream(prompt).advance(20)
    session.save(tmp_path / "saved")
    resumed = ds4jax.restore(tmp_path / "saved", model).resume()
    resumed.advance(20)
    assert resumed.state.tokens.shape[1] == 1024
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
    assert (about["format"], about["version"], about["max_draft"]) == ("ds4jax session", "2", "2")
    assert about["fingerprint"] == model.fingerprint
    # One row for every four positions, and the slack of a step.
    assert rows.shape[1] == -(-length // 4) + ROOM
    # With the eight rows beyond the window of each ring.
    assert whole.stat().st_size < 420_000


def test_a_narrow_cache_comes_back(tmp_path: Path) -> None:
    model, path, random = golden_model(True, "narrow"), tmp_path / "saved", np.random.default_rng(0)
    state = decode.start(model.config, 512, [7], drafter=MTPDrafter(), max_draft=2)

    def filled(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(np.frombuffer(random.bytes(leaf.nbytes), leaf.dtype).reshape(leaf.shape))

    cache = jax.tree.map(filled, state.cache)
    state = dataclasses.replace(state, cache=dataclasses.replace(cache, length=jnp.full(1, 90, jnp.int32)))
    save(path, model, Options(), Snapshot(np.arange(91, dtype=np.int32), state, 0, 0.0), RewindPoint.of(state))
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
        assert_bits_equal(fingerprint.sums(weights["a"], piece=piece), fingerprint.sums(weights["a"]))


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
            with pytest.raises(OSError, match=r"cannot be saved \(.*\); the old file is unchanged"):
                session.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        failed += path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert failed == 10
    session.save(path)
    assert ds4jax.restore(path, model).ids == session.ids


def test_a_first_save_that_fails_does_not_tell_of_an_old_file(tmp_path: Path) -> None:
    """Nothing was there before."""

    def full() -> np.ndarray:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, array = tmp_path / "kept", np.zeros(4, np.float32)
    with pytest.raises(OSError, match=r"cannot be saved \(No space left on device\); no file was written: "):
        session_file.write(path, {}, [("part", array, full)])
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="the old file is unchanged"):
        session_file.write(path, {}, [("part", array, full)])
    assert path.read_bytes() == b"old"


WRITES_UNTIL_KILLED = """
import sys
from pathlib import Path
import numpy as np
from ds4jax.engine import session_file
for i in range(10**9):
    array = np.full(2_000_000, i % 2, np.float32)
    session_file.write(Path(sys.argv[1]), {}, [(f"part {k}", array, lambda: array) for k in range(4)])
    print(i, flush=True)
"""


KILLS = 4


@pytest.mark.long
def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    versions = []
    for i in range(2):
        array = np.full(2_000_000, i, np.float32)
        session_file.write(path, {}, [(f"part {k}", array, lambda array=array: array) for k in range(4)])
        versions.append(path.read_bytes())
    intact = 0
    for _ in range(KILLS):
        with child(WRITES_UNTIL_KILLED, path) as process:
            assert process.stdout
            assert process.stdout.readline()
            time.sleep(random.random() / 10)
            process.send_signal(signal.SIGKILL)
        intact += path.read_bytes() in versions
        # What the last one left beside it was removed by this one; its own may be there.
        assert len(list(tmp_path.iterdir())) <= 2
    assert intact == KILLS
    session_file.write(path, {}, [])
    assert list(tmp_path.iterdir()) == [path]
