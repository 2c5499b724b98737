"""Requests over time: open loop, closed loop, or both. Knows clients by one method.

Open loop: every request has its time of arrival and is sent then, however many are unanswered; its
latency counts from that time, so a server that falls behind, and a client that does, cannot hide
it. Closed loop: so many are in flight, each replaced when it ends. With both, an arrival for which
there is no place waits, and its waiting counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from focus_ray.benchmarks.serving_client import Sent


class Asks(Protocol):
    """The part of ``serving_client.Client`` that is used here."""

    clock: Callable[[], float]

    async def ask(self, body: Mapping[str, Any], due_s: float) -> Sent: ...


async def send_all(
    client: Asks,
    bodies: Sequence[Mapping[str, Any]],
    arrivals_s: Sequence[float],
    max_concurrency: int | None,
    on_end: Callable[[Sent], None] = lambda sent: None,
) -> list[Sent]:
    """Send every body at its time; what became of each, in their order.

    Args:
        arrivals_s: of each body, from now, ascending. All 0: there is no arrival to count from, and
            a request is due when it has a place.
        max_concurrency: most in flight; None: no limit.
        on_end: called with each as it ends.
    """
    arrivals: Iterable[float | None] = arrivals_s if any(arrivals_s) else [None] * len(bodies)
    pairs = zip(bodies, arrivals, strict=True)
    return await _send(client, pairs, max_concurrency or len(bodies), on_end)


async def keep_in_flight(
    client: Asks,
    bodies: Iterable[Mapping[str, Any]],
    concurrency: int,
    on_end: Callable[[Sent], None] = lambda sent: None,
) -> list[Sent]:
    """A closed loop for as long as there are bodies, which are taken one by one as places become
    free; what became of each, in their order.
    """
    return await _send(client, ((body, None) for body in bodies), concurrency, on_end)


async def _send(
    client: Asks,
    pairs: Iterable[tuple[Mapping[str, Any], float | None]],
    concurrency: int,
    on_end: Callable[[Sent], None],
) -> list[Sent]:
    """Each body at its arrival, or where that is None when it has a place."""
    places = asyncio.Semaphore(concurrency)
    start_s = client.clock()
    tasks: list[asyncio.Task[Sent]] = []

    async def one(body: Mapping[str, Any], due_s: float) -> Sent:
        try:
            sent = await client.ask(body, due_s)
        finally:
            places.release()
        on_end(sent)
        return sent

    async with asyncio.TaskGroup() as group:
        for body, arrival_s in pairs:
            due_s = start_s + (arrival_s or 0.0)
            # Also where it is due already: a server that answers at once must not starve the loop.
            await asyncio.sleep(max(0.0, due_s - client.clock()))
            await places.acquire()
            due_s = client.clock() if arrival_s is None else due_s
            tasks.append(group.create_task(one(body, due_s)))
    return [task.result() for task in tasks]
