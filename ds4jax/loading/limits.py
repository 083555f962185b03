"""Maximum values of fields that size a cache or a loop and that no tensor's shape confirms."""

from __future__ import annotations

from typing import Any

# V4-Flash has 1,048,576, 128 and 20.
MAX = {"max_context": 1 << 24, "window": 1 << 13, "hc_iters": 1 << 10}
# Shards of a split file. Each stays open, and a process may usually open 1,024 files. Published sets have up to about 50.
MAX_SHARDS = 512
# Stages of a DSpark drafter. V4-Flash-0731 has 3.
MAX_STAGES = 16


def require_plausible(fields: dict[str, Any]) -> None:
    """Refuse values that only a damaged or hostile file has.

    Raises:
        ValueError: a field of a configuration that is too large; the message begins with its name.
    """
    for field, maximum in MAX.items():
        if fields[field] > maximum:
            raise ValueError(f"{field} is {fields[field]}; at most {maximum} is supported")
