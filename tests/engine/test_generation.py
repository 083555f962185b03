"""Generation: one executable however it is called, exact ends, clear errors."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest
from flax import nnx
from numerics import arrays, golden_model, golden_transformer

from ds4jax.bounds import MAX_DRAFTS
from ds4jax.decode.sampling import Sampling
from ds4jax.engine import generation as generations
from ds4jax.engine import host_copy, pace
from ds4jax.engine.compile import programs, wait
from ds4jax.errors import InputError

TOKENS = 40
# As the tests of sessions and of golden tokens have it: the same programs.
HOW = {"ignore_eos": True, "strict": True}


def prompt() -> np.ndarray:
    return arrays("golden")["greedy_prompt"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=50, seed=3)])
def test_streaming_says_what_generate_says_with_the_same_executable(sampling):
    model = golden_model()
    whole = model.generate(prompt(), max_new_tokens=TOKENS, sampling=sampling, **HOW)
    compiled = len(programs())
    parts = list(model.stream(prompt(), max_new_tokens=TOKENS, sampling=sampling, **HOW))
    assert len(parts) > 1
    assert sum(parts, []) == list(whole.ids)
    one_by_one = model.stream(prompt(), max_new_tokens=TOKENS, sampling=sampling, **HOW)
    assert [one_by_one.advance(1) for _ in range(TOKENS)] == [[token] for token in whole.ids]
    assert len(programs()) == compiled >= 1


def test_a_call_hashes_nothing_large_and_compiles_nothing(monkeypatch):
    """On an H200 with 43 layers, hashing the module's graph took 17 ms of every call."""
    generation = golden_model().stream(prompt(), max_new_tokens=TOKENS, **HOW)
    generation.advance(8)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    monkeypatch.setattr(nnx.GraphDef, "__hash__", lambda graph: pytest.fail("the graph was hashed"))
    assert len(generation.advance(8)) == 8
    assert len(generation.result().fingerprints) == 16
    assert [event for event in events if "compile" in event or "trace" in event] == []
    with pytest.raises(pytest.fail.Exception):
        hash(nnx.split(golden_transformer())[0])
    jax.jit(lambda x: x + 2)(1)
    assert [event for event in events if "compile" in event or "trace" in event] != []


def test_the_same_seed_draws_the_same_tokens():
    def ids(seed: int) -> tuple[int, ...]:
        return golden_model().generate(prompt(), max_new_tokens=12, sampling=Sampling(1.0, seed=seed), **HOW).ids

    assert ids(5) == ids(5)
    assert ids(5) != ids(6)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)])
def test_fewer_tokens_are_the_beginning_of_more(sampling):
    def ids(count: int) -> tuple[int, ...]:
        return golden_model().generate(prompt(), max_new_tokens=count, sampling=sampling, draft=2, **HOW).ids

    for count in (1, 2, 3, 7, 10):
        assert ids(count) == ids(20)[:count]


@pytest.mark.long
def test_prompt_of_one_token():
    model = golden_model()
    result = model.generate([17], max_new_tokens=3, **HOW)
    expected = [17]
    for _ in range(3):
        expected.append(int(np.argmax(model.logits(expected, strict=True)["logits"][-1])))
    assert list(result.ids) == expected[1:]


def test_stop_token_ends_the_text_and_is_not_part_of_it(monkeypatch):
    model = golden_model()
    free = model.generate(prompt(), max_new_tokens=TOKENS, **HOW).ids
    stop = next(token for token in free[5:] if free.index(token) >= 5)
    monkeypatch.setattr(model, "config", model.config.__class__(**{**vars(model.config), "eos_id": stop}))
    result = model.generate(prompt(), max_new_tokens=TOKENS, strict=True)
    assert result.finish_reason == "stop"
    assert result.ids == free[: free.index(stop)]
    generation = model.stream(prompt(), max_new_tokens=TOKENS, strict=True)
    assert sum(generation, []) == list(result.ids)
    assert generation.finish_reason == "stop"


def test_a_stream_left_early_keeps_what_it_said():
    generation = golden_model().stream(prompt(), max_new_tokens=TOKENS, **HOW)
    first = next(iter(generation))
    result = generation.result()
    assert result.finish_reason == "interrupted"
    assert list(result.ids) == first
    assert len(result.fingerprints) == len(first)


@pytest.mark.long
def test_the_context_ends_the_text():
    model = golden_model()
    ids = np.resize(arrays("golden")["ids"], model.config.max_context - 5)
    result = model.generate(ids, max_new_tokens=50, **HOW)
    assert result.finish_reason == "length"
    assert len(result.ids) == 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "empty"),
        (np.zeros((2, 2), np.int32), "list of integers"),
        ([1.5], "list of integers"),
        ([512], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        (np.zeros(1025, np.int32), "context"),
        (np.zeros(1024, np.int32), "context"),
        ("text", "tokenizer"),
    ],
)
def test_bad_prompts(given, said):
    with pytest.raises(InputError, match=said):
        golden_model().generate(given, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_new_tokens": 0}, "max-new-tokens"), ({"draft": -1}, "draft"), ({"draft": 5}, "draft"), ({"draft": "all"}, "draft")],
)
def test_bad_options(options, said):
    with pytest.raises(InputError, match=said):
        golden_model().stream([1], **options)


@pytest.mark.parametrize("decode_from", [-1, 4])
def test_decode_from_outside_the_sequence(decode_from):
    with pytest.raises(InputError, match="decode-from"):
        golden_model().logits([1, 2, 3], decode_from=decode_from)


@pytest.mark.parametrize(("seconds", "sizes"), [(1e9, [1, 8, 64, 7]), (0.0, [1, *[8] * 9, 7])])
def test_a_stream_comes_in_pieces_of_a_bounded_time(monkeypatch, seconds, sizes):
    monkeypatch.setattr(pace, "PIECE_SECONDS", seconds)
    stream = golden_model().stream([3, 4], max_new_tokens=80, ignore_eos=True, draft=0)
    assert [len(new) for new in stream] == sizes


def test_pieces_by_the_time_of_a_token():
    times = (0.0, 1e-4, 0.0009, 0.001, 0.0018, 0.002, 0.004, 0.02)
    assert [pace.piece(seconds) for seconds in times] == [8, 64, 48, 32, 24, 16, 8, 8]


def test_the_largest_piece_with_its_drafts_is_read_in_one_transfer(monkeypatch):
    """A second reading is another program, and another wait for the device."""
    monkeypatch.setattr(host_copy, "_report", lambda *_: pytest.fail("a second reading"))
    generation = golden_model().stream([3, 4], max_new_tokens=pace.PIECES[-1] + MAX_DRAFTS + 1, ignore_eos=True, draft=0)
    assert len(generation.advance(pace.PIECES[-1] + MAX_DRAFTS)) == pace.PIECES[-1] + MAX_DRAFTS


def test_the_time_of_decoding_has_neither_prompt_nor_programs(monkeypatch):
    """A clock that stands still but for these two."""
    now, waits = [0.0], []

    def waited(compiling):
        waits.append(compiling)
        now[0] += 10.0
        return wait(compiling)

    def read(done, total):
        now[0] += 1.0

    monkeypatch.setattr(generations, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(generations, "wait", waited)
    generation = golden_model().stream([3, 4], max_new_tokens=4, ignore_eos=True, draft=0, progress=read)
    generation.advance(2)
    generation.advance(2)
    result = generation.result()
    # The loop was waited for, too.
    assert any(generation._loop in compiling for compiling in waits)
    assert result.seconds == 10 * len(waits) + 1
    assert (result.decode_seconds, result.tokens_per_second) == (0.0, 0.0)
