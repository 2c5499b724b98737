"""Requests for simulated replicas: how long, when, and which of them share a beginning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from focus_ray.serve.routing_facts import CHUNK_TOKENS, RequestFacts

TOKENS_PER_STEP = 3.0
"""Decoded by a sequence and step; SDAR-8B's shape with eviction, as recorded."""

WORK_PER_STEP = 9.0
"""Tokens that a sequence adds to a step: what it retains, and a share of what it does not."""

PROMPT_TOKENS = 183
ANSWER_TOKENS = 250
LONG_SHARE, LONG_TIMES = 0.005, 20
TURNS, THINKING_S = 6, 4.0
BURST_S, BURST_TIMES = 2.0, 3.0
"""Bursts last and lie so long apart on average, and bring so many times the requests of lulls."""

LOADS = ("uniform", "skewed", "conversations")
ARRIVALS = ("poisson", "bursty")


@dataclass(frozen=True)
class Request:
    """One request: what routers know of it, and what only its replica finds out.

    Args:
        arrives_s: from the beginning.
        router: its number.
        facts: what routers know.
        num_steps: denoising steps of its answer.
        work: tokens that it adds to each of them.
        known_after: chunks that prompts which go on from its answer begin with.
    """

    name: str
    arrives_s: float
    router: int
    facts: RequestFacts
    num_steps: int
    work: float
    known_after: tuple[bytes, ...]

    @property
    def total_work(self) -> float:
        return self.facts.prompt_tokens + self.num_steps * self.work


@dataclass(frozen=True)
class Load:
    """A kind of load.

    Args:
        kind: ``uniform``: answers of about one length. ``skewed``: a few are very long, and some
            take more work a step than others. ``conversations``: skewed, in turns that each begin
            with all of the turns before.
        arrivals: ``poisson`` or ``bursty``.
        requests_per_s: on average.
        duration_s: requests arrive so long.
        num_routers: each request comes in through one of them.
    """

    kind: str
    arrivals: str
    requests_per_s: float
    duration_s: float
    num_routers: int

    def draw(self, seed: int) -> list[Request]:
        """All requests in the order of arrival; the same seed, the same requests."""
        random = Random(seed)
        per_arrival = TURNS if self.kind == "conversations" else 1
        requests: list[Request] = []
        for number, arrives_s in enumerate(self._arrivals(random, per_arrival)):
            requests.extend(self._conversation(f"{number}", arrives_s, per_arrival, random))
        kept = [request for request in requests if request.arrives_s < self.duration_s]
        return sorted(kept, key=lambda request: request.arrives_s)

    def _arrivals(self, random: Random, per_arrival: int) -> Iterator[float]:
        rate = self.requests_per_s / per_arrival
        # Conversations that began before the time that is looked at go on into it.
        start_s = -THINKING_S * TURNS if per_arrival > 1 else 0.0
        quiet = 2.0 * rate / (1.0 + BURST_TIMES)
        now_s, is_burst, changes_s = start_s, False, math.inf
        if self.arrivals == "bursty":
            changes_s = start_s + random.expovariate(1.0 / BURST_S)
            rate = quiet
        while now_s < self.duration_s:
            next_s = now_s + random.expovariate(rate)
            if next_s > changes_s:  # memoryless: draw again from the change on
                now_s, is_burst = changes_s, not is_burst
                rate = quiet * BURST_TIMES if is_burst else quiet
                changes_s = now_s + random.expovariate(1.0 / BURST_S)
                continue
            now_s = next_s
            yield now_s

    def _conversation(
        self, name: str, arrives_s: float, num_turns: int, random: Random
    ) -> Iterator[Request]:
        said = 0
        for turn in range(num_turns):
            prompt_tokens = said + _around(PROMPT_TOKENS, random)
            answer_tokens = _around(ANSWER_TOKENS, random)
            work = WORK_PER_STEP
            if self.kind != "uniform":
                answer_tokens *= LONG_TIMES if random.random() < LONG_SHARE else 1
                work = random.gammavariate(4.0, WORK_PER_STEP / 4.0)
            said = prompt_tokens + answer_tokens
            yield Request(
                name=f"{name}-{turn}",
                arrives_s=arrives_s,
                router=random.randrange(self.num_routers),
                facts=RequestFacts(
                    prompt_tokens=prompt_tokens, chunks=_chunks(name, prompt_tokens)
                ),
                num_steps=max(1, round(answer_tokens / TOKENS_PER_STEP)),
                work=work,
                known_after=_chunks(name, said),
            )
            arrives_s += random.expovariate(1.0 / THINKING_S)


def _around(mean: float, random: Random) -> int:
    """Lognormal with the given mean and a standard deviation of half of it."""
    variance = math.log(1.25)
    return max(1, round(random.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))))


def _chunks(name: str, num_tokens: int) -> tuple[bytes, ...]:
    return tuple(f"{name}:{place}".encode() for place in range(num_tokens // CHUNK_TOKENS))
