"""Async plumbing of replies: clients that leave, server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

Item = TypeVar("Item")


async def unless_gone(request: Request, wanted: Awaitable[Item]) -> Item:
    """Wait for ``wanted``, and give it up when the client leaves.

    Call it after the body has been read.

    Raises:
        ClientDisconnect: the client left; ``wanted`` was cancelled and has ended.
    """

    async def wait() -> Item:
        return await wanted

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.create_task(wait()), asyncio.create_task(leave())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientDisconnect
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events from a generator that is closed whatever happens."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        # The header keeps nginx from holding events back.
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette leaves a generator it stops reading to the garbage collector.
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def event(data: str) -> str:
    """One server-sent event; ``data`` is one line."""
    return f"data: {data}\n\n"
