"""The closed loop: a fixed number of requests in flight, taken one by one from a shared list.

A request that finishes is replaced before the next step, as by so many clients that never pause.
Knows an engine's public face and a clock; neither tensors nor text.

Two stretches of a run are told apart:

- *whole*: from the first request that is added to the last delta of the last one. Filling the
  empty engine and draining it are in it.
- *steady*: from the moment when as many requests have finished as there are places, so that the
  burst of the first fill has turned over once (the warm-up), to the last step during which every
  place was taken. None where the list is too short for that: with three times as many requests as
  places, about a third of the run is steady.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

from focus_ray.engine.outputs import FinishReason, GenerationRequest, RequestStats, TokenDelta

S = TypeVar("S")


class LoopEngine(Protocol):
    """The part of ``focus_ray.engine.engine.Engine`` that is used here."""

    def add(self, request: GenerationRequest) -> None: ...
    def abort(self, request_id: str) -> object: ...
    def has_unfinished(self) -> bool: ...
    def step(self) -> list[TokenDelta]: ...


@dataclass
class RequestRecord:
    """What a client saw of its request. Times are seconds of the loop's clock.

    Args:
        in_first_fill: it found an empty place at the start, not one that had become free.
        arrivals: time and number of tokens of every delta that brought tokens.
    """

    request_id: str
    added_s: float
    in_first_fill: bool
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    finished_s: float = float("inf")
    finish_reason: FinishReason | None = None
    text: str = ""
    stats: RequestStats | None = None

    def take(self, delta: TokenDelta, now_s: float) -> None:
        self.text += delta.text
        if delta.token_ids:
            self.arrivals.append((now_s, len(delta.token_ids)))
        if delta.finish_reason is not None:
            self.finished_s, self.finish_reason = now_s, delta.finish_reason
            self.stats = delta.stats

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def latency_s(self) -> float:
        """From being added to the last delta."""
        return self.finished_s - self.added_s

    @property
    def first_token_s(self) -> float | None:
        """From being added to the first tokens; None without any."""
        return self.arrivals[0][0] - self.added_s if self.arrivals else None

    @property
    def per_token_s(self) -> float | None:
        """Mean time of a token after those of the first delta; None if there are none."""
        rest = sum(count for _, count in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / rest if rest else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between deltas that brought tokens; blocks bring several tokens at once."""
        times = [at for at, _ in self.arrivals]
        return [late - early for early, late in pairwise(times)]


@dataclass(frozen=True)
class Stretch(Generic[S]):
    """A part of a run, with what the caller read from the engine at both ends."""

    start_s: float
    end_s: float
    before: S
    after: S

    @property
    def wall_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class LoopRecord(Generic[S]):
    """A finished run; requests in the order of the list."""

    concurrency: int
    requests: list[RequestRecord]
    whole: Stretch[S]
    steady: Stretch[S] | None


@dataclass(frozen=True)
class LoopProgress:
    """How far a run is."""

    num_finished: int
    num_tokens: int
    elapsed_s: float


class ClosedLoop(Generic[S]):
    """One run over one list of requests.

    Args:
        engine: has nothing else to do.
        requests: with ids of their own and ``n`` of 1; at least ``concurrency`` of them.
        concurrency: requests in flight, as long as the list lasts.
        snapshot: reads whatever counters the caller wants to know at the ends of a stretch.
        clock: seconds, from any start.

    Raises:
        ValueError: the list can never fill all places.
    """

    def __init__(
        self,
        engine: LoopEngine,
        requests: Sequence[GenerationRequest],
        concurrency: int,
        snapshot: Callable[[], S],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 1 <= concurrency <= len(requests):
            raise ValueError(
                f"{len(requests)} requests cannot keep {concurrency} in flight; "
                "take more prompts or a lower concurrency"
            )
        self._engine = engine
        self._pending = deque(requests)
        self._concurrency = concurrency
        self._snapshot = snapshot
        self._clock = clock
        self._records: dict[str, RequestRecord] = {}
        self._in_flight: set[str] = set()
        self._num_finished = 0
        self._num_tokens = 0
        self._now_s = 0.0
        self._is_stepping = False

    @property
    def _num_free(self) -> int:
        return self._concurrency - len(self._in_flight)

    def run(self, on_finish: Callable[[LoopProgress], None] | None = None) -> LoopRecord[S]:
        """Answer all requests.

        Args:
            on_finish: called after every step that finished a request.

        Raises:
            RuntimeError: the engine went idle with requests in flight.
        """
        before, start_s = self._snapshot(), self._clock()
        self._now_s = start_s
        warm: tuple[float, S] | None = None
        steady: Stretch[S] | None = None
        was_full = True
        try:
            while self._pending or self._in_flight:
                self.fill()
                finished = self.step()
                stays_full = was_full and len(self._pending) >= self._num_free
                if was_full and not stays_full and warm is not None:
                    steady = Stretch(warm[0], self._now_s, warm[1], self._snapshot())
                if stays_full and warm is None and self._num_finished >= self._concurrency:
                    warm = (self._now_s, self._snapshot())
                was_full = stays_full
                if on_finish is not None and finished:
                    elapsed_s = self._now_s - start_s
                    on_finish(LoopProgress(self._num_finished, self._num_tokens, elapsed_s))
            after = self._snapshot()
        finally:
            self.abandon()
        whole = Stretch(start_s, self._now_s, before, after)
        return LoopRecord(self._concurrency, list(self._records.values()), whole, steady)

    def fill(self) -> None:
        """Add requests until every place is taken or the list is empty."""
        while self._pending and self._num_free:
            request = self._pending.popleft()
            in_first_fill = len(self._records) < self._concurrency
            record = RequestRecord(request.request_id, self._clock(), in_first_fill)
            self._engine.add(request)
            self._records[request.request_id] = record
            self._in_flight.add(request.request_id)

    def step(self) -> int:
        """One step of the engine; how many requests finished in it."""
        if not self._engine.has_unfinished():
            raise RuntimeError(f"the engine is idle with {len(self._in_flight)} requests in flight")
        self._is_stepping = True
        deltas = self._engine.step()
        self._is_stepping = False
        self._now_s = self._clock()
        finished = 0
        for delta in deltas:
            self._records[delta.request_id].take(delta, self._now_s)
            self._num_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._in_flight.discard(delta.request_id)
                finished += 1
        self._num_finished += finished
        return finished

    def abandon(self) -> None:
        """Abort what is in flight, and leave the engine without a pass on its way.

        An engine whose step was broken off, as by Ctrl-C, is left alone: it can take no other.
        """
        if self._is_stepping:
            return
        for request_id in self._in_flight:
            self._engine.abort(request_id)
        self._in_flight.clear()
        self._pending.clear()
        while self._engine.has_unfinished():
            self._engine.step()
