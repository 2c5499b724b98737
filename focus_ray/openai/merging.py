"""Several async streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merge(
    streams: Sequence[AsyncGenerator[Item, None]],
) -> AsyncGenerator[tuple[int, Item], None]:
    """Items of all streams as they come, each with its stream's number.

    The first error of any stream ends them all; closing the merged stream closes them all. Plain
    tasks rather than a TaskGroup: a reply is begun in one task and sent from another.
    """
    arrived: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue(len(streams))

    async def pump(number: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await arrived.put((number, item))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    pumps = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(streams)]
    try:
        unfinished = len(pumps)
        while unfinished:
            event = await arrived.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                unfinished -= 1
            else:
                yield event
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
