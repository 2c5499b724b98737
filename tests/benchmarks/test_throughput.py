"""The closed loop against an engine of a few lines, and the arithmetic of its figures."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace

import pytest

from focus_ray.benchmarks.closed_loop import ClosedLoop, LoopRecord
from focus_ray.benchmarks.line_chart import nice_step
from focus_ray.benchmarks.throughput_plot import draw
from focus_ray.benchmarks.throughput_rows import (
    Distribution,
    Figures,
    Row,
    Snapshot,
    compare,
    figures_of,
)
from focus_ray.engine.outputs import EngineLoad, GenerationRequest, TokenDelta
from focus_ray.engine.step_work import StepWork
from focus_ray.sampling import SamplingParams


class FakeEngine:
    """Two tokens per request and step of one second, until ``max_tokens`` of them are out."""

    def __init__(self, late: bool = False) -> None:
        self.now = 0.0
        self.left: dict[str, int] = {}
        self.num_running: list[int] = []
        self.num_tokens = 0
        self.late = late
        self._held: list[TokenDelta] = []

    def add(self, request: GenerationRequest) -> None:
        assert request.params.max_tokens is not None
        self.left[request.request_id] = request.params.max_tokens

    def abort(self, request_id: str) -> None:
        self.left.pop(request_id, None)

    def has_unfinished(self) -> bool:
        return bool(self.left or self._held)

    def step(self) -> list[TokenDelta]:
        """As the engine does, ``late`` returns what the step before found."""
        self.now += 1.0
        self.num_running.append(len(self.left))
        deltas = []
        for request_id, left in list(self.left.items()):
            count = min(2, left)
            self.num_tokens += count
            self.left[request_id] -= count
            reason = None if left > count else "length"
            if reason:
                del self.left[request_id]
            deltas.append(
                TokenDelta(request_id, 0, "x" * count, (7,) * count, finish_reason=reason)
            )
        if self.late:
            deltas, self._held = self._held, deltas
        return deltas

    def snapshot(self) -> Snapshot:
        steps = len(self.num_running)
        load = EngineLoad(
            num_running=len(self.left),
            num_waiting=0,
            free_pages=1,
            total_pages=1,
            num_steps=steps,
            prefill_tokens=100 * steps,
            cached_prefix_tokens=0,
            emitted_tokens=self.num_tokens,
            prompt_tokens=0,
            num_preemptions=0,
            finished={},
            step_s=1.0,
            host_s=0.25 * steps,
            denoising_steps=sum(self.num_running),
            processed_tokens=10 * self.num_tokens,
            retained_tokens=4 * self.num_tokens,
            decoded_tokens=self.num_tokens,
        )
        return Snapshot(load, StepWork(logit_rows=3 * steps, kv_positions=50 * steps))


def loop(engine: FakeEngine, lengths: Sequence[int], concurrency: int) -> ClosedLoop[Snapshot]:
    requests = [
        GenerationRequest(f"{i}", (1,), SamplingParams(max_tokens=length))
        for i, length in enumerate(lengths)
    ]
    return ClosedLoop(engine, requests, concurrency, engine.snapshot, lambda: engine.now)


def run(lengths: Sequence[int], concurrency: int) -> tuple[FakeEngine, LoopRecord[Snapshot]]:
    engine = FakeEngine()
    return engine, loop(engine, lengths, concurrency).run()


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_every_place_is_taken_as_long_as_the_list_lasts(concurrency: int) -> None:
    lengths = [2 + 3 * i % 11 for i in range(20)]
    engine, record = run(lengths, concurrency)
    assert [request.num_tokens for request in record.requests] == lengths
    assert engine.num_running[0] == concurrency
    last_added = max(request.added_s for request in record.requests)
    full = engine.num_running[: int(last_added) + 1]
    assert set(full) == {concurrency}
    assert all(n <= concurrency for n in engine.num_running)


@pytest.mark.parametrize(
    ("lengths", "concurrency", "steady"),
    [
        # one at a time: the first takes steps 1 and 2, the last is added after step 6
        pytest.param([4, 4, 4, 4], 1, (2, 8), id="one place: up to the end of the last request"),
        # all in lockstep, three generations of two steps each; nobody replaces the third
        pytest.param([4] * 6, 2, (2, 6), id="lockstep"),
        # 0: steps 1-5; 1: step 1, 2: step 2 (two gone), 3: step 3, 4: step 4, 5: from step 5 on;
        # the list is empty then, and 0 and 5 finish in step 5
        pytest.param([10, 2, 2, 2, 2, 2], 2, (2, 5), id="a long one holds up nothing"),
        # two finish together, one is left to replace them
        pytest.param([2, 2, 2, 2, 6], 2, (1, 2), id="the last two places empty at once"),
        pytest.param([4, 4, 4], 2, None, id="list ends before the warm-up"),
        pytest.param([4, 4], 2, None, id="first fill only"),
        pytest.param([2, 8, 8, 2], 3, None, id="warm when no longer full"),
    ],
)
def test_the_steady_stretch_begins_warm_and_ends_full(
    lengths: list[int], concurrency: int, steady: tuple[int, int] | None
) -> None:
    engine, record = run(lengths, concurrency)
    assert (record.whole.start_s, record.whole.end_s) == (0, engine.now)
    if steady is None:
        assert record.steady is None
        return
    assert record.steady is not None
    assert (record.steady.start_s, record.steady.end_s) == steady
    assert set(engine.num_running[steady[0] : steady[1]]) == {concurrency}
    assert record.steady.after.load.num_steps == steady[1]


def test_results_that_come_a_step_late_are_waited_for() -> None:
    engine = FakeEngine(late=True)
    record = loop(engine, [4] * 6, 2).run()
    assert all(request.num_tokens == 4 for request in record.requests)
    assert not engine.has_unfinished()


@pytest.mark.parametrize("concurrency", [0, 3])
def test_a_loop_that_can_never_be_full_is_refused(concurrency: int) -> None:
    with pytest.raises(ValueError, match="2 requests cannot keep"):
        loop(FakeEngine(), [4, 4], concurrency)


def test_an_engine_that_loses_a_request_is_found_out() -> None:
    engine = FakeEngine()
    begun = loop(engine, [4, 4], 2)
    engine.add = lambda request: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="idle with 2 requests"):
        begun.run()


def test_an_error_leaves_the_engine_idle() -> None:
    engine = FakeEngine()

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(engine, [2, 40, 40], 2).run(stop)
    assert not engine.has_unfinished()


def test_an_engine_whose_step_was_interrupted_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine()
    calls: list[str] = []

    def interrupted() -> list[TokenDelta]:
        calls.append("step")
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop(engine, [2, 40], 2).run()
    assert calls == ["step"]


def test_times_are_those_a_client_sees() -> None:
    _, record = run([4, 5], 1)
    second = record.requests[1]
    assert (second.added_s, second.finished_s, second.latency_s) == (2, 5, 3)
    assert second.first_token_s == 1
    assert second.per_token_s == pytest.approx(2 / 3)  # three tokens after the first two
    assert second.gaps_s == [1, 1]
    assert second.text == "x" * 5
    one_delta = run([2], 1)[1].requests[0]
    assert one_delta.per_token_s is None and one_delta.gaps_s == []


def test_percentiles() -> None:
    found = Distribution.of([float(n) for n in range(101)][::-1])
    assert found == Distribution(101, 50.0, 50.0, 90.0, 99.0)
    assert Distribution.of([1.0, 2.0]) == pytest.approx(Distribution(2, 1.5, 1.5, 1.9, 1.99))
    assert Distribution.of([]) is None


def test_a_stretch_counts_what_happened_in_it_alone() -> None:
    _, record = run([4] * 6, 2)
    whole, steady = figures_of(record, record.whole), figures_of(record, record.steady)
    assert (whole.wall_s, whole.num_requests, whole.output_tokens) == (6, 6, 24)
    assert (steady.wall_s, steady.num_requests, steady.output_tokens) == (4, 4, 16)
    assert (steady.steps, steady.slot_steps, steady.prefill_tokens) == (4, 8, 400)
    assert (steady.processed_tokens, steady.retained_tokens) == (160, 64)
    assert (steady.logit_rows, steady.kv_positions_read) == (12, 200)
    assert steady.output_tokens_per_s == 4
    assert steady.requests_per_s == 1
    assert (steady.step_s, steady.host_s_per_step) == (1, 0.25)
    assert (steady.tokens_per_step, steady.processed_per_decoded) == (2, 10)
    assert whole.latency is not None and whole.latency.count == 6
    assert steady.latency is not None and steady.latency.count == 4
    # layer 0 of 5 sees 160 tokens, four layers see 64, and all layers 400 of prefill
    assert steady.computed_per_output(5) == pytest.approx((160 / 5 + 64 * 4 / 5 + 400) / 16)


def test_times_of_the_first_fill_are_not_steady_ones() -> None:
    _, record = run([10, 2, 2, 2, 2, 2], 2)
    steady = figures_of(record, record.steady)
    assert steady.num_requests == 4  # among them the first, which was there from the start
    assert steady.latency is not None and steady.latency.count == 3


def row(
    mode: str, concurrency: int, tokens: int, processed: int, retained: int, **fields: object
) -> Row:
    figures = Figures(
        wall_s=10.0,
        num_requests=4,
        output_tokens=tokens,
        steps=10,
        host_s=0.1,
        slot_steps=10 * concurrency,
        processed_tokens=processed,
        retained_tokens=retained,
        decoded_tokens=tokens,
        prefill_tokens=0,
        **dict.fromkeys(
            ("evicting_steps", "layer_tokens", "padded_tokens", "logit_rows", "kv_positions_read"),
            0,
        ),
        **dict.fromkeys(("first_token", "per_token", "latency", "between_tokens"), None),
    )
    return Row(mode, concurrency, fields, {}, figures, figures, {}, None, None, 1.0)


BLOCK = row("block@0.8", 8, 100, 1000, 1000, decoding="block", confidence_threshold=0.8)
FOCUS = row("focus@0.8", 8, 180, 900, 360, decoding="focus", confidence_threshold=0.8)


def test_eviction_is_compared_with_block_by_tokens_and_time() -> None:
    (found,) = compare([BLOCK, FOCUS], num_layers=10)
    assert (found.mode, found.baseline, found.concurrency) == ("focus@0.8", "block@0.8", 8)
    assert found.speed == pytest.approx(1.8)
    assert found.processed == pytest.approx(10 / 5)
    assert found.computed == pytest.approx(10 / ((5 + 9 * 2) / 10))
    assert found.reached == pytest.approx(found.speed / found.computed)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(BLOCK, concurrency=4), id="another concurrency"),
        pytest.param(
            replace(BLOCK, fields={**BLOCK.fields, "confidence_threshold": 0.9}), id="threshold"
        ),
        pytest.param(
            replace(BLOCK, fields={**BLOCK.fields, "unmasking": "low_confidence_static"}), id="rule"
        ),
        pytest.param(replace(BLOCK, fields={**BLOCK.fields, "decoding": "delayed"}), id="no block"),
    ],
)
def test_only_equal_rates_are_compared(other: Row) -> None:
    assert compare([other, FOCUS], num_layers=10) == []


def test_the_shorter_common_stretch_is_compared() -> None:
    long_whole = replace(FOCUS.whole, wall_s=20.0)
    (found,) = compare([BLOCK, replace(FOCUS, whole=long_whole, steady=None)], num_layers=10)
    assert found.speed == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("highest", "step"), [(0, 1), (0.5, 0.1), (6, 1), (6.1, 2), (59, 10), (61, 20), (3372, 1000)]
)
def test_axes_have_round_numbers(highest: float, step: float) -> None:
    assert nice_step(highest) == pytest.approx(step)


def test_the_plot_has_a_line_for_each_mode() -> None:
    rows = [replace(each, concurrency=n) for each in (BLOCK, FOCUS) for n in (1, 8, 64)]
    svg = ElementTree.fromstring(draw(rows, "a <b>", "c & d"))
    name = "{http://www.w3.org/2000/svg}"
    paths = svg.findall(f"{name}path")
    assert len(paths) == 2
    dots = svg.findall(f"{name}circle")
    assert len(dots) == 6
    x = [float(dot.get("cx", "")) for dot in dots[:3]]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.02)  # 1, 8 and 64 are three octaves
    y = [float(dot.get("cy", "")) for dot in dots]
    assert min(y[:3]) > max(y[3:])  # 180 tokens stand above 100
    assert {"a <b>", "c & d", "focus@0.8"} <= {text.text for text in svg.iter(f"{name}text")}
    single = draw([BLOCK], "one", "point")
    assert "nan" not in single
    with pytest.raises(ValueError, match="no runs"):
        draw([], "a", "b")
