"""The engine behind an event loop: one thread steps, every request is an async stream.

All calls to the engine happen on its thread. The loop side leaves commands in a queue and reads
deltas from a queue per request; neither side waits for the other.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from focus_ray.config import EngineConfig
from focus_ray.engine.assembly import assemble
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import EngineLoad, GenerationRequest, TokenDelta, joined
from focus_ray.engine.ranks import RankGroup
from focus_ray.errors import EngineDead

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_News = list[TokenDelta] | EngineDead

IDLE_WAIT_S = 0.5
"""How long an idle engine sleeps; a command wakes it at once. Then it takes a new snapshot of its
load: by the age of that, routers tell who does not answer."""


class _Stream:
    """Deltas of one request on their way to the event loop that asked for them."""

    def __init__(self, num_completions: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.deltas: asyncio.Queue[_News] = asyncio.Queue()
        self.has_end = asyncio.Event()
        self.num_unfinished = num_completions

    def put(self, item: _News) -> None:
        """On the loop's thread."""
        self.deltas.put_nowait(item)
        if isinstance(item, EngineDead) or any(delta.finish_reason for delta in item):
            self.has_end.set()

    async def get(self) -> list[TokenDelta]:
        """One delta of each completion that has news: all of it, however many steps it took.

        So a reader that falls behind gets text less often, and not later and later.
        """
        items = [await self.deltas.get()]
        while not self.deltas.empty():
            items.append(self.deltas.get_nowait())
        self.has_end.clear()
        by_index: dict[int, list[TokenDelta]] = {}
        for item in items:
            if isinstance(item, EngineDead):
                if not by_index:
                    raise item
                self.put(item)  # nothing comes after it
            else:
                for delta in item:
                    by_index.setdefault(delta.index, []).append(delta)
        return [joined(deltas) for deltas in by_index.values()]

    async def pause(self, seconds: float) -> None:
        """Let news gather for so long; the end of a completion is not kept waiting."""
        if seconds > 0.0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.has_end.wait(), seconds)


def _send(news: Iterable[tuple[_Stream, _News]]) -> None:
    """From the engine's thread to the loops of the streams; a loop that is gone no longer cares.

    Each loop is woken once: waking it for each of 512 streams took 1.5 ms a step instead of 0.3.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _News]]] = {}
    for stream, item in news:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, items in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, items)
        except RuntimeError:
            logger.debug(
                "the event loop of %d streams is closed; their deltas are dropped", len(items)
            )


def _put_all(items: list[tuple[_Stream, _News]]) -> None:
    for stream, item in items:
        stream.put(item)


class AsyncEngine:
    """An ``Engine`` on its own thread.

    Args:
        engine: not used by anybody else from now on.
        model_name: as users ask for it.
    """

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.model_name = model_name
        self.tokenizer = engine.tokenizer
        self.max_model_len = engine.limits.max_model_len
        self.vocab_size = engine.limits.vocab_size
        self.default_params = engine.default_params
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._death: EngineDead | None = None
        self._stopping = threading.Event()
        self._load = engine.load()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, config: EngineConfig, ranks: RankGroup | None = None) -> AsyncEngine:
        """Load the model and start stepping; blocks until it is ready.

        Args:
            ranks: how further ranks are started; None: as processes of this machine.
        """
        return cls(Engine(config, assemble(config, ranks=ranks)), config.model)

    async def generate(
        self, request: GenerationRequest, pause_s: Callable[[], float] = lambda: 0.0
    ) -> AsyncGenerator[TokenDelta, None]:
        """Stream the deltas of a request until each of its completions has finished.

        Leaving the stream early, by ``aclose`` or cancellation, aborts the request before the next
        denoising step.

        Args:
            pause_s: asked after each look at what is new, for the seconds until the next. What the
                engine decodes meanwhile is in the next delta. An end is told at once.

        Raises:
            RequestRejected: before the first delta; the request can never run as it stands.
            EngineOverloaded: before the first delta; the queue is full.
            EngineDead: at any time.
        """
        stream = _Stream(len(request.emitted_before))
        added = asyncio.wrap_future(self._call(lambda: self._add(request, stream)))
        try:
            await asyncio.shield(added)
            while stream.num_unfinished:
                news, next_s = await stream.get(), stream.loop.time() + pause_s()
                for delta in news:
                    stream.num_unfinished -= delta.finish_reason is not None
                    yield delta
                if stream.num_unfinished:
                    await stream.pause(next_s - stream.loop.time())
        finally:
            if stream.num_unfinished:
                added.add_done_callback(_retrieve)
                self._abort_stream(request.request_id, stream)

    def abort(self, request_id: str) -> None:
        """End a request; its stream sees a last delta with ``finish_reason`` "abort"."""

        def command() -> None:
            if self._death is None:  # a dead engine is in no state to be asked, on any thread
                self._deliver(self._engine.abort(request_id))

        self._commands.put(command)

    def load(self) -> EngineLoad:
        """The snapshot taken after the latest step."""
        return self._load

    def raise_if_dead(self) -> None:
        """Raise EngineDead, with the reason, if the engine stopped."""
        if self._death is not None:
            raise self._death

    async def check_alive(self, timeout_s: float) -> None:
        """Ask the engine's thread and wait for its answer.

        Raises:
            EngineDead: it stopped, or did not answer within ``timeout_s`` seconds.
        """
        answer = asyncio.wrap_future(self._call(self._engine.check))
        try:
            await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise EngineDead(f"the engine did not answer within {timeout_s} s") from None

    def shutdown(self) -> None:
        """Stop stepping; requests that still run end with EngineDead. Safe to call twice."""
        self._stopping.set()
        self._commands.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _call(self, action: Callable[[], Result]) -> Future[Result]:
        """Run ``action`` on the engine's thread between two steps."""
        future: Future[Result] = Future()

        def command() -> None:
            if self._death is not None:
                future.set_exception(self._death)
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except Exception as error:
                    future.set_exception(error)

        self._commands.put(command)
        if self._death is not None:  # nobody else looks at the queue any more
            self._run_commands()
        return future

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._run_commands(wait=not self._engine.has_unfinished())
                deltas = self._engine.step() if self._engine.has_unfinished() else []
                self._load = self._engine.load()  # first: who has a delta finds it counted
                self._deliver(deltas)
            self._die(EngineDead("the engine was shut down"))
        except BaseException as error:
            logger.exception("the engine stopped after an internal error")
            self._die(
                error
                if isinstance(error, EngineDead)
                else EngineDead(f"the engine stopped after {type(error).__name__}: {error}")
            )
        finally:
            self._engine.close()

    def _run_commands(self, wait: bool = False) -> None:
        try:
            while True:
                command = self._commands.get(block=wait, timeout=IDLE_WAIT_S)
                command()
                wait = False
        except queue.Empty:
            return

    def _die(self, death: EngineDead) -> None:
        # from the next line on, other threads answer commands too: they must find no streams
        streams, self._streams = self._streams, {}
        self._death = death
        _send((stream, death) for stream in streams.values())
        self._run_commands()

    def _add(self, request: GenerationRequest, stream: _Stream) -> None:
        self._engine.add(request)
        self._streams[request.request_id] = stream

    def _abort_stream(self, request_id: str, stream: _Stream) -> None:
        """Abort, unless the id has passed on to another stream in the meantime."""

        def command() -> None:
            if self._streams.get(request_id) is stream:
                del self._streams[request_id]
                self._engine.abort(request_id)

        self._commands.put(command)

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        by_request: dict[str, list[TokenDelta]] = {}
        for delta in deltas:
            by_request.setdefault(delta.request_id, []).append(delta)
        running, streams = self._engine.running_requests, self._streams
        _send((streams[name], group) for name, group in by_request.items() if name in streams)
        for request_id in by_request.keys() - running:
            streams.pop(request_id, None)


def _retrieve(future: asyncio.Future[None]) -> None:
    """Take note of a failure nobody waits for, so that asyncio does not complain."""
    if not future.cancelled():
        future.exception()
