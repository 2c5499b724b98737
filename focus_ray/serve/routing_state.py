"""One router's knowledge: loads as they were published, what it sent since, where prompts begin.

Clocks are the router's own. Replicas' clocks are not compared with it: a load is known by its
epoch, and dated by when it came.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from focus_ray.serve.prefix_memory import PrefixMemory
from focus_ray.serve.replica_load import ReplicaLoad
from focus_ray.serve.routing_facts import RequestFacts
from focus_ray.serve.routing_ledger import RoutingLedger, Sent
from focus_ray.serve.routing_policy import Candidate, held_tokens, rank

STALE_AFTER_S = 2.0
"""Numbers come five to ten times a second."""

DELAY_S = 0.15
"""Usual age of a load when it comes, by Serve's controller with a period of 0.1 s. What was sent
within it is taken for unseen."""

IDLE_SHARE = 0.25
"""Time of a step of few tokens over what those of the saturation budget add to it: SDAR-8B on an
H100 takes 6.4 ms, and 24 ms more."""

PACE_MEMORY_S = 3.0
"""Over which a replica's pace is averaged: its steps and their tokens are not of one moment."""


@dataclass(frozen=True)
class _Known:
    load: ReplicaLoad
    came_s: float
    pace_s: float | None


class RoutingState:
    """What stands behind one router's choices.

    Args:
        random: breaks ties and draws; the same numbers, the same choices.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._known: dict[str, _Known] = {}
        self._ledger = RoutingLedger()
        self._prefixes = PrefixMemory()

    def observe(self, replica_id: str, stats: Mapping[str, float], now_s: float) -> None:
        """Take up what a replica published; nothing, or what another version wrote, is left."""
        try:
            load = ReplicaLoad.from_routing_stats(stats)
        except TypeError:
            return
        before = self._known.get(replica_id)
        if before is None or load.epoch > before.load.epoch:
            self._known[replica_id] = _Known(load, now_s, _pace_s(load, before, now_s))

    def retain(self, replica_ids: Collection[str]) -> None:
        """These are all replicas that there are."""
        self._known = {name: known for name, known in self._known.items() if name in replica_ids}
        self._ledger.retain(replica_ids)
        self._prefixes.retain(replica_ids)

    def rank(self, replica_ids: Sequence[str], facts: RequestFacts, now_s: float) -> list[str]:
        """Replicas, best first, for a call that costs nothing worth counting."""
        candidates = [self._candidate(replica_id, facts, now_s) for replica_id in replica_ids]
        return [choice.replica_id for choice in rank(candidates, facts, self._random)]

    def choose(
        self,
        name: str,
        call_id: str,
        replica_ids: Sequence[str],
        facts: RequestFacts,
        now_s: float,
    ) -> list[str]:
        """Replicas, best first; the request is counted at the first from now on.

        Args:
            name: of the request, unique; choosing again takes the place of what was chosen.
            call_id: Serve's id, by which the request's end will be told.
        """
        candidates = [self._candidate(replica_id, facts, now_s) for replica_id in replica_ids]
        choices = rank(candidates, facts, self._random)
        if choices:
            best = choices[0]
            sent = Sent(
                name=name,
                call_id=call_id,
                replica_id=best.replica_id,
                tokens=best.tokens,
                prefill=best.prefill,
                pages=best.pages,
                num_sequences=facts.num_completions,
                at_s=now_s,
            )
            self._ledger.choose(sent)
            self._prefixes.remember(best.replica_id, facts.chunks)
        return [choice.replica_id for choice in choices]

    def routed(self, name: str, replica_id: str, now_s: float) -> None:
        """The replica accepted the request."""
        self._ledger.routed(name, replica_id, now_s)

    def completed(self, replica_id: str, call_id: str, now_s: float) -> None:
        """A request of this call ended there, or was rejected."""
        self._ledger.completed(replica_id, call_id, now_s)

    def _candidate(self, replica_id: str, facts: RequestFacts, now_s: float) -> Candidate:
        known = self._known.get(replica_id)
        num_open = self._ledger.num_open(replica_id)
        if known is None or now_s - known.came_s > STALE_AFTER_S:
            return Candidate(replica_id, num_open=num_open)
        return Candidate(
            replica_id,
            known.load,
            known.pace_s,
            self._ledger.unseen(replica_id, known.came_s - DELAY_S),
            num_open,
            held_tokens(self._prefixes.num_held(replica_id, facts.chunks)),
        )


def _pace_s(load: ReplicaLoad, before: _Known | None, now_s: float) -> float | None:
    """Time of a step over what it should be proportional to; an idle replica keeps its pace."""
    old = before.pace_s if before else None
    if not load.num_running or not load.step_s:
        return old
    new = load.step_s / (IDLE_SHARE + load.next_step_tokens / load.saturation_tokens)
    if before is None or old is None:
        return new
    kept = math.exp(-(now_s - before.came_s) / PACE_MEMORY_S)
    return kept * old + (1.0 - kept) * new
