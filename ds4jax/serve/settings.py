"""What a server is started with, besides the model."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
from pathlib import Path

from ds4jax.errors import InputError
from ds4jax.files import read_regular


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of a server.

    Attributes:
        served_name: the model's name in replies and lists.
        keys: accepted keys; without any, every request is accepted.
        local: whether requests must name this machine itself as their host. Else a page could reach a server without keys by a
            name of its own that leads here.
        origins: origins of web pages that may use it, or "*".
        max_body: maximum bytes of a request.
        draft: drafts per step of all requests, or "auto"; None is the model's `max_draft`.
        revision: of the chat format.
        log_prompts: whether the log has prompts and replies.
        keep_alive: seconds of silence after which a stream gets a comment.
        patience: seconds that a client may leave its connection full before it counts as gone.
        drain: seconds that running requests have after SIGTERM.
    """

    served_name: str = "ds4jax"
    keys: tuple[str, ...] = ()
    local: bool = False
    origins: tuple[str, ...] = ()
    max_body: int = 16_000_000
    draft: int | str | None = None
    revision: str = "preview"
    log_prompts: bool = False
    keep_alive: float = 10.0
    patience: float = 120.0
    drain: float = 120.0

    def accepts(self, key: str) -> bool:
        """Whether a key is one of the accepted ones. The time does not depend on where it differs."""
        given = hashlib.sha256(key.encode(errors="replace")).digest()
        found = [hmac.compare_digest(given, hashlib.sha256(one.encode()).digest()) for one in self.keys]
        return not self.keys or any(found)


def keys_of(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and lines that begin with # are none.

    Raises:
        InputError: the file cannot be read or has no key.
    """
    try:
        lines = [line.strip() for line in read_regular(path).decode().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path}: has no key; write one a line")
    return keys


def require_safe(host: str, *, keys: bool, insecure: bool) -> None:
    """Refuse an address that other machines reach, unless a key is asked for.

    Raises:
        InputError: without a key, anyone could use the model.
    """
    if not (is_loopback(host) or keys or insecure):
        raise InputError(f"--host {host}: other machines reach it; give --api-key-file, or --insecure to let everyone in")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
