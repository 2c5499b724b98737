"""What an engine keeps to on every schedule, with any policy: arrivals, aborts, memory, sampling.

Pages are given out full of NaN, so a KV position that is read before it was computed shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_ray.config import EngineConfig
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import CompletionOutput, GenerationRequest, TokenDelta
from focus_ray.sampling import SamplingParams

CONTEXT = 128
MOST_STEPS = 3000
CHANGES_TOKENS = ("block_length", "focus_alpha", "eviction_policy", "attend_cached")
PREFIXES = tuple(tuple((7 * i + 31 * k) % 500 + 2 for i in range(CONTEXT)) for k in (1, 2))


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and the one before which it is aborted.

    ``edits``: under a decoding of whole blocks, it is decoded by joint threshold.
    """

    request: GenerationRequest
    step: int
    abort_step: int | None
    edits: bool = False

    def under(self, decoding: str) -> Arrival:
        if decoding != "block" or not self.edits:
            return self
        joint = {"unmasking": "joint_threshold", "temperature": 0.0, "denoising_steps": None}
        params = self.request.params.model_copy(update=joint)
        return replace(self, request=replace(self.request, params=params))


@dataclass(frozen=True)
class Schedule:
    """A crowd and the engine it meets."""

    arrivals: tuple[Arrival, ...]
    settings: dict[str, object]

    def with_settings(self, **overrides: object) -> Schedule:
        return Schedule(self.arrivals, {**self.settings, **overrides})


@dataclass
class Outcome:
    """What came out."""

    outputs: dict[str, CompletionOutput] = field(default_factory=dict)
    num_preemptions: int = 0

    def take(self, deltas: Iterable[TokenDelta]) -> None:
        for delta in deltas:
            output = self.outputs.setdefault(delta.request_id, CompletionOutput(index=0))
            assert output.finish_reason is None, "a delta after the last one"
            output.append(delta)


@st.composite
def arrivals(draw: st.DrawFn, block_length: int) -> tuple[Arrival, ...]:
    def request(name: str) -> GenerationRequest:
        prefix = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 70))]
        own = draw(st.lists(st.integers(2, 500), min_size=1, max_size=12))
        params = SamplingParams(
            max_tokens=draw(st.integers(1, 45)),
            ignore_eos=True,
            temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 2.0])),
            seed=draw(st.integers(0, 3)),
            unmasking=draw(
                st.sampled_from(["low_confidence_dynamic", "low_confidence_static", "sequential"])
            ),
            confidence_threshold=draw(st.sampled_from([0.2, 0.5, 0.9])),
            denoising_steps=draw(st.integers(1, block_length)),
            editing_threshold=draw(st.sampled_from([0.5, 0.97, 0.99])),
            max_post_steps=draw(st.integers(1, 4)),
        )
        return GenerationRequest(name, (*prefix, *own), params)

    return tuple(
        Arrival(
            request=request(str(number)),
            step=draw(st.integers(0, 8)),
            abort_step=draw(st.none() | st.none() | st.none() | st.integers(0, 30)),
            edits=draw(st.booleans()),
        )
        for number in range(draw(st.integers(2, 6)))
    )


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    block_length = draw(st.sampled_from([4, 16, 32, 64]))
    page_size = block_length * draw(st.sampled_from([1, 2]))
    return Schedule(
        arrivals=draw(arrivals(block_length)),
        settings={
            "block_length": block_length,
            "page_size": page_size,
            # one sequence fits at its longest; a few more do at their beginning
            "num_pages": CONTEXT // page_size + draw(st.integers(0, 2)),
            "max_num_seqs": draw(st.integers(2, 6)),
            "max_num_batched_tokens": draw(st.sampled_from([1, 64, 1024])),
            "enable_prefix_caching": draw(st.booleans()),
            "diagnose_recall_every": draw(st.sampled_from([0, 2])),
            **draw(policies()),
        },
    )


def policies() -> st.SearchStrategy[dict[str, object]]:
    """Which tokens are left out, and what the others see."""
    return st.fixed_dictionaries(
        {
            "focus_alpha": st.sampled_from([1.0, 1.5, 3.0]),
            "eviction_policy": st.sampled_from(["delta", "delta", "leftmost"]),
            "attend_cached": st.booleans(),
        }
    )


def make_engine(path: str, device: str, decoding: str, **overrides: object) -> Engine:
    values = {
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "decoding": decoding,
        "focus_adaptive": False,  # evict in every step, on a GPU too
        "enforce_eager": True,  # a recorded step would pass by what watches it
    }
    return Engine(EngineConfig(model=path, device=device, **{**values, **overrides}))


@cache
def solitary_engine(path: str, device: str, decoding: str, **overrides: object) -> Engine:
    """For one request at a time, which no trace of another can reach."""
    settings = {"page_size": overrides["block_length"], "enable_prefix_caching": False}
    return make_engine(path, device, decoding, num_pages=CONTEXT, **settings, **overrides)


def poison(engine: Engine) -> None:
    """No page brings anything along that could pass for a key or a value."""
    pool, cache_ = engine._scheduler.pool, engine._runner._cache
    choosing = engine._runner.parts.choosing
    allocate, advance = pool.allocate, choosing.advance

    def allocate_poisoned(count: int) -> list[int]:
        pages = allocate(count)
        cache_.keys[:, pages] = cache_.values[:, pages] = torch.nan
        return pages

    def advance_checked(*args: object) -> None:
        assert choosing.logprob_MB.isfinite().all(), "reads KV that was never computed"
        advance(*args)

    pool.allocate, choosing.advance = allocate_poisoned, advance_checked


def run(engine: Engine, crowd: Iterable[Arrival]) -> Outcome:
    outcome = Outcome()
    waiting = sorted(crowd, key=lambda arrival: arrival.step, reverse=True)
    aborts = [(arrival.abort_step, arrival.request.request_id) for arrival in waiting]
    for step in range(MOST_STEPS):
        while waiting and waiting[-1].step <= step:
            engine.add(waiting.pop().request)
        for abort_step, name in aborts:
            if abort_step == step and name in engine.running_requests:
                outcome.take(engine.abort(name))
        if not waiting and not engine.has_unfinished():
            outcome.num_preemptions = engine.load().num_preemptions
            return outcome
        outcome.take(engine.step())
    raise AssertionError(f"not done after {MOST_STEPS} steps")


def run_schedule(model: tuple[str, str], decoding: str, schedule: Schedule) -> Outcome:
    """A fresh, poisoned engine; everything it lent out comes back."""
    engine = make_engine(*model, decoding, **schedule.settings)
    poison(engine)
    outcome = run(engine, [arrival.under(decoding) for arrival in schedule.arrivals])
    load = engine.load()
    assert load.free_pages == load.total_pages == schedule.settings["num_pages"]
    assert load.num_running == load.num_waiting == 0
    assert not engine.running_requests
    return outcome


@pytest.mark.parametrize(
    ("decoding", "num_pages"),
    [
        pytest.param("block", None, id="block"),
        pytest.param("delayed", None, id="delayed"),
        pytest.param("focus", 1000, id="focus, room for all"),
        pytest.param("focus", None, id="focus"),
    ],
)
@settings(max_examples=4)
@given(schedule=schedules())
def test_company_costs_a_request_nothing(
    golden_sdar, decoding: str, num_pages: int | None, schedule: Schedule
) -> None:
    """Its tokens are those it gets alone, as long as none of its KV is recomputed."""
    schedule = schedule.with_settings(num_pages=num_pages or schedule.settings["num_pages"])
    outcome = run_schedule(golden_sdar, decoding, schedule)
    own = {name: schedule.settings[name] for name in CHANGES_TOKENS}
    for arrival in [arrival.under(decoding) for arrival in schedule.arrivals]:
        name, params = arrival.request.request_id, arrival.request.params
        found = outcome.outputs[name]
        if found.finish_reason == "length":
            assert len(found.token_ids) == params.max_tokens
        else:
            assert found.finish_reason == "abort" and arrival.abort_step is not None
        assert found.stats.retained_tokens <= found.stats.processed_tokens
        if decoding == "block" or not found.stats.preemptions:
            engine = solitary_engine(*golden_sdar, decoding, **own)
            alone = run(engine, [Arrival(arrival.request, 0, None)]).outputs[name]
            assert found.token_ids == alone.token_ids[: len(found.token_ids)]


@settings(max_examples=3)
@given(schedule=schedules())
def test_an_alpha_that_evicts_nothing_is_the_delayed_cache(golden_sdar, schedule: Schedule) -> None:
    delayed = run_schedule(golden_sdar, "delayed", schedule)
    focus = run_schedule(golden_sdar, "focus", schedule.with_settings(focus_alpha=1000.0))
    assert focus.num_preemptions == delayed.num_preemptions
    for name, output in delayed.outputs.items():
        found = focus.outputs[name]
        assert (found.token_ids, found.finish_reason) == (output.token_ids, output.finish_reason)
        assert found.stats.retained_tokens == found.stats.processed_tokens
        assert found.stats.processed_tokens == output.stats.processed_tokens
