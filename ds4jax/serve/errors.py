"""Errors that a client gets, in the shape of its interface."""

from __future__ import annotations

import logging
import re
from typing import Any

from ds4jax.errors import InputError

_LOG = logging.getLogger("ds4jax.serve")
# How messages of `InputError` begin: `messages[0].role: ...` or `top-p is ...`.
_FIELD = re.compile(r"([a-z_]\w*(?:\[\d+\]|\.\w+)*):|([a-z][a-z-]*) is ")

# Anthropic's name of each status; OpenAI's are given where the error is raised.
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An error with its HTTP status.

    Attributes:
        status: the HTTP status.
        message: one line that says what to do.
        kind: OpenAI's `type`.
        param: the field of the request that is wrong; None if it is none.
        code: OpenAI's `code`; None without one.
        retry_after: seconds after which the client may try again; None if that does not help.
        details: further fields of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        **details: Any,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after, self.details = retry_after, details

    def openai(self) -> dict[str, Any]:
        """The body for OpenAI's interfaces."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error | self.details}

    def anthropic(self) -> dict[str, Any]:
        """The body for Anthropic's interface."""
        kind = _ANTHROPIC.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be used."""
    return ApiError(400, message, param=param, code=code)


def unsupported(field: str, what: str = "is not supported; leave it out") -> ApiError:
    """A field that is known, changes the meaning and is not implemented."""
    return bad(f"{field}: {what}", field, "unsupported_parameter")


def unavailable(message: str, code: str) -> ApiError:
    """A server that cannot answer now."""
    return ApiError(503, message, kind="server_error", code=code, retry_after=5)


def too_long(count: int, context: int) -> ApiError:
    """A prompt that leaves no room for a reply."""
    message = f"the prompt has {count} tokens; the context is {context}, and a reply needs at least one"
    return ApiError(400, message, code="context_length_exceeded", n_prompt_tokens=count, n_ctx=context)


def of(error: BaseException) -> ApiError:
    """The error that a client gets for an exception. What is not the client's fault is logged, and its text is not sent."""
    from ds4jax.engine.scheduler import Closed, QueueFull

    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        found = _FIELD.match(str(error))
        param = (found[1] or found[2].replace("-", "_")) if found else None
        return bad(str(error), param)
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", retry_after=2)
    if isinstance(error, Closed):
        return unavailable("the server is ending; try another one", "closed")
    _LOG.error("%s: %s", type(error).__name__, error, exc_info=error)
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log has it", kind="server_error")
