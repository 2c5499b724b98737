"""Numbers of one engine for Prometheus; names as vLLM's with our prefix.

Totals of the engine are read from its load snapshot when somebody asks, so that they cost nothing
per step. What concerns one request is observed when its completions end.
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from focus_ray.engine.outputs import EngineLoad, RequestStats, TokenDelta
from focus_ray.errors import EngineDead, EngineOverloaded, RequestRejected
from focus_ray.serve.replica_load import ReplicaLoad

PREFIX = "focus_ray:"
LABELS = ("model_name", "replica")

# Seconds: from a tiny model's step to a long answer on a busy machine.
SECONDS = (
    *(0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
SECONDS_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

GAUGES: dict[str, tuple[str, Callable[[EngineLoad], float]]] = {
    "num_requests_running": ("Sequences that take part in steps.", lambda x: x.num_running),
    "num_requests_waiting": ("Sequences that wait for a place.", lambda x: x.num_waiting),
    "kv_cache_usage_perc": ("Share of the KV pages in use, 0 to 1.", lambda x: x.kv_usage),
    "step_seconds": ("Duration of a denoising step, lately.", lambda x: x.step_s),
    "effective_batch_occupancy": (
        "Predicted tokens of a step, of running and waiting sequences, over the saturation budget.",
        lambda x: ReplicaLoad.of(x).occupancy,
    ),
    "saturation_tokens": (
        "Tokens of a step from which on larger steps are hardly faster.",
        lambda x: x.saturation_tokens,
    ),
    "next_step_tokens": (
        "Tokens that running sequences are predicted to process in the next step.",
        lambda x: x.next_step_tokens,
    ),
    "waiting_tokens": (
        "Tokens that a step would have besides, did those run that wait.",
        lambda x: x.waiting_tokens,
    ),
    "remaining_tokens": (
        "Tokens that all sequences have still to process, at most.",
        lambda x: x.remaining_tokens,
    ),
    "retained_ratio": (
        "Share of the tokens of decoding that went past layer 1, lately.",
        lambda x: x.retained_ratio,
    ),
    "tokens_per_step": (
        "Tokens that a step decoded of a sequence, lately.",
        lambda x: x.decoded_per_step,
    ),
}
TOTALS: dict[str, tuple[str, Callable[[EngineLoad], float]]] = {
    "prompt_tokens": ("Tokens of accepted prompts.", lambda x: x.prompt_tokens),
    "generation_tokens": ("Tokens sent to clients.", lambda x: x.emitted_tokens),
    "engine_steps": ("Forward passes of the whole batch.", lambda x: x.num_steps),
    "denoising_steps": ("Denoising steps of sequences.", lambda x: x.denoising_steps),
    "decoded_tokens": ("Masked tokens that became decoded.", lambda x: x.decoded_tokens),
    "edited_tokens": ("Decoded tokens that steps replaced.", lambda x: x.edited_tokens),
    "processed_tokens": ("Tokens that entered layer 0 in decoding.", lambda x: x.processed_tokens),
    "retained_tokens": ("Of these, taken past layer 1.", lambda x: x.retained_tokens),
    "evicted_tokens": ("Masked tokens that steps left out.", lambda x: x.evicted_tokens),
    "decodable_tokens": (
        "Tokens that diagnosed steps would have decoded without eviction.",
        lambda x: x.decodable_tokens,
    ),
    "recalled_tokens": ("Of these, the retained ones.", lambda x: x.recalled_tokens),
    "prefill_tokens": ("Prompt tokens computed.", lambda x: x.prefill_tokens),
    "prefix_cache_hits": (
        "Prompt tokens whose KV was found and not computed.",
        lambda x: x.cached_prefix_tokens,
    ),
    "num_preemptions": ("Sequences preempted.", lambda x: x.num_preemptions),
}
# Of a completion, observed at its end.
TIMES: dict[str, tuple[str, Callable[[RequestStats], float]]] = {
    "time_to_first_token_seconds": ("Arrival to first token.", lambda x: x.first_token_s),
    "e2e_request_latency_seconds": ("Arrival to last token.", lambda x: x.total_s),
    "request_queue_time_seconds": ("Arrival to the first step.", lambda x: x.queue_s),
    "request_prefill_time_seconds": (
        "First step to first token.",
        lambda x: x.first_token_s - x.queue_s,
    ),
    "request_decode_time_seconds": (
        "First token to last token.",
        lambda x: x.total_s - x.first_token_s,
    ),
    "request_inference_time_seconds": (
        "First step to last token.",
        lambda x: x.total_s - x.queue_s,
    ),
}
REFUSALS = {
    RequestRejected: "invalid",
    EngineOverloaded: "overloaded",
    EngineDead: "engine_dead",
}


class ReplicaMetrics:
    """The metric families of one replica.

    Args:
        load: the engine's snapshot; must be cheap.
        model_name: label.
        replica_name: label.
    """

    def __init__(self, load: Callable[[], EngineLoad], model_name: str, replica_name: str) -> None:
        self._load = load
        self.labels = (model_name, replica_name)
        self._registry = CollectorRegistry()
        self._times = {
            name: self._histogram(name, text, SECONDS) for name, (text, _) in TIMES.items()
        }
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Tokens of a completion's prompt.", TOKENS
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens of a completion.", TOKENS
        )
        self._per_token_s = self._histogram(
            "request_time_per_output_token_seconds",
            "Seconds per token after the first, of one completion.",
            SECONDS_PER_TOKEN,
        )
        self._taken_over = Counter(
            f"{PREFIX}requests_taken_over",
            "Requests that another replica had begun.",
            LABELS,
            registry=self._registry,
        ).labels(model_name, replica_name)
        self._between_s = self._histogram(
            "inter_token_latency_seconds",
            "Seconds that a completion's tokens came after those before them.",
            SECONDS_PER_TOKEN,
        )
        self._refused = Counter(
            f"{PREFIX}requests_refused",
            "Requests that ended in an error, by reason.",
            (*LABELS, "reason"),
            registry=self._registry,
        )

    @contextmanager
    def count_refusal(self) -> Iterator[None]:
        """Count the error a request ends in, if it does."""
        try:
            yield
        except (RequestRejected, EngineOverloaded, EngineDead) as error:
            reason = next(name for kind, name in REFUSALS.items() if isinstance(error, kind))
            self._refused.labels(*self.labels, reason).inc()
            raise

    def count_taken_over(self) -> None:
        """Count a request that another replica had begun."""
        self._taken_over.inc()

    def observer(self) -> RequestObserver:
        """For the deltas of one request."""
        return RequestObserver(self)

    def observe_wait(self, seconds: float) -> None:
        """Observe the time between one completion's tokens and its next."""
        self._between_s.observe(seconds)

    def observe_end(self, delta: TokenDelta, num_tokens: int) -> None:
        """Observe a completion at its end; one that was cut off says nothing about latency."""
        stats = delta.stats
        if stats is None or delta.finish_reason == "abort":
            return
        for name, (_, read) in TIMES.items():
            self._times[name].observe(read(stats))
        self._prompt_tokens.observe(stats.prompt_tokens)
        self._generation_tokens.observe(num_tokens)
        if stats.decoded_tokens > 1:
            rest_s = stats.total_s - stats.first_token_s
            self._per_token_s.observe(rest_s / (stats.decoded_tokens - 1))

    def collect(self) -> list[Metric]:
        """All families, with values as of now."""
        load = self._load()
        families: list[Metric] = []
        for name, (text, read) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
            gauge.add_metric(self.labels, read(load))
            families.append(gauge)
        for name, (text, read) in TOTALS.items():
            total = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
            total.add_metric(self.labels, read(load))
            families.append(total)
        finished = CounterMetricFamily(
            f"{PREFIX}request_success",
            "Completions that ended, by reason.",
            labels=(*LABELS, "finished_reason"),
        )
        for reason, count in load.finished.items():
            finished.add_metric((*self.labels, reason), count)
        return [*families, finished, *self._registry.collect()]

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(PREFIX + name, text, LABELS, buckets=buckets, registry=self._registry)
        return family.labels(*self.labels)


class RequestObserver:
    """Sees every delta of a request, and when it came."""

    def __init__(self, metrics: ReplicaMetrics) -> None:
        self._metrics = metrics
        self._last_at: dict[int, float] = {}  # by completion
        self._num_tokens: Counts[int] = Counts()  # of these

    def take(self, delta: TokenDelta) -> None:
        """The next delta of one of the completions, now."""
        if delta.token_ids:
            now = time.monotonic()
            if (last := self._last_at.get(delta.index)) is not None:
                self._metrics.observe_wait(now - last)
            self._last_at[delta.index] = now
            self._num_tokens[delta.index] += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._metrics.observe_end(delta, self._num_tokens[delta.index])


def merge_families(replicas: Iterable[Iterable[Metric]]) -> list[Metric]:
    """The families of several replicas, each family once; labels tell the samples apart."""
    merged: dict[str, Metric] = {}
    for families in replicas:
        for family in families:
            if family.name in merged:
                merged[family.name].samples.extend(family.samples)
            else:
                merged[family.name] = family
    return list(merged.values())


def as_text(families: list[Metric]) -> bytes:
    """Prometheus' text exposition format."""
    return generate_latest(_Collected(families))


class _Collected:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
