"""What the operator sees: a line in the log for each request, and figures for Prometheus."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ds4jax.engine.request import RequestResult
    from ds4jax.serve.runner import Job, Runner

_LOG = logging.getLogger("ds4jax.access")
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
# Digits of times.
_ROUND = 4


@dataclasses.dataclass
class Record:
    """What is known of a request.

    Attributes:
        path, status: of HTTP; status 499 is a client that hung up.
        stream: whether the reply was streamed.
        prompt, cached, tokens: numbers of tokens: of the prompt, of those from the prefix cache, and new ones.
        steps: steps of the decode loop.
        drafts, accepted: numbers of drafts and of those that stood.
        first, between: seconds to the first token of a reply, and seconds of a token after it; the largest of several replies.
        queue, prefill, decode, seconds: times in seconds; the largest of several replies, and of the whole request.
        finish: why replies ended, by commas.
        error: the code and field of an error, or where the operator asks for prompts its message; "" without an error.
        prompts, replies: texts, only kept where the operator asks for them.
    """

    path: str
    status: int = 0
    stream: bool = False
    prompt: int = 0
    cached: int = 0
    tokens: int = 0
    steps: int = 0
    drafts: int = 0
    accepted: int = 0
    first: float = 0.0
    between: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    seconds: float = 0.0
    finish: str = ""
    error: str = ""
    prompts: Any = None
    replies: Any = None

    def add(self, result: RequestResult, finish: str, tokens: int) -> None:
        """Add a reply."""
        self.prompt += len(result.prompt_ids)
        self.cached += result.reused
        self.tokens += tokens
        self.steps += result.steps
        self.drafts += sum(result.tried)
        self.accepted += sum(result.stood)
        self.queue = max(self.queue, result.waited)
        self.prefill = max(self.prefill, result.seconds - result.waited - result.decode_seconds)
        self.decode = max(self.decode, result.decode_seconds)
        self.finish = f"{self.finish},{finish}".strip(",")

    def came(self, jobs: Sequence[Job]) -> None:
        """Add when the tokens of replies were here, and of replies that were not ended what they had so far."""
        if not self.finish:
            self.prompt = sum(len(job.request.prompt_ids) for job in jobs)
            self.cached = sum(job.request.reused for job in jobs)
            self.tokens = sum(job.request.made for job in jobs)
        for job in jobs:
            self.first = max(self.first, job.first)
            self.between = max(self.between, (job.last - job.first) / max(job.request.made - 1, 1))

    def line(self) -> str:
        """The record as a line of JSON, without what is empty."""
        fields = {name: round(value, _ROUND) if isinstance(value, float) else value for name, value in vars(self).items()}
        fields["tokens_per_step"] = round(self.tokens / self.steps, 2) if self.steps else None
        shown = {"time": round(time.time(), 3)} | {name: value for name, value in fields.items() if value not in (None, "")}
        return json.dumps(shown, ensure_ascii=False)


class Metrics:
    """Figures of a server, for `/metrics`."""

    def __init__(self, runner: Runner):
        self.registry = prometheus.CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "ds4jax"}
        self._requests = prometheus.Counter("requests", "Requests by path and status.", ("path", "status"), **own)
        self._prompt = prometheus.Counter("prompt_tokens", "Tokens of prompts.", **own)
        self._cached = prometheus.Counter("cached_prompt_tokens", "Tokens of prompts from the prefix cache.", **own)
        self._tokens = prometheus.Counter("generated_tokens", "New tokens.", **own)
        self._hits = prometheus.Counter("prefix_hits", "Requests whose prompts began in the prefix cache.", **own)
        self._steps = prometheus.Counter("decode_steps", "Steps of the decode loop, of all requests.", **own)
        self._times = {
            name: prometheus.Histogram(f"{name}_seconds", text, buckets=_SECONDS, **own)
            for name, text in (
                ("first_token", "Time from a request to its first token."),
                ("token", "Mean time of a token after the first one."),
                ("queue", "Time in the queue."),
                ("prefill", "Time of a prompt."),
                ("decode", "Time of a reply's tokens."),
                ("request", "Time of a whole request."),
            )
        }
        gauges = {
            "running_requests": ("Requests that have a slot.", lambda: runner.counts[0]),
            "waiting_requests": ("Requests in the queue.", lambda: runner.counts[1]),
            "slots": ("Requests that can run at once.", lambda: len(runner.drafts)),
            "prefix_cache_bytes": ("Host memory of the prefix cache.", lambda: runner.prefix_bytes),
            "device_memory_bytes": ("Memory in use on the device; 0 where it does not say.", _device_bytes),
            "up": ("Whether requests are answered.", lambda: int(runner.alive)),
        }
        for name, (text, value) in gauges.items():
            prometheus.Gauge(name, text, **own).set_function(value)

        self.registry.register(_Drafts(runner))
        prometheus.ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)

    def refuse(self, record: Record) -> None:
        """Count a request that was not let in, without its path, and write its line."""
        self._requests.labels("", str(record.status)).inc()
        _LOG.info("%s", record.line())

    def note(self, record: Record) -> None:
        """Count a request, and write its line."""
        self._requests.labels(record.path, str(record.status)).inc()
        self._prompt.inc(record.prompt)
        self._cached.inc(record.cached)
        self._hits.inc(bool(record.cached))
        self._tokens.inc(record.tokens)
        self._steps.inc(record.steps)
        if record.finish:
            for name in ("queue", "prefill", "decode"):
                self._times[name].observe(getattr(record, name))
            self._times["request"].observe(record.seconds)
        if record.tokens:
            self._times["first_token"].observe(record.first)
        if record.tokens > 1:
            self._times["token"].observe(record.between)
        _LOG.info("%s", record.line())


class _Drafts(Collector):
    """Drafts of every slot, for the share that stands."""

    def __init__(self, runner: Runner):
        self._runner = runner

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters as they are now."""
        made = CounterMetricFamily("ds4jax_drafts", "Drafts by slot.", labels=["slot"])
        stood = CounterMetricFamily("ds4jax_accepted_drafts", "Drafts that stood, by slot.", labels=["slot"])
        for slot, counts in enumerate(self._runner.drafts):
            for family, count in zip((made, stood), counts, strict=True):
                family.add_metric([str(slot)], count)
        yield made
        yield stood


def _device_bytes() -> int:
    """Bytes in use on the device."""
    import jax

    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0))
