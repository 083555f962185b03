"""The endpoints that compute nothing: models, tokens and health."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ds4jax.serve import shapes
from ds4jax.serve.endpoint import Answer, Call
from ds4jax.serve.errors import ApiError
from ds4jax.serve.runner import Runner
from ds4jax.text.tokenizer import BOS, EOS

_PAGE = Path(__file__).with_name("page.html")
# The page loads nothing from elsewhere, and no other page may frame it.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"
}


class Small:
    """These endpoints for one model."""

    def __init__(self, runner: Runner):
        self._runner, self._since = runner, int(time.time())

    def _about(self) -> dict[str, Any]:
        about = {"id": self._runner.settings.served_name, "object": "model", "created": self._since, "owned_by": "ds4jax"}
        if self._runner.alive:
            about |= {"max_model_len": self._runner.engine.context, "system_fingerprint": self._runner.fingerprint}
        return about

    async def models(self, _: Request) -> Response:
        """`GET /v1/models`."""
        about = self._about()
        # Anthropic's clients read the second line.
        paging = {"has_more": False, "first_id": about["id"], "last_id": about["id"]}
        return JSONResponse({"object": "list", "data": [about], **paging})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`.

        Raises:
            ApiError: there is no such model.
        """
        name, own = request.path_params["name"], self._runner.settings.served_name
        if name != own:
            raise ApiError(404, f"model: there is no {name[:100]!r}, only {own!r}", param="model", code="model_not_found")
        return JSONResponse(self._about())

    async def health(self, _: Request) -> Response:
        """`GET /health`: 200 while requests are answered."""
        alive = self._runner.alive
        state = "ok" if alive else "failed" if self._runner.state == "ready" else self._runner.state
        running, waiting = self._runner.counts
        return JSONResponse({"status": state, "running": running, "waiting": waiting}, 200 if alive else 503)

    async def page(self, _: Request) -> Response:
        """`GET /`: a page to chat with."""
        return Response(_PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

    async def tokenize(self, call: Call) -> Answer:
        """`POST /tokenize`: token ids of a text, with the begin-of-sentence token unless `add_special_tokens` is false."""
        asked, tokenizer = shapes.read(call.body, shapes.Tokenize), call.runner.tokenizer
        begun = [] if asked.add_special_tokens is False else [tokenizer.bos_id]
        ids = begun + tokenizer.encode(asked.prompt)
        return {"tokens": ids, "count": len(ids), "max_model_len": call.runner.engine.context}

    async def detokenize(self, call: Call) -> Answer:
        """`POST /detokenize`: the text of token ids."""
        return {"prompt": call.runner.tokenizer.decode(shapes.read(call.body, shapes.Detokenize).tokens)}

    async def tokenizer_info(self, _: Request) -> Response:
        """`GET /tokenizer_info`: the tokens that lm-eval asks for."""
        tokenizer = self._runner.tokenizer
        about = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "vocab_size": tokenizer.vocab_size, "chat_template": None}
        return JSONResponse(about | {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
