"""Ray Serve's request router, driven by occupancy. Everything alpha about routing stands here.

Decisions are ``RoutingState``'s; this file translates. Written for Ray 2.60.
"""

from __future__ import annotations

import time
from random import Random
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from focus_ray.openai.messages import Submission
from focus_ray.serve.model_args import RouterName
from focus_ray.serve.routing_facts import RequestFacts, facts_of
from focus_ray.serve.routing_state import RoutingState

STATS_PERIOD_S = 0.1
"""Serve's controller looks at replicas this often and no more."""

NUM_TRIED = 8
"""Replicas offered one by one. The rest is offered at once: where so many are full, Serve's own
count of requests tells as much."""


def router_config(name: RouterName) -> RequestRouterConfig:
    """How Serve's handles find a replica, and how often replicas are asked for their load."""
    if name == "power_of_two":
        return RequestRouterConfig()
    options: dict[str, Any] = {
        "request_router_class": OccupancyRouter,
        "request_routing_stats_period_s": STATS_PERIOD_S,
    }
    return RequestRouterConfig(**options)


# FIFO, because the base class tells waiting requests apart by Serve's id, which the prompts of one
# HTTP request share: the second of them would wait for ever.
class OccupancyRouter(FIFOMixin, RequestRouter):
    """Offers replicas in the order of ``RoutingState``."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Serve calls it once, before it tells of replicas."""
        self._state = RoutingState(Random())

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve tells of every change: replicas that serve, and what they published."""
        now_s = time.monotonic()
        for replica in replicas:
            self._state.observe(replica.replica_id.unique_id, replica.routing_stats or {}, now_s)
        self._state.retain({replica.replica_id.unique_id for replica in replicas})
        super().update_replicas(replicas)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica a rank: within a rank Serve would choose by its own count."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        submission = _submission(pending_request)
        now_s = time.monotonic()
        if pending_request is None or submission is None:
            order = self._state.rank(list(by_id), RequestFacts(), now_s)
        else:
            call_id = pending_request.metadata.internal_request_id
            facts = facts_of(submission)
            order = self._state.choose(submission.request_id, call_id, list(by_id), facts, now_s)
        if pending_request is not None:
            # Without it Serve asks again at once, and again, while all replicas are full.
            pending_request.routing_context.should_backoff = True
        ranked = [by_id[replica_id] for replica_id in order]
        return [[replica] for replica in ranked[:NUM_TRIED]] + [ranked[NUM_TRIED:]]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """A replica accepted the request."""
        if (submission := _submission(pending_request)) is not None:
            self._state.routed(submission.request_id, replica_id.unique_id, time.monotonic())

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request ended, or was rejected."""
        self._state.completed(replica_id.unique_id, internal_request_id, time.monotonic())


def _submission(pending_request: PendingRequest | None) -> Submission | None:
    """What is to be generated; None for other calls, which weigh nothing."""
    if pending_request is None:
        return None
    return next((arg for arg in pending_request.args if isinstance(arg, Submission)), None)
