"""An engine: each request has the bits that it has alone, whatever else happens."""

from __future__ import annotations

import copy
import dataclasses
import gc
import random
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from engines import CHUNK, CONTEXT, SLOTS, Case, alone, assert_same, engine, mixed
from held_calls import held
from jax.sharding import AbstractMesh
from numerics import assert_bits_equal
from small_models import shallow_model, text

from ds4jax.decode.groups import GROUPS
from ds4jax.decode.sampling import Sampling
from ds4jax.engine.engine import Engine
from ds4jax.engine.prefill import call_bytes
from ds4jax.engine.scheduler import Closed, QueueFull
from ds4jax.engine.shape import Shape, fresh, state_bytes
from ds4jax.engine.slots import Slots
from ds4jax.errors import InputError
from ds4jax.evaluation import logprobs as evaluation

CASES = [(cache, strict) for cache in ("float32", "narrow") for strict in (False, True)]


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    with engine() as one:
        yield one


def test_requests_have_the_bits_that_they_have_alone(shared: Engine) -> None:
    mixed(shared, None, 10, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", [None, "tiny", *CASES])
def test_forty_requests_have_the_bits_that_they_have_alone(case: Case) -> None:
    with engine(case) as one:
        mixed(one, case, 40, seed=2)


def test_a_free_slot_has_the_state_of_a_new_one(shared: Engine) -> None:
    shared.submit(text(0, 70), max_new_tokens=20, ignore_eos=True).result()
    slots = shared._scheduler._slots
    for used, new in zip(jax.tree.leaves(slots.state), jax.tree.leaves(fresh(shallow_model(), slots.shape)), strict=True):
        assert_bits_equal(used, new)


def test_programs_that_have_run_leave_the_state_of_new_slots() -> None:
    """A GPU's programs are run before the first request, which then finds them as fast as they get."""
    with engine() as one:
        slots = Slots(shallow_model(), one.shape)
    new = [np.array(leaf) for leaf in jax.tree.leaves(slots.state)]
    slots._run_all()
    for actual, expected in zip(jax.tree.leaves(slots.state), new, strict=True):
        assert_bits_equal(actual, expected)
    assert not slots.busy


def test_pieces_are_the_result(shared: Engine) -> None:
    request = shared.submit(text(0, 40), max_new_tokens=60, ignore_eos=True)
    pieces = list(request)
    result = request.result()
    assert len(pieces) > 1
    assert sum((piece.ids for piece in pieces), ()) == result.ids
    assert len(result.ids) == len(result.fingerprints) == 60
    assert list(request) == [], "a second reading ends at once"
    assert len(result.fingerprint) == 32


def test_a_cancelled_request_keeps_what_it_said(shared: Engine) -> None:
    with held(shared) as calls:
        request, other = (shared.submit(text(0, 40), max_new_tokens=200, ignore_eos=True) for _ in range(2))
        calls.release(1)
        next(iter(request))
        request.cancel()
    result = request.result()
    assert result.finish_reason == "cancelled"
    assert 0 < len(result.ids) < 200
    assert other.result().ids[: len(result.ids)] == result.ids
    assert len(other.result().ids) == 200


def test_a_failing_request_takes_no_other_along(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading that fails ends its own request; a call that fails loses the state, and the others are made again."""
    fields = {"max_new_tokens": 100, "ignore_eos": True}
    with held(shared) as calls:
        good = shared.submit(text(60, 40), **fields)
        bad = shared.submit(text(0, 40), **fields)
        monkeypatch.setattr(bad, "_read", lambda news: 1 / 0)
        calls.release(8)
        with pytest.raises(ZeroDivisionError):
            bad.result()
        first = next(iter(good))
        slots, step, failures = shared._scheduler._slots, shared._scheduler._slots.step, iter([True])

        def failing(steps: int) -> Any:
            if next(failures, False):
                jax.tree.map(lambda leaf: leaf.delete(), slots.state)
                raise RuntimeError("a fault of the device")
            return step(steps)

        monkeypatch.setattr(slots, "step", failing)
        calls.release(1000)
        pieces = [first, *good]
        monkeypatch.setattr(slots, "step", step)
    assert next(failures, None) is None, "the call failed"
    result = good.result()
    assert sum((piece.ids for piece in pieces), ()) == result.ids
    assert_same(result, alone(None, 60, 40, tuple(fields.items())))


def test_the_queue_has_an_end_and_so_has_an_engine() -> None:
    one = engine(waiting=SLOTS)
    with held(one) as calls:
        requests = [one.submit(text(0, 20), max_new_tokens=100, ignore_eos=True) for _ in range(SLOTS)]
        calls.until(lambda: not one.waiting)
        requests += [one.submit(text(0, 20), max_new_tokens=100, ignore_eos=True) for _ in range(SLOTS)]
        with pytest.raises(QueueFull, match=f"the queue is full: {SLOTS} requests wait"):
            one.submit(text(0, 100))
        for request in requests:
            request.cancel()
    one.close(cancel=True)
    assert all(request.result(1).finish_reason == "cancelled" for request in requests)
    assert not one.alive
    assert one._scheduler._slots._state is None, "its memory is free"
    with pytest.raises(Closed):
        one.submit([1])


@pytest.mark.parametrize(
    ("prompt", "fields", "said"),
    [
        ([], {}, "prompt is empty"),
        ([0] * CONTEXT, {}, "prompt has 256 tokens; the engine's context of 256"),
        ([1], {"draft": 3}, "draft is 3"),
        ([1], {"max_new_tokens": 0}, "max-new-tokens is 0"),
        ([1], {"stop": "x"}, "tokenizer: none"),
        ([1], {"stop": list(range(9))}, "stop has 9 token ids"),
        ([1], {"sampling": 1}, "sampling is 1"),
        ([1], {"temperature": 1}, "temperature: no such option"),
    ],
)
def test_a_bad_request_is_refused_in_one_line(shared: Engine, prompt: list[int], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        shared.submit(prompt, **fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"context": 1}, "context is 1"),
        ({"context": 2048}, "context is 2048; the model's context is 1024"),
        ({"chunk": 8}, "chunk is 8; an engine's chunk is at least 32"),
    ],
)
def test_a_bad_engine_is_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Engine(shallow_model(), **options)


def test_an_engine_that_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_bytes(shallow_model(), Shape(8, 1024, (CHUNK,), False, None))
    monkeypatch.setattr(shallow_model(), "drafter", lambda chosen: None)
    calls = call_bytes(shallow_model().config, CHUNK, 1024, kernels=False)
    monkeypatch.setattr("ds4jax.engine.engine.free_bytes", lambda: calls + state // 8 * 3 + 100)
    with pytest.raises(
        InputError, match=r"slots: 8 with a context of 1,000 need .* GB beside the weights, .* are free; 3 would fit"
    ):
        Engine(shallow_model(), slots=8, context=1000, chunk=CHUNK)


@pytest.fixture
def in_two_groups() -> Any:
    """A model that says that its devices are two groups."""
    model = copy.copy(shallow_model())
    model.graph = types.SimpleNamespace(mesh=AbstractMesh((2, 1), (GROUPS, "devices")))  # type: ignore[assignment]
    return model


def test_slots_that_groups_do_not_divide_are_refused_in_one_line(in_two_groups: Any) -> None:
    with pytest.raises(InputError, match="slots is 3; 2 groups of devices must divide it, so give a multiple of 2"):
        Engine(in_two_groups, slots=3)


@pytest.mark.parametrize(("kind", "free", "fitting"), [("cpu", 5, 4), ("gpu", 3, 6)])
def test_what_fits_in_groups_is_a_multiple(
    in_two_groups: Any, kind: str, free: int, fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU groups share the memory; elsewhere each has half of the slots on devices of its own."""
    monkeypatch.setattr(in_two_groups, "drafter", lambda chosen: None)
    state = state_bytes(in_two_groups, Shape(8, 1024, (CHUNK,), False, None, 2)) // 4
    calls = call_bytes(shallow_model().config, CHUNK, 1024, kernels=kind == "gpu")
    monkeypatch.setattr("ds4jax.engine.engine.free_bytes", lambda: calls + state * free + 100)
    monkeypatch.setattr("ds4jax.engine.shape.with_widths", lambda model, shape, *_: dataclasses.replace(shape, widths=(CHUNK,)))
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform=kind)])
    with pytest.raises(InputError, match=f"are free; {fitting} would fit"):
        Engine(in_two_groups, slots=8, context=1000, chunk=CHUNK)


def test_a_seed_is_drawn_where_none_was_given(shared: Engine) -> None:
    fields = {"max_new_tokens": 12, "ignore_eos": True}
    one, two = (shared.submit([5], sampling=Sampling(1.0, seed=None), **fields).result() for _ in range(2))
    assert one.seed != two.seed
    again = shared.submit([5], sampling=Sampling(1.0, seed=one.seed), **fields).result()
    assert_same(again, one)
    assert shared.submit([5], **fields).result().seed is None


def test_a_reader_waits_for_no_more_than_a_piece(shared: Engine) -> None:
    """Many steps a call where they are short, and few where they are long."""
    pace = shared._scheduler._pace
    pace = type(pace)(own=0.001)
    assert pace.steps() == 1
    pace.called(0.006, 1)
    assert pace.step == pytest.approx(0.005)
    assert pace.steps() == 6, "1 ms of 30 ms"
    pace.called(0.051, 5)
    assert pace.steps() == 3, "33 ms at 10 ms a step"
    slow = type(pace)(own=0.01)
    slow.called(0.03, 1)
    assert slow.steps() == 1
    slow.called(0.021, 2)
    assert slow.steps() == int(0.035 / slow.step) < 0.01 / 0.03 / slow.step, "45 ms at most"
    assert np.isclose(slow.own, 0.01)


def bits(tokens: Sequence[int]) -> np.ndarray:
    """A mask that allows these tokens."""
    words = np.zeros(512 // 32, np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, seed=4)])
def test_a_constraint_holds_and_changes_no_neighbour(shared: Engine, sampling: Sampling) -> None:
    """Tokens of the wanted class alone, one after the other, and after ten of them any."""
    asked = []

    def constraint(ids: Sequence[int]) -> np.ndarray | None:
        asked.append(len(ids))
        return bits(range(len(ids) % 7, 512, 7)) if len(ids) < 10 else None

    fields = (("max_new_tokens", 30), ("ignore_eos", True), ("sampling", sampling))
    free = shared.submit(text(60, 40), **dict(fields))
    held = shared.submit(text(60, 40), **dict(fields), constraint=constraint)
    result = held.result()
    assert [token % 7 for token in result.ids[:10]] == [i % 7 for i in range(10)]
    assert asked[:11] == list(range(11)), "a step each"
    assert len({token % 7 for token in result.ids[10:]}) > 1
    assert_same(free.result(), alone(None, 60, 40, fields))
    assert_bits_equal(result.fingerprints[:1], free.result().fingerprints[:1])


@pytest.mark.parametrize(("words", "said"), [(bits([]), "allows no token"), (bits([1])[:-1], "uint32 "), ("x", "uint32 ")])
def test_a_constraint_that_allows_nothing_ends_its_request(shared: Engine, words: Any, said: str) -> None:
    other = shared.submit([3], max_new_tokens=20, ignore_eos=True)
    with pytest.raises(InputError, match=said):
        shared.submit([3], constraint=lambda ids: words).result()
    assert len(other.result().ids) == 20


def test_log_probabilities_change_no_bit(shared: Engine) -> None:
    fields = (("max_new_tokens", 20), ("ignore_eos", True), ("sampling", Sampling(1.2, seed=9)))
    request = shared.submit(text(60, 40), **dict(fields), logprobs=3)
    passed_on = [score for piece in request for score in piece.logprobs]
    result = request.result()
    assert_same(result, alone(None, 60, 40, fields))
    assert result.logprobs is not None
    assert list(result.logprobs) == passed_on
    assert [score.id for score in result.logprobs] == list(result.ids)
    assert all(score.logprob <= score.top[0][1] and len(score.top) == 3 for score in result.logprobs)
    assert shared.submit([3], max_new_tokens=1).result().logprobs is None


@pytest.mark.long
def test_log_probabilities_are_those_of_scoring(shared: Engine) -> None:
    result = shared.submit(text(60, 40), max_new_tokens=20, ignore_eos=True, logprobs=3).result()
    assert result.logprobs is not None
    expected = evaluation.score(shallow_model(), result.prompt_ids, result.ids, 3)
    for actual, wanted in zip(result.logprobs, expected, strict=True):
        assert actual.logprob == pytest.approx(wanted.logprob, abs=1e-3)
        assert [token for token, _ in actual.top] == [token for token, _ in wanted.top]
        assert [score for _, score in actual.top] == pytest.approx([score for _, score in wanted.top], abs=1e-3)


@pytest.mark.slow
def test_short_requests_for_long_lose_no_slot_and_no_memory() -> None:
    """2,000 requests with random cancellations: the process grows by less than 2 % after the first 400."""
    dice, sizes = random.Random(5), []
    with engine(prefix_bytes=10**6) as one:
        for _ in range(5):
            short_requests(one, dice, 400)
            gc.collect()
            assert one.running == one.waiting == 0
            sizes.append((len(jax.live_arrays()), resident_bytes()))
    arrays, memory = zip(*sizes, strict=True)
    assert arrays[-1] < arrays[0] + 100, "less than one for four requests of a round"
    assert memory[-1] < 1.02 * memory[0], memory


def short_requests(one: Engine, dice: random.Random, count: int) -> None:
    requests = []
    for _ in range(count):
        while one.waiting > 50:
            time.sleep(0.01)
        requests.append(one.submit(text(dice.randrange(200), dice.randrange(1, 60)), max_new_tokens=dice.randrange(1, 12)))
        if dice.random() < 0.3:
            dice.choice(requests[-30:]).cancel()
    for request in requests:
        request.result(600)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
