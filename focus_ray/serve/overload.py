"""A flood stops at the door: what engines have no place for is refused before it costs them.

An engine has a queue of its own and refuses what does not fit, but by then a request has been
sent, turned into tokens and looked at, in the process that steps for those who were accepted. Here
it costs a comparison. The count is this ingress's own; where several of them share the engines,
each lets in as many as fit in all, and the engines refuse the rest.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.core import GaugeMetricFamily

from focus_ray.errors import EngineDead, EngineOverloaded
from focus_ray.openai.messages import Chunk, Submission
from focus_ray.serve.client import EngineClient
from focus_ray.serve.client_wrapper import ClientWrapper
from focus_ray.serve.metrics import PREFIX

LABELS = ("model_name", "ingress")
# Of the average stay of a sequence, per one that ends.
STAY_WEIGHT = 0.1
LONGEST_RETRY_AFTER_S = 60.0


class OverloadGuard(ClientWrapper):
    """An engine client that refuses at once what would not find a place.

    Args:
        client: reaches the engines; it hands requests over where it does, so that one which was
            let in keeps its place when its engine dies.
        places_per_engine: sequences that run or wait at one.
        model_name: label of the metrics.
        ingress_name: label of the metrics; tells several ingresses apart.
    """

    def __init__(
        self, client: EngineClient, places_per_engine: int, model_name: str, ingress_name: str
    ) -> None:
        super().__init__(client)
        self._places_per_engine = places_per_engine
        self._labels = (model_name, ingress_name)
        self._num_open = 0
        self._queue = _ImaginedQueue()
        self._registry = CollectorRegistry()
        self._turned_away = Counter(
            f"{PREFIX}requests_turned_away",
            "Prompts that were refused before an engine saw them, by reason.",
            (*LABELS, "reason"),
            registry=self._registry,
        )

    async def generate(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """Chunks of all completions.

        Raises:
            EngineOverloaded: at once; all places are taken.
            EngineDead: at once where no engine runs, and as the client raises it.
        """
        size = submission.params.n
        self._check_room(size)
        self._num_open += size
        started_s, has_ended = time.monotonic(), False
        try:
            async with aclosing(self._client.generate(submission)) as chunks:
                async for chunk in chunks:
                    yield chunk
            has_ended = True
        finally:
            self._num_open -= size
            self._queue.leave(size, time.monotonic() - started_s if has_ended else None)

    async def metrics(self) -> list[Metric]:
        """Those of the engines, and what is let in and refused here."""
        families = await super().metrics()
        gauge = GaugeMetricFamily(
            f"{PREFIX}num_sequences_open",
            "Sequences that were let in and have not ended.",
            labels=LABELS,
        )
        gauge.add_metric(self._labels, self._num_open)
        return [*families, gauge, *self._registry.collect()]

    def _check_room(self, size: int) -> None:
        num_engines = self._client.num_engines()
        if not num_engines:
            self._turned_away.labels(*self._labels, "no_engine").inc()
            raise EngineDead("no engine is running yet, or any more; try again soon")
        places = self._places_per_engine * num_engines
        # One that is larger than all places together is for the engine to refuse, in its words.
        if size <= places < self._num_open + size:
            self._turned_away.labels(*self._labels, "overloaded").inc()
            raise EngineOverloaded(
                f"{self._num_open} sequences run or wait already, and there are places for "
                f"{places}; try again later, or raise max_num_waiting or the number of replicas",
                self._queue.join(size, places),
            )


class _ImaginedQueue:
    """Where a refused sequence would stand had it waited: behind those refused before it.

    By Little's law, with all places taken, one is left every (average stay / places) seconds. So
    clients that were refused together are told times one after the other, as places become free.
    """

    def __init__(self) -> None:
        self._length = 0
        self._stay_s = 0.0

    def join(self, size: int, places: int) -> float:
        """Seconds after which it would be its turn."""
        self._length += size
        # After an average stay every place has been left once.
        wait_s = min(self._length / places, 1.0) * self._stay_s
        return min(max(1.0, wait_s), LONGEST_RETRY_AFTER_S)

    def leave(self, size: int, stay_s: float | None) -> None:
        """Places became free; None: by an early end, which says nothing of how long others stay."""
        self._length = max(0, self._length - size)
        if stay_s is not None:
            weight = STAY_WEIGHT if self._stay_s else 1.0
            self._stay_s += (stay_s - self._stay_s) * weight
