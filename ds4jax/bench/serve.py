"""Measures a server: requests that come at a rate, whether or not earlier ones have ended, and HTTP beside the engine itself.

For the comparison, the server runs in a thread over the engine, as `ds4jax serve` does, and its client is another process. The
engine alone and the engine through HTTP take turns with the same requests, so that both see the same load of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ds4jax.bench.http_client import Heard, Player, Shot
from ds4jax.bounds import HELD_OUT_TEXT
from ds4jax.decode.sampling import Sampling
from ds4jax.engine.options import digest
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.engine.engine import Engine
    from ds4jax.engine.request import Request

SCHEMA = 1
SHARES = (50, 90, 99)
FASTEST = 10
# Targets of the comparison: milliseconds that HTTP may add to the first token, and its share of the engine's tokens/s.
MOST_EXTRA_MS, MIN_SHARE = 3.0, 0.97
# New tokens of a request that measures the first one.
FIRST_TOKENS = 4
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        rate: requests a second, at random times (a Poisson process); 0 leaves this part out.
        requests: their number.
        prompt, tokens: tokens of each prompt and each reply.
        streams: requests at once of the comparison.
        pairs: pairs of runs of the comparison; 0 leaves it out.
        seed: of prompts and times.
    """

    rate: float = 1.0
    requests: int = 20
    prompt: int = 64
    tokens: int = 64
    streams: int = 8
    pairs: int = 5
    seed: int = 0


class Work:
    """Requests whose prompts are pieces of the held-out text, and whose replies have one length. All are different."""

    def __init__(self, ids: Sequence[int], options: Options):
        """Args: `ids`, tokens of a text that is long enough."""
        self._ids, self._options, self._count = ids, options, 0
        self._dice = np.random.default_rng(options.seed)

    def body(self, tokens: int | None = None) -> dict[str, Any]:
        """The next request, as fields of `POST /v1/completions`."""
        self._count += 1
        start = int(self._dice.integers(0, max(len(self._ids) - self._options.prompt, 1)))
        prompt = list(self._ids[start : start + self._options.prompt])
        wanted = self._options.tokens if tokens is None else tokens
        return {"prompt": prompt, "max_tokens": wanted, "seed": self._count, "temperature": 1.0, "ignore_eos": True}

    def times(self, rate: float, count: int) -> list[float]:
        """When requests come, in seconds."""
        return list(map(float, np.cumsum(self._dice.exponential(1 / rate, count))))


def text_ids(encode: Callable[[str], list[int]], prompt: int) -> list[int]:
    """Tokens of the held-out text.

    Raises:
        InputError: it has fewer tokens than a prompt.
    """
    ids = encode(HELD_OUT_TEXT.read_text())
    if len(ids) < prompt:
        raise InputError(f"--prompt {prompt}: the held-out text has {len(ids)} tokens")
    return ids


@contextlib.contextmanager
def served(engine: Engine) -> Iterator[str]:
    """A server over an engine, in a thread. Gives its address; the engine ends with it."""
    from ds4jax.serve.runner import Runner
    from ds4jax.serve.server import run, server
    from ds4jax.serve.settings import Settings

    runner = Runner(lambda: engine, Settings())
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    servers: list[Any] = []

    async def main() -> None:
        servers.append(server(runner))
        await run(servers[0], runner, listening)

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="ds4jax server")
    thread.start()
    try:
        while runner.state == "loading":
            time.sleep(0.01)
        if runner.error:
            raise runner.error
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join()
        listening.close()


def open_loop(player: Player, url: str, key: str, work: Work, options: Options) -> Row:
    """Requests at a rate. Returns figures of the replies, see `_figures`."""
    shots = [Shot(work.body(), at) for at in work.times(options.rate, options.requests)]
    return {"rate": options.rate} | _figures(player.play(url, shots, key), shots)


def _figures(heard: Sequence[Heard], shots: Sequence[Shot]) -> Row:
    """Percentiles over requests of the milliseconds to the first text and of a token after it, over pieces of the milliseconds
    between two, and over requests of tokens/s; with the whole rate, the number of failures, and how late the client was."""
    good = [one for one in heard if not one.error]
    many = [one for one in good if len(one.times) > 1 and one.tokens > 1]
    per_token = [(one.times[-1] - one.times[0]) / (one.tokens - 1) for one in many]
    gaps = [after - before for one in many for before, after in zip(one.times, one.times[1:], strict=False)]
    span = max((one.ended for one in good), default=0.0) - min((one.begun for one in good), default=0.0)
    return {
        "requests": len(heard),
        "failed": [one.error for one in heard if one.error][:5],
        "failures": len(heard) - len(good),
        "first_ms": _percentiles([1e3 * (one.times[0] - one.begun) for one in good if one.times]),
        "token_ms": _percentiles([1e3 * one for one in per_token]),
        "piece_ms": _percentiles([1e3 * one for one in gaps]),
        "tokens_per_second": _percentiles([1 / one for one in per_token if one]),
        "whole_tokens_per_second": round(sum(one.tokens for one in good) / span, 2) if span else None,
        "late_ms": round(1e3 * max((one.begun - shot.at for one, shot in zip(heard, shots, strict=True)), default=0.0), 2),
        "first_each_ms": [round(1e3 * (one.times[0] - one.begun), 2) for one in good if one.times],
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": round(float(np.percentile(values, share)), 3) for share in SHARES} if values else {}


def compare(engine: Engine, player: Player, url: str, work: Work, options: Options) -> Row:
    """The engine alone and through HTTP, in turns.

    Returns:
        first: milliseconds to the first token of a request alone, and the difference at the fastest tenth; streams: tokens/s of
        all streams together. Each has the runs of both, their medians, and the median of the pairs' differences or ratios.
        `different` is the number of pairs whose bits HTTP changed.
    """
    different = 0
    firsts: dict[str, list[float]] = {"engine": [], "http": []}
    rates: dict[str, list[float]] = {"engine": [], "http": []}
    # The first pair of each is a warm-up.
    for pair in range(-1, 4 * options.pairs):
        body = work.body(FIRST_TOKENS)
        ways: dict[str, Callable[[], tuple[float, list[str]]]] = {
            "engine": lambda body=body: _first(engine, body),  # type: ignore[misc]
            "http": lambda body=body: _first_heard(player.play(url, [Shot(body)])),  # type: ignore[misc]
        }
        different += _paired(ways, firsts, pair)
    for pair in range(-1, options.pairs):
        bodies = [work.body() for _ in range(options.streams)]
        ways = {
            "engine": lambda bodies=bodies: _together(engine, bodies),  # type: ignore[misc]
            "http": lambda bodies=bodies: _together_heard(player.play(url, [Shot(body) for body in bodies])),  # type: ignore[misc]
        }
        different += _paired(ways, rates, pair)
    extra = statistics.median(http - own for own, http in zip(firsts["engine"], firsts["http"], strict=True))
    share = statistics.median(http / own for own, http in zip(rates["engine"], rates["http"], strict=True))
    return {
        "first": _medians(firsts) | {"extra_ms": round(extra, 3), "fastest_extra_ms": _fastest_extra(firsts)},
        "streams": _medians(rates) | {"count": options.streams, "share": round(share, 4)},
        "different": different,
    }


def _fastest_extra(runs: Mapping[str, list[float]]) -> float:
    """The difference at the fastest tenth of the runs, which what else the machine does disturbs least."""
    own, http = (float(np.percentile(runs[name], FASTEST)) for name in ("engine", "http"))
    return round(http - own, 3)


def _paired(ways: dict[str, Callable[[], tuple[float, list[str]]]], found: dict[str, list[float]], pair: int) -> bool:
    """Run both ways, each second pair in the other order, and note them. Returns whether their bits differ."""
    bits = {}
    for name in sorted(ways, reverse=bool(pair % 2)):
        value, bits[name] = ways[name]()
        if pair >= 0:
            found[name].append(round(value, 3))
    return bits["engine"] != bits["http"]


def _medians(runs: Mapping[str, list[float]]) -> Row:
    return {"runs": dict(runs), **{name: round(statistics.median(values), 3) for name, values in runs.items()}}


def _submit(engine: Engine, body: dict[str, Any]) -> Request:
    how = Sampling(temperature=body["temperature"], seed=body["seed"])
    return engine.submit(body["prompt"], max_new_tokens=body["max_tokens"], sampling=how, ignore_eos=body["ignore_eos"])


def _first(engine: Engine, body: dict[str, Any]) -> tuple[float, list[str]]:
    begun = time.perf_counter()
    request = _submit(engine, body)
    pieces = iter(request)
    while not next(pieces).text:
        pass
    found = time.perf_counter() - begun
    return 1e3 * found, [digest(request.result().fingerprints)]


def _first_heard(heard: list[Heard]) -> tuple[float, list[str]]:
    [one] = _sound(heard)
    return 1e3 * (one.times[0] - one.begun), [one.fingerprint]


def _together(engine: Engine, bodies: list[dict[str, Any]]) -> tuple[float, list[str]]:
    begun = time.perf_counter()
    results = [request.result() for request in [_submit(engine, body) for body in bodies]]
    seconds = time.perf_counter() - begun
    return sum(len(one.ids) for one in results) / seconds, [digest(one.fingerprints) for one in results]


def _together_heard(heard: list[Heard]) -> tuple[float, list[str]]:
    found = _sound(heard)
    seconds = max(one.ended for one in found) - min(one.begun for one in found)
    return sum(one.tokens for one in found) / seconds, [one.fingerprint for one in found]


def _sound(heard: list[Heard]) -> list[Heard]:
    bad = [one.error for one in heard if one.error or not one.times]
    if bad:
        raise InputError(f"bench serve: a request failed: {bad[0][:200] or 'no text'}")
    return heard


def bench_engine(engine: Engine, options: Options, note: Callable[[str], None]) -> Row:
    """Serve an engine and measure it. The engine is closed at the end.

    Raises:
        InputError: the model has no tokenizer, or a request failed.
    """
    tokenizer = engine.model.tokenizer
    if tokenizer is None:
        raise InputError("bench serve: the model's files have no tokenizer")
    work = Work(text_ids(tokenizer.encode, options.prompt), options)
    about = {"slots": engine.shape.slots, "context": engine.context, "load": _load()}
    with served(engine) as url, Player() as player:
        return _document(options) | about | _measured(player, url, "", work, options, note, engine)


def bench_url(url: str, key: str, encode: Callable[[str], list[int]], options: Options, note: Callable[[str], None]) -> Row:
    """Measure a running server.

    Args:
        encode: its tokenizer.

    Raises:
        InputError: it cannot be reached.
    """
    work = Work(text_ids(encode, options.prompt), options)
    with Player() as player:
        return _document(options) | {"url": url, "load": _load()} | _measured(player, url, key, work, options, note, None)


def _document(options: Options) -> Row:
    return {"schema": SCHEMA, **dataclasses.asdict(options)}


def _measured(
    player: Player, url: str, key: str, work: Work, options: Options, note: Callable[[str], None], engine: Engine | None
) -> Row:
    found: Row = {}
    if engine and options.pairs:
        note("HTTP beside the engine")
        found["compared"] = compare(engine, player, url, work, options)
    if options.rate:
        note(f"{options.requests} requests at {options.rate:g} a second")
        found["open_loop"] = open_loop(player, url, key, work, options)
    return found


def _load() -> float | None:
    """Processes that want a core, over the last minute; None where the system does not say."""
    with contextlib.suppress(OSError, AttributeError):
        return round(os.getloadavg()[0], 2)
    return None


def good(content: Mapping[str, Any]) -> bool:
    """Whether every request was answered, and with the bits that the engine gives."""
    failures = content.get("open_loop", {}).get("failures", 0)
    return not failures and not content.get("compared", {}).get("different", 0)
