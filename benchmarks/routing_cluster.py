"""Replicas that only take time, many of them, behind several routers: simulated step by step.

A replica admits what waits, prefills in chunks beside the sequences that run, and ends each of
those after its steps; a step takes what ``StepTimes`` says of its tokens. Loads are published as
Ray Serve does it: those of all replicas are gathered every 0.1 s and come to the routers later.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from focus_ray.benchmarks.routing_load import TOKENS_PER_STEP, WORK_PER_STEP, Request
from focus_ray.benchmarks.routing_rivals import Router
from focus_ray.benchmarks.step_times import StepTimes
from focus_ray.serve.prefix_memory import PrefixMemory
from focus_ray.serve.replica_load import ReplicaLoad
from focus_ray.serve.routing_facts import CHUNK_TOKENS

PERIOD_S = 0.1
DELAY_S = (0.05, 0.2)
"""Of published loads, uniform: with the period, ages as measured on a real cluster."""

MAX_NUM_SEQS = 256
PREFILL_TOKENS = 2048
"""Most tokens of prompts in a step."""

TOTAL_PAGES, PAGE_TOKENS = 5000, 64
"""KV memory of SDAR-8B on a GPU of 80 GB."""

KEPT = 0.9
"""Of a running average, per step or request."""


@dataclass
class Prefilling:
    """A request whose prompt is not wholly computed."""

    request: Request
    left: int


@dataclass
class SimulatedReplica:
    """One engine. ``slowness`` multiplies the time of its steps."""

    name: str
    times: StepTimes
    slowness: float = 1.0
    waiting: deque[Request] = field(default_factory=deque)
    prefilling: deque[Prefilling] = field(default_factory=deque)
    running: list[tuple[int, str, Request]] = field(default_factory=list)
    num_steps: int = 0
    epoch: int = 0
    running_work: float = 0.0
    prefilling_work: float = 0.0
    free_pages: int = TOTAL_PAGES
    step_s: float = 0.0
    usual_steps: float = 32.0
    usual_work: float = WORK_PER_STEP
    is_stepping: bool = False

    def __post_init__(self) -> None:
        self._cache = PrefixMemory(TOTAL_PAGES * PAGE_TOKENS // CHUNK_TOKENS)

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.running)

    def begin_step(self) -> float | None:
        """Time of the next step, with all that it takes up; None where there is nothing to do."""
        while self.waiting and self._has_room_for(self.waiting[0]):
            request = self.waiting.popleft()
            self.free_pages -= _pages_of(request)
            held = self._cache.num_held(self.name, request.facts.chunks) * CHUNK_TOKENS
            self.prefilling.append(Prefilling(request, max(1, request.facts.prompt_tokens - held)))
            self.prefilling_work += request.work
        if not self.prefilling and not self.running:
            self.is_stepping = False
            return None
        budget = PREFILL_TOKENS
        for each in self.prefilling:
            chunk = min(budget, each.left)
            each.left -= chunk
            budget -= chunk
            if not budget:
                break
        seconds = self.slowness * self.times.of(self.running_work + PREFILL_TOKENS - budget)
        self.step_s = KEPT * (self.step_s or seconds) + (1.0 - KEPT) * seconds
        self.is_stepping = True
        return seconds

    def end_step(self) -> list[Request]:
        """The requests that ended in it."""
        self.num_steps += 1
        while self.prefilling and not self.prefilling[0].left:
            request = self.prefilling.popleft().request
            self.prefilling_work -= request.work
            self.running_work += request.work
            self._cache.remember(self.name, request.facts.chunks)
            heapq.heappush(
                self.running, (self.num_steps + request.num_steps, request.name, request)
            )
        ended = []
        while self.running and self.running[0][0] <= self.num_steps:
            request = heapq.heappop(self.running)[2]
            self.running_work -= request.work
            self.free_pages += _pages_of(request)
            self._cache.remember(self.name, request.known_after)
            self.usual_steps = KEPT * self.usual_steps + (1.0 - KEPT) * request.num_steps
            self.usual_work = KEPT * self.usual_work + (1.0 - KEPT) * request.work
            ended.append(request)
        return ended

    def load(self) -> ReplicaLoad:
        """What an engine knows: the work of sequences that run, averages of what is to come."""
        self.epoch += 1
        running = self.running_work + self.prefilling_work
        waiting = len(self.waiting) * self.usual_work
        return ReplicaLoad(
            epoch=self.epoch,
            next_step_tokens=running,
            waiting_tokens=waiting,
            saturation_tokens=self.times.saturation_tokens,
            tokens_per_sequence=self.usual_work,
            remaining_tokens=(running + waiting) * self.usual_steps,
            num_running=len(self.running) + len(self.prefilling),
            num_waiting=len(self.waiting),
            free_pages=self.free_pages,
            total_pages=TOTAL_PAGES,
            page_size=PAGE_TOKENS,
            step_s=self.step_s,
        )

    def _has_room_for(self, request: Request) -> bool:
        num_admitted = len(self.prefilling) + len(self.running)
        return num_admitted < MAX_NUM_SEQS and _pages_of(request) <= self.free_pages


@dataclass(frozen=True)
class Outcome:
    """Latencies by request, and the CPU time that each choice took; seconds."""

    latencies_s: Mapping[str, float]
    choosing_s: Sequence[float]
    requests_at: Mapping[str, int]


class Cluster:
    """Replicas, routers, and a clock that jumps from one event to the next."""

    def __init__(
        self, replicas: Sequence[SimulatedReplica], routers: Sequence[Router], random: Random
    ) -> None:
        self._replicas = {replica.name: replica for replica in replicas}
        self._routers = routers
        self._random = random
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._num_unfinished = 0
        self._latencies_s: dict[str, float] = {}
        self._choosing_s: list[float] = []
        self._requests_at = dict.fromkeys(self._replicas, 0)

    def run(self, requests: Sequence[Request]) -> Outcome:
        """From the first arrival to the last answer."""
        self._num_unfinished = len(requests)
        for request in requests:
            self._at(request.arrives_s, partial(self._arrive, request))
        self._at(requests[0].arrives_s, self._gather)
        while self._num_unfinished:
            now_s, _, happen = heapq.heappop(self._events)
            happen(now_s)
        return Outcome(self._latencies_s, self._choosing_s, self._requests_at)

    def _at(self, when_s: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), happen))

    def _arrive(self, request: Request, now_s: float) -> None:
        router = self._routers[request.router]
        started = time.thread_time()
        replica = self._replicas[router.choose(request, now_s)]
        self._choosing_s.append(time.thread_time() - started)
        self._requests_at[replica.name] += 1
        replica.waiting.append(request)
        router.accepted(replica.name, replica.num_requests)
        if not replica.is_stepping:
            self._step(replica, now_s)

    def _step(self, replica: SimulatedReplica, now_s: float) -> None:
        seconds = replica.begin_step()
        if seconds is not None:
            self._at(now_s + seconds, partial(self._end_step, replica))

    def _end_step(self, replica: SimulatedReplica, now_s: float) -> None:
        for request in replica.end_step():
            self._latencies_s[request.name] = now_s - request.arrives_s
            self._num_unfinished -= 1
            self._routers[request.router].completed(request, replica.name, now_s)
        self._step(replica, now_s)

    def _gather(self, now_s: float) -> None:
        stats = {name: each.load().as_routing_stats() for name, each in self._replicas.items()}
        for router in self._routers:
            comes_s = now_s + self._random.uniform(*DELAY_S)
            self._at(comes_s, partial(router.publish, stats))
        self._at(now_s + PERIOD_S, self._gather)


def _pages_of(request: Request) -> int:
    """Pages of the whole request, with those that it shares: engines share them, we do not."""
    answer = request.num_steps * TOKENS_PER_STEP
    return -(-round(request.facts.prompt_tokens + answer) // PAGE_TOKENS)
