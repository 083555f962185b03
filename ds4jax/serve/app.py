"""The server as an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ds4jax.serve import chat, completions, messages, responses
from ds4jax.serve.endpoint import ANTHROPIC, OPENAI, RESPONSES, Answer, Call, Endpoint, Style
from ds4jax.serve.errors import ApiError
from ds4jax.serve.gate import Gate
from ds4jax.serve.runner import Runner
from ds4jax.serve.small import Small
from ds4jax.serve.watching import Metrics

# Paths of Anthropic's interface, whose errors have another shape.
_ANTHROPIC = "/v1/messages"


def application(runner: Runner) -> Starlette:
    """The application. Its caller starts the runner."""
    metrics, small = Metrics(runner), Small(runner)

    def post(path: str, work: Callable[[Call], Awaitable[Answer]], style: Style = OPENAI) -> Route:
        return Route(path, Endpoint(work, style, runner, metrics), methods=["POST"])

    def figures(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        Route("/", small.page),
        post("/v1/chat/completions", chat.chat),
        post("/v1/completions", completions.completions),
        post("/v1/responses", responses.responses, RESPONSES),
        post("/v1/messages", messages.messages, ANTHROPIC),
        post("/v1/messages/count_tokens", messages.count_tokens, ANTHROPIC),
        post("/tokenize", small.tokenize),
        post("/detokenize", small.detokenize),
        Route("/tokenizer_info", small.tokenizer_info),
        Route("/v1/models", small.models),
        Route("/v1/models/{name:path}", small.model),
        Route("/health", small.health),
        Route("/metrics", figures),
    ]
    middleware = [Middleware(Gate, settings=runner.settings, metrics=metrics)]
    if runner.settings.origins:
        allowed: dict[str, Any] = {"allow_origins": list(runner.settings.origins), "allow_methods": ["*"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, **allowed))
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error, ApiError: _api_error})


def style_of(path: str) -> Style:
    """How errors look on a path."""
    return ANTHROPIC if path.startswith(_ANTHROPIC) else OPENAI


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    status = getattr(error, "status_code", 500)
    what = {404: "there is no such path", 405: f"{request.method} is not possible here"}.get(status, "the request failed")
    return await _api_error(request, ApiError(status, f"{request.url.path}: {what}", code="not_found" if status == 404 else None))


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.url.path, error)


def error_response(path: str, error: ApiError) -> Response:
    """An error as an answer."""
    body: dict[str, Any] = style_of(path).error(error)
    return Response(msgspec.json.encode(body), error.status, error.headers, "application/json")
