"""Which replica should take a request: the one whose steps it lengthens least. A pure function.

The measure is predicted occupancy after taking the request, in tokens a step over the saturation
budget. Everything else is brought into this one unit:

* what was sent since a load was measured adds what it will add to a step;
* a prompt's prefill is spread over the steps that its answer is likely to take, so a replica that
  holds a prefix saves so many tokens a step, and takes the request if that outweighs the imbalance;
* a replica whose steps take longer than others' at equal occupancy counts as so much fuller.

Replicas without KV room for the prompt stand behind those with room, and those whose numbers are
missing or old behind both: they may be starting, or hang. Where most are old there is nothing to
compare, and two at random are compared by what this router has open at each (the power of two
choices: Mitzenmacher, IEEE TPDS 12(10), 2001).

Replicas that are unhealthy or draining are never among the candidates: Serve leaves them out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from statistics import median
from typing import NamedTuple

from focus_ray.serve.replica_load import ReplicaLoad
from focus_ray.serve.routing_facts import CHUNK_TOKENS, RequestFacts
from focus_ray.serve.routing_ledger import NOTHING, Unseen

SAME_PACE = 1.25
"""Replicas within this factor of the median are equally fast; steps vary more than that."""

USUAL_STEPS = 64
"""Steps of a request while no replica has told how long theirs have still to run."""

MAX_ROUTERS = 16.0


class Candidate(NamedTuple):
    """A replica, as one router sees it now. A tuple, for one is made per replica and request.

    Args:
        replica_id: unique.
        load: as last published; None where nothing was, or long ago.
        pace_s: time of its steps, made comparable among occupancies; None while unknown.
        unseen: what this router changed since the load was measured.
        num_open: sequences that this router has there.
        held_tokens: tokens of the prompt's beginning that it is likely to hold.
    """

    replica_id: str
    load: ReplicaLoad | None = None
    pace_s: float | None = None
    unseen: Unseen = NOTHING
    num_open: int = 0
    held_tokens: int = 0


class Choice(NamedTuple):
    """A place for the request, and what it would bring there: see ``Sent``."""

    replica_id: str
    tokens: float = 0.0
    prefill: float = 0.0
    pages: int = 0


def rank(candidates: Sequence[Candidate], facts: RequestFacts, random: Random) -> list[Choice]:
    """All candidates, best first."""
    known = [(each, each.load) for each in candidates if each.load is not None]
    unknown = [each for each in candidates if each.load is None]
    if len(known) < len(unknown):
        return _two_choices(candidates, random)
    fleet = _Fleet.of(known)
    steps = max(1.0, min(fleet.steps, facts.max_tokens or math.inf))
    home = _home(facts.session, candidates)
    scored: list[tuple[bool, float, Choice]] = []
    for each, load in known:
        held = each.held_tokens
        if each.replica_id == home:
            held = max(held, facts.prompt_tokens // 2)
        prefill = max(0, facts.prompt_tokens - held)
        tokens = facts.num_completions * (load.tokens_per_sequence or fleet.tokens_per_sequence)
        own = tokens + prefill / steps
        # Other routers see the same loads and have sent about as much as this one since. Each
        # begins elsewhere among replicas that are about as full, or all would choose the same
        # ones: with 16 routers and 32 replicas, p99 was 70 % longer without these two lines.
        unseen = (each.unseen.tokens + each.unseen.prefill) * fleet.num_routers
        unseen += random.random() * (fleet.num_routers - 1.0) * own
        before = max(0.0, load.next_step_tokens + load.waiting_tokens + unseen)
        score = fleet.slowness(each.pace_s) * (before + own) / load.saturation_tokens
        pages = -(-prefill // load.page_size) + facts.num_completions
        is_full = pages > load.free_pages - each.unseen.pages * fleet.num_routers
        scored.append((is_full, score, Choice(each.replica_id, tokens, prefill / steps, pages)))
    random.shuffle(unknown)
    unknown.sort(key=lambda each: each.num_open)
    return [choice for _, _, choice in sorted(scored)] + [
        Choice(each.replica_id) for each in unknown
    ]


@dataclass(frozen=True)
class _Fleet:
    """What all replicas together say about requests and routers.

    Args:
        steps: that a sequence has still to run, on average.
        tokens_per_sequence: what a sequence adds to a step.
        pace_s: of the median replica; None while unknown.
        num_routers: estimate of how many routers there are that send like this one.
    """

    steps: float
    tokens_per_sequence: float
    pace_s: float | None
    num_routers: float

    @classmethod
    def of(cls, known: Sequence[tuple[Candidate, ReplicaLoad]]) -> _Fleet:
        step_tokens = remaining = 0.0
        num_sequences = num_open = 0
        weights: list[float] = []
        for each, load in known:
            step_tokens += load.next_step_tokens + load.waiting_tokens
            remaining += load.remaining_tokens
            num_sequences += load.num_running + load.num_waiting
            num_open += each.num_open
            if load.tokens_per_sequence > 0.0:
                weights.append(load.tokens_per_sequence)
        paces = [each.pace_s for each, _ in known if each.pace_s is not None]
        return cls(
            steps=remaining / step_tokens if step_tokens and remaining else USUAL_STEPS,
            tokens_per_sequence=sum(weights) / len(weights) if weights else 1.0,
            pace_s=median(paces) if paces else None,
            num_routers=min(max(1.0, num_sequences / num_open), MAX_ROUTERS) if num_open else 1.0,
        )

    def slowness(self, pace_s: float | None) -> float:
        """How many times as long as others' its steps take; 1 where they differ little."""
        if pace_s is None or not self.pace_s:
            return 1.0
        ratio = pace_s / self.pace_s
        return 1.0 if 1 / SAME_PACE < ratio < SAME_PACE else ratio


def _two_choices(candidates: Sequence[Candidate], random: Random) -> list[Choice]:
    order = random.sample(candidates, len(candidates))
    order[:2] = sorted(order[:2], key=lambda each: each.num_open)
    return [Choice(each.replica_id) for each in order]


def _home(session: str | None, candidates: Sequence[Candidate]) -> str | None:
    """Where a session belongs, to all routers alike, and mostly still when replicas come and go.

    By rendezvous hashing (Thaler and Ravishankar, IEEE/ACM ToN 6(1), 1998). Routers credit it with
    half the prompt, since another one may have sent the session's beginning.
    """
    if session is None:
        return None
    key = session.encode("utf-8", "surrogatepass")

    def height(candidate: Candidate) -> bytes:
        return blake2b(key + candidate.replica_id.encode(), digest_size=8).digest()

    return max(candidates, key=height).replica_id


def held_tokens(num_chunks: int) -> int:
    """Tokens of so many chunks of a prompt."""
    return num_chunks * CHUNK_TOKENS
