"""How a server ends: drained, with a full queue, with a dead engine."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="needs the extra test")

from held_calls import held
from serving import CONTEXT, SLOTS, served

from ds4jax.errors import InputError
from ds4jax.serve.settings import Settings

# They compile the programs of one model, or find those of the module before.
pytestmark = pytest.mark.long
LONG: dict[str, Any] = {"prompt": "Hello", "max_tokens": CONTEXT, "ignore_eos": True}


def test_a_signal_lets_replies_end_and_takes_no_more() -> None:
    with served() as server, ThreadPoolExecutor(1) as pool:
        server.ready()
        with held(server.runner.engine) as calls:
            events = pool.submit(server.events, "/v1/completions", **LONG)
            calls.until(lambda: server.runner.counts == (1, 0))
            assert server.server
            server.server.handle_exit(signal.SIGTERM, None)
            calls.until(lambda: server.runner.state == "draining")
            refused = server.client.post("/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert "Retry-After" in refused.headers
            assert server.client.get("/health").json()["status"] == "draining"
        assert events.result()[-1]["choices"][0]["finish_reason"] == "length"
        server._thread.join(30)
        assert not server._thread.is_alive()
        assert server.runner.error is None


def test_a_full_queue_is_told() -> None:
    with served(waiting=1) as server, ThreadPoolExecutor(SLOTS + 1) as pool:
        server.ready()
        running = []
        with held(server.runner.engine) as calls:
            for count in [(i, 0) for i in range(1, SLOTS + 1)] + [(SLOTS, 1)]:
                running.append(pool.submit(server.post, "/v1/completions", **LONG))
                calls.until(lambda count=count: server.runner.counts == count)  # type: ignore[misc]
            refused = server.client.post("/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["Retry-After"]) > 0
        assert {one.result()["usage"]["total_tokens"] for one in running} == {CONTEXT}


def test_silence_is_kept_alive() -> None:
    with served(Settings(keep_alive=0.001)) as server, ThreadPoolExecutor(SLOTS) as pool:
        server.ready()
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stream": True}
        with held(server.runner.engine) as calls:
            running = [pool.submit(server.post, "/v1/completions", **LONG) for _ in range(SLOTS)]
            calls.until(lambda: server.runner.counts == (SLOTS, 0))
            with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert ": keep-alive" in answer.iter_lines()
            with server.client.stream("POST", "/v1/messages", json=body) as answer:
                assert answer.headers["cache-control"] == "no-cache"
                pings = (line for line in answer.iter_lines() if line == "event: ping")
                assert next(pings) == next(pings), "one belongs to the beginning of every stream"
        for one in running:
            one.result()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_ends_the_server() -> None:
    with served() as server, ThreadPoolExecutor(1) as pool:
        server.ready()
        engine = server.runner.engine

        def die() -> None:
            # It is no `Exception`, so the engine does not recover, and must not end the event loop.
            raise SystemExit

        with held(engine) as calls:
            events = pool.submit(server.events, "/v1/completions", **LONG)
            calls.until(lambda: server.runner.counts == (1, 0))
            engine._scheduler._turn = die  # type: ignore[method-assign]
        last = events.result()[-1]
        assert last["error"]["type"] == "server_error"
        health = server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        server._thread.join(30)
        assert not server._thread.is_alive()
        assert "engine's thread has ended" in str(server.runner.error)
        assert not [one for one in threading.enumerate() if one.name == "ds4jax engine" and one is engine._scheduler._thread]


def test_a_model_that_cannot_be_used_ends_the_server() -> None:
    with served(Settings(draft=7)) as server:
        server._thread.join(60)
        assert not server._thread.is_alive()
        assert isinstance(server.runner.error, InputError)
        assert "draft is 7" in str(server.runner.error)


def test_a_request_that_fails_takes_no_other_along() -> None:
    with served() as server:
        server.ready()
        engine = server.runner.engine
        expected = server.post("/v1/completions", prompt="Hello", seed=1)

        def failing(*_: object) -> None:
            raise RuntimeError("no mask")

        job = engine.submit([5, 6], constraint=failing)
        with pytest.raises(RuntimeError, match="no mask"):
            job.result()
        again = server.post("/v1/completions", prompt="Hello", seed=1)
        assert json.dumps(again["choices"]) == json.dumps(expected["choices"])
