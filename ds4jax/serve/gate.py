"""Who may use the server: keys, and pages of other origins."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ds4jax.serve.endpoint import ANTHROPIC, OPENAI, send_json
from ds4jax.serve.errors import ApiError
from ds4jax.serve.settings import Settings, is_loopback
from ds4jax.serve.watching import Metrics, Record

# What needs no key: the page asks for one itself, and who watches the server needs to know no more.
_OPEN = ("/", "/health")


class Gate:
    """An ASGI middleware that refuses requests without a key, and those of web pages that are not allowed."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        error = self._error(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        # The error may quote the request, and anyone can make up paths.
        self._metrics.refuse(Record(scope["path"][:100], error.status, error=error.code or ""))
        style = ANTHROPIC if scope["path"].startswith("/v1/messages") else OPENAI
        await send_json(send, error.status, style.error(error), error.headers)

    def _error(self, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self._settings.local and not is_loopback(_parts(f"//{host}").hostname or ""):
            return ApiError(403, f"{host[:100]}: requests must name localhost; give --api-key-file or --insecure", code="host")
        origin = headers.get("origin")
        if origin is not None and not self._allowed(origin, host):
            return ApiError(403, f"pages of {origin[:100]} may not use this server; --cors allows them", code="origin")
        if path in _OPEN or not self._settings.keys:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if self._settings.accepts(key):
            return None
        return ApiError(401, "give a valid key, as `Authorization: Bearer KEY` or `x-api-key: KEY`", code="invalid_api_key")

    def _allowed(self, origin: str, host: str) -> bool:
        origins = self._settings.origins
        return origin in origins or "*" in origins or _parts(origin).netloc == host


def _parts(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
