"""The numbers of one closed-loop run, and how two ways of decoding compare. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from focus_ray.benchmarks.closed_loop import LoopRecord, RequestRecord, Stretch
from focus_ray.benchmarks.profile_step import StepProfile
from focus_ray.benchmarks.scores import Score
from focus_ray.engine.outputs import EngineLoad
from focus_ray.engine.step_work import StepWork

PERCENTILES = (50, 90, 99)
RATE_FIELDS = (
    *("confidence_threshold", "unmasking", "denoising_steps", "block_length"),
    *("editing_threshold", "max_post_steps"),
)
"""What two runs must have in common to be decoded at one rate."""


@dataclass(frozen=True)
class Snapshot:
    """An engine's counters at one moment."""

    load: EngineLoad
    work: StepWork


@dataclass(frozen=True)
class Distribution:
    """Seconds; percentiles are interpolated linearly."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None without values."""
        if not values:
            return None
        at = np.percentile(np.asarray(values), PERCENTILES).tolist()
        return cls(len(values), float(np.mean(values)), *at)


@dataclass(frozen=True)
class Figures:
    """What happened in a stretch of a run, as sums.

    Args:
        num_requests: finished in it.
        output_tokens: handed to the clients in it.
        steps: passes of the whole batch; ``slot_steps`` are summed over sequences.
        host_s: time of the host's own work, without waiting for the device.
        processed_tokens: of decoding blocks, that entered layer 0; prefill is not in it.
        retained_tokens: of these, past layer 1.
        decoded_tokens: what became of masks, text behind the end of an answer included.
        evicting_steps, layer_tokens, padded_tokens, logit_rows, kv_positions_read: as ``StepWork``
            has them.
        first_token, per_token, latency, between_tokens: TTFT, TPOT, end-to-end and inter-token
            latency of requests; see ``figures_of`` for which.
    """

    wall_s: float
    num_requests: int
    output_tokens: int
    steps: int
    host_s: float
    slot_steps: int
    processed_tokens: int
    retained_tokens: int
    decoded_tokens: int
    prefill_tokens: int
    evicting_steps: int
    layer_tokens: int
    padded_tokens: int
    logit_rows: int
    kv_positions_read: int
    first_token: Distribution | None
    per_token: Distribution | None
    latency: Distribution | None
    between_tokens: Distribution | None

    @property
    def output_tokens_per_s(self) -> float:
        return _over(self.output_tokens, self.wall_s)

    @property
    def requests_per_s(self) -> float:
        return _over(self.num_requests, self.wall_s)

    @property
    def step_s(self) -> float:
        return _over(self.wall_s, self.steps)

    @property
    def host_s_per_step(self) -> float:
        return _over(self.host_s, self.steps)

    @property
    def tokens_per_step(self) -> float:
        """Decoded per sequence and step."""
        return _over(self.decoded_tokens, self.slot_steps)

    @property
    def processed_per_decoded(self) -> float:
        return _over(self.processed_tokens, self.decoded_tokens)

    @property
    def retained_per_decoded(self) -> float:
        return _over(self.retained_tokens, self.decoded_tokens)

    @property
    def processed_per_output(self) -> float:
        return _over(self.processed_tokens, self.output_tokens)

    def computed_per_output(self, num_layers: int) -> float:
        """Tokens through a layer, averaged over the layers, per output token; prefill included.

        Layer 1 is counted with the later ones, although its keys and values are of all tokens.
        """
        later = self.retained_tokens * (num_layers - 1)
        decoding = (self.processed_tokens + later) / num_layers
        return _over(decoding + self.prefill_tokens, self.output_tokens)

    def as_json(self) -> dict[str, Any]:
        names = [name for name, kind in vars(Figures).items() if isinstance(kind, property)]
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Row:
    """One run: a way of decoding at one concurrency.

    Args:
        mode: the setting as it was given.
        fields: what it says of the engine's configuration.
        finish_reasons: how many requests ended how.
        exact_match: of all answers of the run; empty where they cannot be judged.
        profile: of some full steps after the run, as ``profile_step.py`` has it; None on a CPU.
        peak_memory_bytes: of all tensors, the model and the KV pages included; None on a CPU.
        start_s: what it took to make the engine, graphs included.
    """

    mode: str
    concurrency: int
    fields: dict[str, Any]
    finish_reasons: dict[str, int]
    whole: Figures
    steady: Figures | None
    exact_match: dict[str, Score]
    profile: StepProfile | None
    peak_memory_bytes: int | None
    start_s: float

    @property
    def shown(self) -> Figures:
        """The steady stretch, or the whole run where that is too short to have one."""
        return self.steady or self.whole

    def as_json(self) -> dict[str, Any]:
        """Sums of the whole run at the top, those of the steady stretch in ``steady``."""
        return {
            "mode": self.mode,
            "concurrency": self.concurrency,
            "engine": self.fields,
            "finish_reasons": self.finish_reasons,
            "exact_match": {name: score.as_json() for name, score in self.exact_match.items()},
            "profile": None if self.profile is None else self.profile.as_json(),
            "peak_memory_bytes": self.peak_memory_bytes,
            "engine_start_s": self.start_s,
            **self.whole.as_json(),
            "steady": None if self.steady is None else self.steady.as_json(),
        }


def figures_of(record: LoopRecord[Snapshot], stretch: Stretch[Snapshot]) -> Figures:
    """Sums over a stretch of a run.

    Times are of all requests for the whole run. For the steady stretch they are of the requests
    that finished in it and had taken a place that another one left: those of the first fill were
    prefilled all at once.
    """
    ended = [r for r in record.requests if stretch.start_s < r.finished_s <= stretch.end_s]
    timed = ended if stretch is record.whole else [r for r in ended if not r.in_first_fill]
    before, after = stretch.before, stretch.after

    def counted(name: str) -> int:
        number: int = getattr(after.load, name) - getattr(before.load, name)
        return number

    def worked(name: str) -> int:
        number: int = getattr(after.work, name) - getattr(before.work, name)
        return number

    return Figures(
        wall_s=stretch.wall_s,
        num_requests=len(ended),
        output_tokens=sum(
            count
            for request in record.requests
            for at, count in request.arrivals
            if stretch.start_s < at <= stretch.end_s
        ),
        steps=counted("num_steps"),
        host_s=after.load.host_s - before.load.host_s,
        slot_steps=counted("denoising_steps"),
        processed_tokens=counted("processed_tokens"),
        retained_tokens=counted("retained_tokens"),
        decoded_tokens=counted("decoded_tokens"),
        prefill_tokens=counted("prefill_tokens"),
        evicting_steps=worked("evicting_steps"),
        layer_tokens=worked("layer_tokens"),
        padded_tokens=worked("padded_tokens"),
        logit_rows=worked("logit_rows"),
        kv_positions_read=worked("kv_positions"),
        first_token=_spread(request.first_token_s for request in timed),
        per_token=_spread(request.per_token_s for request in timed),
        latency=_spread(request.latency_s for request in timed),
        between_tokens=_spread(gap for request in timed for gap in request.gaps_s),
    )


@dataclass(frozen=True)
class Comparison:
    """One way of decoding against ``block`` at the same rate, concurrency and prompts.

    Args:
        speed: output tokens per second over block's.
        processed: block's processed tokens per output token over this one's, prefill left out.
        computed: the same of tokens through all layers, prefill included: what is saved in tokens.
    """

    mode: str
    baseline: str
    concurrency: int
    speed: float
    processed: float
    computed: float

    @property
    def reached(self) -> float:
        """Which share of the saved tokens arrived as time; above 1 if their cost fell, too."""
        return _over(self.speed, self.computed)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached}


def compare(rows: Sequence[Row], num_layers: int) -> list[Comparison]:
    """Every row that has a block row to be compared with; steady stretches where both have one."""
    blocks = {
        (row.concurrency, _rate(row)): row for row in rows if row.fields["decoding"] == "block"
    }
    found = []
    for row in rows:
        base = blocks.get((row.concurrency, _rate(row)))
        if base is None or row.fields["decoding"] == "block":
            continue
        if row.steady is not None and base.steady is not None:
            ours, theirs = row.steady, base.steady
        else:
            ours, theirs = row.whole, base.whole
        found.append(
            Comparison(
                mode=row.mode,
                baseline=base.mode,
                concurrency=row.concurrency,
                speed=_over(ours.output_tokens_per_s, theirs.output_tokens_per_s),
                processed=_over(theirs.processed_per_output, ours.processed_per_output),
                computed=_over(
                    theirs.computed_per_output(num_layers), ours.computed_per_output(num_layers)
                ),
            )
        )
    return found


def answers_of(
    requests: Iterable[RequestRecord], tasks: Sequence[Any]
) -> Iterable[tuple[Any, str]]:
    """Task and answer, where there is a task."""
    pairs = zip(tasks, requests, strict=True)
    return ((task, request.text) for task, request in pairs if task is not None)


def _rate(row: Row) -> tuple[object, ...]:
    return tuple(row.fields.get(name) for name in RATE_FIELDS)


def _spread(values: Iterable[float | None]) -> Distribution | None:
    return Distribution.of([value for value in values if value is not None])


def _over(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
