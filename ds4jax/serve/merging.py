"""Several streams as one, streams read to their ends, and work beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
# A request of fewer bytes is worked on in the event loop: a thread would cost more time than the work takes.
SHORT = 4096


async def merged(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """What comes from any of several streams, with the stream's number. An item of a stream is asked for after the one before.

    Raises:
        Exception: that of the first stream that fails.
    """
    waiting: dict[asyncio.Future[Item], int] = {}
    if len(streams) == 1:
        # Without a task for each item.
        async with contextlib.aclosing(streams[0]) as items:
            async for item in items:
                yield 0, item
        return
    try:
        for index, stream in enumerate(streams):
            waiting[asyncio.ensure_future(_next(stream))] = index
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield index, item
                waiting[asyncio.ensure_future(_next(streams[index]))] = index
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[Item, None]) -> Item:
    return await anext(stream)


async def drained(stream: AsyncGenerator[Any, None]) -> None:
    """Read a stream to its end.

    Raises:
        Exception: what made it fail.
    """
    async with contextlib.aclosing(stream) as items:
        async for _ in items:
            pass


async def together(works: Sequence[Coroutine[Any, Any, Item]]) -> list[Item]:
    """The results of several works that run at once. Where one fails, the others are cancelled.

    Raises:
        Exception: that of the first that fails.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def aside(size: int, work: Callable[..., Item], *arguments: Any) -> Item:
    """The result of some work on a request of `size` bytes. Long texts are left to a thread, so that other requests go on.

    Raises:
        Exception: that of the work.
    """
    if size < SHORT:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)
