"""The model's runner: loads the model beside the server, and gives requests of an engine to asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ds4jax.engine.engine import Engine
from ds4jax.engine.request import Piece, Request, RequestResult
from ds4jax.errors import ExchangeError
from ds4jax.serve.errors import ApiError, bad, too_long, unavailable
from ds4jax.serve.settings import Settings

if TYPE_CHECKING:
    from ds4jax.text.tokenizer import Tokenizer

_LOG = logging.getLogger("ds4jax.serve")
State = Literal["loading", "ready", "draining", "failed"]
# Seconds between two looks at the engine's thread, and between its end and that of the process.
WATCH, LAST_WORDS = 0.2, 1.0


class Job:
    """A request of the engine, for one reader in asyncio.

    Attributes:
        first, last: seconds until the first and the last piece so far were here; 0 before.
    """

    def __init__(self, request: Request):
        """Must be made in the event loop."""
        self.request = request
        self.first = self.last = 0.0
        self._begun = time.perf_counter()
        self._news = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hear() -> None:
            # At the end of the process the loop may be gone before the engine.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._news.set)

        request.listen(hear)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces as they come. Whoever stops reading cancels the request."""
        try:
            while True:
                self._news.clear()
                done = self.request.done
                for piece in self.request.come():
                    self.last = time.perf_counter() - self._begun
                    self.first = self.first or self.last
                    yield piece
                if done:
                    return
                await self._news.wait()
        finally:
            self.cancel()

    async def result(self) -> RequestResult:
        """Wait for the end.

        Raises:
            Exception: what made the request fail.
        """
        while not self.request.done:
            self._news.clear()
            if not self.request.done:
                await self._news.wait()
        try:
            return self.request.result(0)
        except Exception:
            raise
        except BaseException as error:
            # What ended the engine's thread must not end the event loop as well.
            raise RuntimeError(f"the engine has ended: {type(error).__name__}") from error

    def cancel(self) -> None:
        """End the request, wherever it is, unless it has ended."""
        if not self.request.done:
            self.request.cancel()


class Runner:
    """One model for all interfaces.

    Attributes:
        state: "loading", "ready", "draining" (takes no more requests) or "failed".
        error: why it failed; None otherwise.
        settings: the server's.
    """

    def __init__(self, load: Callable[[], Engine], settings: Settings):
        """Args: `load` makes the engine; it is called in a thread of its own."""
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.settings = settings
        self._load = load
        self._engine: Engine | None = None
        self._fingerprint = ""
        self._jobs: set[Job] = set()

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            ApiError: it is not ready.
        """
        if self._engine is None or self.state != "ready":
            raise self._refusal()
        if not self._engine.alive:
            raise unavailable("the engine has ended", "engine_failed")
        return self._engine

    def _refusal(self) -> ApiError:
        messages = {
            "loading": "the model is being loaded; try again later",
            "draining": "the server is ending; try another one",
            "failed": "the model could not be loaded",
        }
        return unavailable(messages.get(self.state, self.state), self.state)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self.state == "ready" and self._engine is not None and self._engine.alive

    @property
    def counts(self) -> tuple[int, int]:
        """Number of running and of waiting requests."""
        return (self._engine.running, self._engine.waiting) if self._engine else (0, 0)

    @property
    def drafts(self) -> list[tuple[int, int]]:
        """The numbers of drafts, and of those that stood, of each slot since the start."""
        return [(int(tried), int(stood)) for tried, stood in self._engine.drafts] if self._engine else []

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix cache in memory."""
        return self._engine.prefix_bytes if self._engine else 0

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ApiError: the model is not ready, or has none.
        """
        tokenizer = self.engine.model.tokenizer
        if tokenizer is None:
            raise bad("the model's files have no tokenizer; only /v1/completions with token ids is possible")
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """Everything that a reply's bits depend on, besides the request. See `Engine.fingerprint`."""
        return self._fingerprint

    async def start(self) -> None:
        """Load the model. Afterwards `state` is "ready" or "failed"."""
        try:
            self._engine = await asyncio.to_thread(self._load)
            self._fingerprint = await asyncio.to_thread(self._named)
            await asyncio.to_thread(self._try_out)
            if self.state == "loading":
                self.state = "ready"
        except BaseException as error:
            self.state, self.error = "failed", error
            if not isinstance(error, Exception):
                raise

    def _try_out(self) -> None:
        """Wait until everything is compiled.

        Raises:
            InputError: the model cannot make so many drafts.
        """
        assert self._engine is not None
        self._engine.submit([self._engine.model.config.bos_id], max_new_tokens=1, draft=self.settings.draft).result()

    def _named(self) -> str:
        """The engine's fingerprint, and what the server adds to a request."""
        assert self._engine is not None
        draft = self.settings.draft
        return self._engine.fingerprint + f"-{self.settings.revision}" + ("" if draft is None else f"-draft-{draft}")

    async def watch(self) -> None:
        """Return when the engine's thread has ended by itself, or the model could not be loaded."""
        while self.state != "failed":
            if self._engine is not None and self.state in ("ready", "draining") and not self._engine.alive:
                ended = self._engine.error
                known = isinstance(ended, ExchangeError)
                self.state, self.error = "failed", ended if known else RuntimeError("the engine's thread has ended")
                break
            await asyncio.sleep(WATCH)
        await asyncio.sleep(LAST_WORDS)

    def submit(self, ids_T: Any, **options: Any) -> Job:
        """Give a request to the engine; arguments and errors as for `Engine.submit`.

        Raises:
            ApiError: the prompt leaves no room in the context, or the model is not ready.
        """
        engine = self.engine
        count = len(ids_T)
        if count >= engine.context:
            raise too_long(count, engine.context)
        job = Job(engine.submit(np.asarray(ids_T), draft=self.settings.draft, **options))
        self._jobs = {one for one in self._jobs if not one.request.done} | {job}
        return job

    async def drain(self) -> None:
        """Take no more requests, and wait for those that run; after `Settings.drain` seconds end them."""
        self.state = "draining" if self.state != "failed" else self.state
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended(), self.settings.drain)
        for job in self._jobs:
            job.cancel()
        await self._ended()

    async def _ended(self) -> None:
        while self._engine is not None and self._engine.alive and any(not job.request.done for job in self._jobs):
            await asyncio.sleep(WATCH / 4)

    async def close(self) -> None:
        """End the engine."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close, cancel=True)
