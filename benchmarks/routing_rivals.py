"""Ways of choosing a replica, behind one interface: ours, and those that it is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Protocol

from focus_ray.benchmarks.routing_load import Request
from focus_ray.serve.prefix_memory import PrefixMemory
from focus_ray.serve.routing_state import RoutingState

PREFIX_MATCH, PREFIX_IMBALANCE = 0.1, 8
"""Share of a prompt that makes a replica its place, and by how many requests the fullest may lead
the emptiest for that."""


class Router(Protocol):
    """One router of several, with what it alone knows."""

    def publish(self, stats: Mapping[str, Mapping[str, float]], now_s: float) -> None:
        """What replicas published some time ago has come."""
        ...

    def choose(self, request: Request, now_s: float) -> str: ...

    def accepted(self, replica_id: str, num_requests: int) -> None:
        """The replica took the request, and told how many it has now."""
        ...

    def completed(self, request: Request, replica_id: str, now_s: float) -> None: ...


class Occupancy:
    """Ours, as it serves."""

    def __init__(self, replica_ids: Sequence[str], random: Random) -> None:
        self._replica_ids = replica_ids
        self._state = RoutingState(random)

    def publish(self, stats: Mapping[str, Mapping[str, float]], now_s: float) -> None:
        for replica_id, each in stats.items():
            self._state.observe(replica_id, each, now_s)
        self._state.retain(stats.keys())

    def choose(self, request: Request, now_s: float) -> str:
        name = request.name
        return self._state.choose(name, name, self._replica_ids, request.facts, now_s)[0]

    def accepted(self, replica_id: str, num_requests: int) -> None:
        """Counted already."""

    def completed(self, request: Request, replica_id: str, now_s: float) -> None:
        self._state.completed(replica_id, request.name, now_s)


class RoundRobin:
    """One after the other."""

    def __init__(self, replica_ids: Sequence[str], random: Random) -> None:
        self._replica_ids = replica_ids
        self._random = random
        self._next = random.randrange(len(replica_ids))

    def publish(self, stats: Mapping[str, Mapping[str, float]], now_s: float) -> None:
        """Not looked at."""

    def choose(self, request: Request, now_s: float) -> str:
        self._next = (self._next + 1) % len(self._replica_ids)
        return self._replica_ids[self._next]

    def accepted(self, replica_id: str, num_requests: int) -> None:
        """Not looked at."""

    def completed(self, request: Request, replica_id: str, now_s: float) -> None:
        """Not looked at."""


class LeastRequests(RoundRobin):
    """The replica at which this router has the fewest requests open, as HTTP proxies do it."""

    def __init__(self, replica_ids: Sequence[str], random: Random) -> None:
        super().__init__(replica_ids, random)
        self._num_open: Counter[str] = Counter()

    def choose(self, request: Request, now_s: float) -> str:
        chosen = min(
            self._replica_ids, key=lambda each: (self._num_open[each], self._random.random())
        )
        self._num_open[chosen] += 1
        return chosen

    def completed(self, request: Request, replica_id: str, now_s: float) -> None:
        self._num_open[replica_id] -= 1


class PowerOfTwo(LeastRequests):
    """Ray Serve's default: the shorter queue of two, by a cache that every reply corrects."""

    def choose(self, request: Request, now_s: float) -> str:
        two = self._random.sample(self._replica_ids, min(2, len(self._replica_ids)))
        chosen = min(two, key=lambda each: self._num_open[each])
        self._num_open[chosen] += 1
        return chosen

    def accepted(self, replica_id: str, num_requests: int) -> None:
        self._num_open[replica_id] = num_requests

    def completed(self, request: Request, replica_id: str, now_s: float) -> None:
        self._num_open[replica_id] = max(0, self._num_open[replica_id] - 1)


class PrefixAffinity(PowerOfTwo):
    """The replica that was sent most of the prompt, while queues are about even; else as above."""

    def __init__(self, replica_ids: Sequence[str], random: Random) -> None:
        super().__init__(replica_ids, random)
        self._prefixes = PrefixMemory()

    def choose(self, request: Request, now_s: float) -> str:
        chunks = request.facts.chunks
        queues = [self._num_open[each] for each in self._replica_ids]
        chosen = None
        if chunks and max(queues) - min(queues) <= PREFIX_IMBALANCE:
            held = {each: self._prefixes.num_held(each, chunks) for each in self._replica_ids}
            best = max(self._replica_ids, key=lambda each: held[each])
            if held[best] >= PREFIX_MATCH * len(chunks):
                chosen = best
                self._num_open[best] += 1
        if chosen is None:
            chosen = super().choose(request, now_s)
        self._prefixes.remember(chosen, chunks)
        return chosen


ROUTERS: dict[str, Callable[[Sequence[str], Random], Router]] = {
    "occupancy": Occupancy,
    "power_of_two": PowerOfTwo,
    "round_robin": RoundRobin,
    "least_requests": LeastRequests,
    "prefix_affinity": PrefixAffinity,
}
