"""A real server in a thread, over a model of one layer with a vocabulary of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from flax import nnx
from gguf_files import vocabulary
from small_models import DRAFTS, roomy_model, shallow_model

from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.engine.engine import Engine
from ds4jax.language_model import LanguageModel
from ds4jax.serve import server as servers
from ds4jax.serve.runner import Runner
from ds4jax.serve.settings import Settings
from ds4jax.text import tokenizer as text
from ds4jax.text.tokenizer import BYTE_OF, CORE, NORMAL, USER_DEFINED, Tokenizer

# One shape for all servers, so that they share their programs.
CONTEXT, CHUNK, SLOTS = 1024, 64, 4
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["days", "unit"],
            },
        },
    }
]


@functools.cache
def tokenizer() -> Tokenizer:
    """As many tokens as the model has: markers, bytes, and the first merges of the golden vocabulary."""
    known = vocabulary()
    size = shallow_model().config.vocab_size
    tokens = [*CORE, *BYTE_OF]
    merges: list[str] = []
    for merge in known["merges"]:
        joined = merge.replace(" ", "")
        if len(tokens) < size and joined not in tokens and set(merge.split(" ")) <= set(tokens):
            tokens.append(joined)
            merges.append(merge)
    tokens += [f"[PAD{i}]" for i in range(size - len(tokens))]
    kinds = [USER_DEFINED if token in CORE or token.startswith("[PAD") else NORMAL for token in tokens]
    head = dict((text.KIND, text.PRE_TOKENIZER))
    lists = {text.TOKENS_KEY: tokens, text.MERGES_KEY: merges, text.TYPES_KEY: np.array(kinds), text.VOCAB_SIZE_KEY: size}
    return Tokenizer.from_gguf(head | lists, Path("small"))


@functools.cache
def model(*, roomy: bool = False) -> LanguageModel:
    """The model of one layer, with a tokenizer; perhaps with a large context."""
    bare = roomy_model() if roomy else shallow_model()
    return LanguageModel(nnx.merge(bare.graph, bare.weights), tokenizer(), max_draft=DRAFTS)


def engine(*, roomy: bool = False, **options: Any) -> Engine:
    """An engine of the one shape, unless options say otherwise."""
    return Engine(model(roomy=roomy), drafter=NgramDrafter(), **{"slots": SLOTS, "context": CONTEXT, "chunk": CHUNK} | options)


class Served:
    """A running server.

    Attributes:
        url: its address.
        client: a client for it.
        runner: its runner.
        log: lines of the access log, as objects.
    """

    def __init__(self, settings: Settings, **options: Any):
        self.runner = Runner(lambda: engine(**options), settings)
        self.log: list[dict[str, Any]] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.client = httpx2.Client(base_url=self.url, timeout=600)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self.server: servers.Server | None = None
        self._thread.start()

    async def _main(self) -> None:
        self.server = servers.server(self.runner)
        await servers.run(self.server, self.runner, self._listening)

    def ready(self) -> Served:
        """Wait for the model."""
        while self.runner.state == "loading":
            time.sleep(0.02)
        assert self.runner.error is None, self.runner.error
        return self

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request; it must be there."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, content: str = "Hello", **body: Any) -> Any:
        """The answer to one question, without reasoning unless asked for."""
        body = {"max_tokens": 12, "thinking": {"type": "disabled"}, "messages": [{"role": "user", "content": content}]} | body
        return self.post("/v1/chat/completions", **body)

    def events(self, path: str, **body: Any) -> list[Any]:
        """The data of the events of a stream, as objects; without "[DONE]" and comments."""
        with self.client.stream("POST", path, json={"stream": True} | body) as answer:
            assert answer.status_code == 200
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def idle(self, seconds: float = 60) -> bool:
        """Whether all slots are free within some seconds."""
        until = time.monotonic() + seconds
        while self.runner.counts != (0, 0) and time.monotonic() < until:
            time.sleep(0.01)
        return self.runner.counts == (0, 0)

    def close(self) -> None:
        """End it."""
        self.client.close()
        if self.server:
            self.server.should_exit = True
        self._thread.join(60)
        self._listening.close()


@contextlib.contextmanager
def served(settings: Settings | None = None, **options: Any) -> Iterator[Served]:
    """A server; its log is caught."""
    one = Served(settings or Settings(served_name="small"), **options)

    class Catch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            one.log.append(json.loads(record.getMessage()))

    access, handler = logging.getLogger("ds4jax.access"), Catch()
    access.setLevel(logging.INFO)
    access.addHandler(handler)
    try:
        yield one
    finally:
        access.removeHandler(handler)
        one.close()
