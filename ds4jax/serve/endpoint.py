"""One endpoint that replies: reads the body, races the work against the client's hanging up, and answers or streams."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from ds4jax.serve import errors
from ds4jax.serve.errors import ApiError
from ds4jax.serve.runner import Job, Runner
from ds4jax.serve.watching import Metrics, Record
from ds4jax.serve.writer import Writer

# The status of a client that hung up, in the log.
HUNG_UP = 499


@dataclasses.dataclass(frozen=True)
class Call:
    """A request to an endpoint.

    Attributes:
        body: its bytes.
        runner: the model's.
        record: what the log says of it.
        jobs: its requests of the engine.
    """

    body: bytes
    runner: Runner
    record: Record
    jobs: list[Job] = dataclasses.field(default_factory=list)

    def submit(self, ids: Sequence[int], **options: Any) -> Job:
        """Give a request to the engine, as `Runner.submit`. It ends with the call at the latest."""
        job = self.runner.submit(ids, **options)
        self.jobs.append(job)
        return job


@dataclasses.dataclass(frozen=True)
class Style:
    """How an interface says what is no reply.

    Attributes:
        error: the body of an error.
        error_event: the event of an error within a stream.
        keep_alive: what a silent stream gets.
    """

    error: Callable[[ApiError], dict[str, Any]]
    error_event: Callable[[ApiError], bytes]
    keep_alive: bytes = b": keep-alive\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """An event of a stream."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


OPENAI = Style(ApiError.openai, lambda error: event(error.openai()))
RESPONSES = Style(
    ApiError.openai,
    lambda error: event({"type": "error", "code": error.code, "message": error.message, "param": error.param}, "error"),
)
ANTHROPIC = Style(
    ApiError.anthropic,
    lambda error: event(error.anthropic(), "error"),
    b'event: ping\ndata: {"type":"ping"}\n\n',
)

# Most of a body that is too large, and most time for it.
DISCARD_BYTES, DISCARD_SECONDS = 1 << 28, 30.0

# An answer as JSON, or a stream of events.
Answer = dict[str, Any] | AsyncGenerator[bytes, None]


class HungUp(Exception):
    """The client has closed the connection."""


class Endpoint:
    """An ASGI application for one path."""

    def __init__(self, work: Callable[[Call], Awaitable[Answer]], style: Style, runner: Runner, metrics: Metrics):
        """Args: `work` makes the answer to a call. It is cancelled when the client hangs up."""
        self._work, self._style, self._runner, self._metrics = work, style, runner, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        record, began = Record(scope["path"]), time.perf_counter()
        try:
            record.status = await self._answered(scope, receive, send, record)
        except (HungUp, asyncio.CancelledError):
            # Cancelled are those that have not read their reply when the server ends.
            record.status = HUNG_UP
        except ApiError as error:
            record.status, record.error = error.status, self._logged(error)
            with contextlib.suppress(OSError):
                await send_json(send, error.status, self._style.error(error), error.headers)
        finally:
            record.seconds = time.perf_counter() - began
            self._metrics.note(record)

    async def _answered(self, scope: Scope, receive: Receive, send: Send, record: Record) -> int:
        body = await read_body(scope, receive, self._runner.settings.max_body)
        gone = asyncio.ensure_future(_gone(receive))
        call = Call(body, self._runner, record)
        try:
            answer = await self._made(call, gone)
            if isinstance(answer, dict):
                await send_json(send, 200, answer)
            else:
                record.stream = True
                await self._stream(answer, gone, send, record)
            return 200
        finally:
            for job in call.jobs:
                job.cancel()
            record.came(call.jobs)
            await _stopped(gone)

    async def _made(self, call: Call, gone: asyncio.Future[None]) -> Answer:
        work = asyncio.ensure_future(self._work(call))
        try:
            await asyncio.wait(_both(work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HungUp
            return work.result()
        except (HungUp, ApiError):
            raise
        except Exception as error:
            raise errors.of(error) from error
        finally:
            await _stopped(work)

    async def _stream(self, events: AsyncGenerator[bytes, None], gone: asyncio.Future[None], send: Send, record: Record) -> None:
        """Send events until their end. What goes wrong from here on is an event, too."""
        settings = self._runner.settings
        writer = Writer(send, self._style.keep_alive, quiet=settings.keep_alive, patience=settings.patience)
        pump = asyncio.ensure_future(self._pump(events, writer, record))
        keeper = asyncio.ensure_future(writer.keep())
        try:
            await asyncio.wait({pump, keeper, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                raise HungUp
            pump.result()
        except OSError:
            raise HungUp from None
        finally:
            for task in (pump, keeper):
                await _stopped(task)
            await events.aclose()

    async def _pump(self, events: AsyncGenerator[bytes, None], writer: Writer, record: Record) -> None:
        """Send every event when it is there. One task does all of them: a task for each would cost more than the event."""
        await writer.begin()
        data = b" "
        while data:
            try:
                data = await anext(events, b"")
            except Exception as error:
                known = errors.of(error)
                record.error = self._logged(known)
                await writer.part(self._style.error_event(known), more=False)
                return
            await writer.part(data, more=bool(data))

    def _logged(self, error: ApiError) -> str:
        """What the log says of an error. A message may quote the request."""
        if self._runner.settings.log_prompts:
            return error.message
        return " ".join(word for word in (error.code or error.kind, error.param) if word)


async def read_body(scope: Scope, receive: Receive, maximum: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it has more bytes than `maximum`.
        HungUp: it never ended.
    """
    too_large = ApiError(413, f"the body has more than {maximum:,} bytes, the server's --max-body", code="body_too_large")
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > maximum:
        if headers.get(b"expect", b"").lower() != b"100-continue":
            await _discard(receive)
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HungUp
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > maximum:
            await _discard(receive)
            raise too_large
        if not message.get("more_body"):
            return b"".join(parts)


async def _discard(receive: Receive) -> None:
    """Receive the rest of a body. Most clients read no answer before they have sent everything; a closed connection would be all
    that they see."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while size < DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def send_json(send: Send, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    """Send a JSON answer."""
    data = msgspec.json.encode(content)
    fields = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
    found = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": data})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _both(work: asyncio.Future[Any], gone: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    return {work, gone}


async def _stopped(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
