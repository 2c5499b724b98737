"""A closed loop over HTTP from several processes, and the stretch of it that is steady.

Many engines stream more than one process can read. Each process keeps its part of the requests in
flight until it is told to stop, and then waits for the answers that are still due, so that all are
whole. The steady stretch begins when as many requests have ended as are in flight: the burst of the
first fill has turned over.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Any, Generic, Self, TypeVar

import aiohttp

from focus_ray.benchmarks.serving_client import Client, Sent
from focus_ray.benchmarks.serving_load import keep_in_flight

S = TypeVar("S")

LOOK_EVERY_S = 0.02
TIMEOUT_S = 600.0
"""Of one request."""


@dataclass(frozen=True)
class Share:
    """What one process asks: its bodies in turns, by number, so many of them in flight."""

    url: str
    bodies: Sequence[tuple[int, Mapping[str, Any]]]
    concurrency: int


@dataclass(frozen=True)
class Load(Generic[S]):
    """A run. Times are seconds of a clock that all processes of a machine share.

    Args:
        answers: number of a body, and what became of it; all of the run, in no order.
        start_s, end_s: of the steady stretch.
        before, after: what the caller read at both ends of it.
    """

    answers: list[tuple[int, Sent]]
    start_s: float
    end_s: float
    before: S
    after: S


class Clients:
    """Processes that ask; a context manager, for they take a while to start and are few.

    Args:
        number: of processes.
    """

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context(
            "spawn"
        )  # no fork of a process that has Ray's threads
        self._stop = context.Event()
        self._num_ended = context.Value("q", 0)
        self._pipes = [context.Pipe() for _ in range(number)]
        self._processes = [
            context.Process(target=_serve, args=(theirs, self._stop, self._num_ended), daemon=True)
            for _, theirs in self._pipes
        ]

    def __enter__(self) -> Self:
        for process, (_, theirs) in zip(self._processes, self._pipes, strict=True):
            process.start()
            theirs.close()  # or the end of the process would not be seen
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for process in self._processes:
            process.terminate()
            process.join()

    def run(
        self,
        url: str,
        bodies: Sequence[Mapping[str, Any]],
        concurrency: int,
        window_s: float,
        read: Callable[[], S],
    ) -> Load[S]:
        """Keep requests in flight until the steady stretch has lasted for ``window_s``.

        Args:
            url: of the route.
            bodies: asked in their order, and from the start again.
            concurrency: requests in flight, of all processes.
            read: counters of the caller, at both ends of the stretch.

        Raises:
            ValueError: a request failed; says how.
            EOFError: a process that asks is gone.
        """
        self._stop.clear()
        self._num_ended.value = 0
        number = min(len(self._pipes), concurrency, len(bodies))
        used = [ours for ours, _ in self._pipes[:number]]
        numbered = list(enumerate(bodies))
        for place, connection in enumerate(used):
            part = concurrency // number + (place < concurrency % number)
            connection.send(Share(url, numbered[place::number], part))
        while self._num_ended.value < concurrency and not self._stop.wait(LOOK_EVERY_S):
            if wait(used, timeout=0):  # an answer before it was asked for: the process is gone
                self._stop.set()
        start_s, before = time.perf_counter(), read()
        self._stop.wait(window_s)
        end_s, after = time.perf_counter(), read()
        self._stop.set()
        answers = [answer for connection in used for answer in connection.recv()]
        failed = [sent for _, sent in answers if sent.error is not None]
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0].error} "
                f"{failed[0].message}"
            )
        return Load(answers, start_s, end_s, before, after)


def _serve(connection: Connection, stop: Event, num_ended: Synchronized[int]) -> None:
    """The whole life of a process: one share after another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that ends this one
    while True:
        try:
            share: Share = connection.recv()
        except EOFError:
            return
        connection.send(asyncio.run(ask(share, stop, num_ended)))


async def ask(share: Share, stop: Event, num_ended: Synchronized[int]) -> list[tuple[int, Sent]]:
    """Keep a share in flight until ``stop`` is set, which the first failure does, too."""
    asked: list[int] = []

    def bodies() -> Iterator[Mapping[str, Any]]:
        for number, body in cycle(share.bodies):
            if stop.is_set():
                return
            asked.append(number)
            yield body

    def on_end(sent: Sent) -> None:
        with num_ended.get_lock():
            num_ended.value += 1
        if sent.error is not None:
            stop.set()

    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = Client(session, share.url, {})
        sent = await keep_in_flight(client, bodies(), share.concurrency, on_end)
    return list(zip(asked, sent, strict=True))
