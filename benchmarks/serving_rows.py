"""The numbers of one run against an endpoint. Pure arithmetic.

TTFT: due to the first text. TPOT: mean time of a token after the first one. ITL: between two events
with text, each of which may bring several tokens. E2E: due to the end. Of complete answers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from focus_ray.benchmarks.serving_client import Sent

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Spread:
    """Seconds; percentiles are interpolated linearly."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None without values."""
        if not values:
            return None
        at = np.percentile(np.asarray(values), PERCENTILES).tolist()
        return cls(float(np.mean(values)), *at)


@dataclass(frozen=True)
class ServingFigures:
    """What a run came to.

    Args:
        duration_s: from when the first request was due to the end of the last one.
        errors: failures by kind; ``messages`` has the first of each.
        num_events: with text.
        tokens_per_step, processed_per_decoded, retained_per_decoded: as the server's usage tells;
            None where it does not.
        lateness: of sending a request behind its arrival: time that the client, or its limit of
            requests in flight, adds to every latency.
    """

    completed: int
    failed: int
    errors: dict[str, int]
    messages: dict[str, str]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    num_events: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    tokens_per_step: float | None
    processed_per_decoded: float | None
    retained_per_decoded: float | None
    lateness: Spread | None
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None


def figures_of(sent: Sequence[Sent]) -> ServingFigures:
    """Of all requests of a run, at least one."""
    whole = [each for each in sent if each.error is None]
    failed = [each for each in sent if each.error is not None]
    duration_s = max(each.finished_s for each in sent) - min(each.due_s for each in sent)
    prompt_tokens = _total(whole, "prompt_tokens")
    output_tokens = _total(whole, "completion_tokens")
    decoded = _total(whole, "decoded_tokens")
    return ServingFigures(
        completed=len(whole),
        failed=len(failed),
        errors=dict(Counter(str(each.error) for each in failed)),
        messages={str(each.error): each.message for each in reversed(failed)},
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        num_events=sum(len(each.texts_s) for each in whole),
        request_throughput=len(whole) / duration_s,
        output_throughput=output_tokens / duration_s,
        total_token_throughput=(prompt_tokens + output_tokens) / duration_s,
        tokens_per_step=_ratio(decoded, _total(whole, "denoising_steps")),
        processed_per_decoded=_ratio(_total(whole, "processed_tokens"), decoded),
        retained_per_decoded=_ratio(_total(whole, "retained_tokens"), decoded),
        lateness=Spread.of([each.sent_s - each.due_s for each in sent]),
        ttft=Spread.of([each.texts_s[0] - each.due_s for each in whole if each.texts_s]),
        tpot=Spread.of(
            [
                (each.texts_s[-1] - each.texts_s[0]) / (each.output_tokens - 1)
                for each in whole
                if each.texts_s and each.output_tokens > 1
            ]
        ),
        itl=Spread.of([b - a for each in whole for a, b in pairwise(each.texts_s)]),
        e2e=Spread.of([each.finished_s - each.due_s for each in whole]),
    )


def _total(sent: Iterable[Sent], name: str) -> int:
    return sum(int(each.usage.get(name) or 0) for each in sent)


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
