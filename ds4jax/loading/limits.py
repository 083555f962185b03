"""Upper bounds for numbers that size a cache or a loop and that no tensor's shape confirms."""

from __future__ import annotations

from typing import Any

# V4-Flash has 1,048,576, 128 and 20.
MOST = {"max_context": 1 << 24, "window": 1 << 13, "hc_iters": 1 << 10}


def require_plausible(fields: dict[str, Any]) -> None:
    """Refuse what only a damaged or hostile file says.

    Raises:
        ValueError: a field of a configuration that is too large; the message begins with its name.
    """
    for field, most in MOST.items():
        if fields[field] > most:
            raise ValueError(f"{field} is {fields[field]}; at most {most} is supported")
