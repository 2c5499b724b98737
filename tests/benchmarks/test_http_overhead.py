"""The engine that only takes time, and what is compared by it; no server is started here."""

from __future__ import annotations

import time

import pytest

from focus_ray.benchmarks.closed_loop import ClosedLoop
from focus_ray.benchmarks.http_overhead import Pair, in_flight, parse_arguments
from focus_ray.benchmarks.stepped_engine import SteppedEngine, stepped_factory
from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.sampling import SamplingParams


def requests(number, max_tokens=7):
    params = SamplingParams(max_tokens=max_tokens)
    return [GenerationRequest(f"{n}", (1, 2, 3), params) for n in range(number)]


def test_it_answers_all_in_as_many_steps_as_its_places_and_its_pace_allow():
    engine = SteppedEngine(step_s=0.001, tokens_per_step=2.5, max_num_seqs=2)
    record = ClosedLoop(engine, requests(5), 3, engine.load).run()
    # 2, 5, 7 tokens: three steps for each of three rounds of two places.
    assert record.whole.after.num_steps == 9
    assert [request.num_tokens for request in record.requests] == [7] * 5
    assert [request.text for request in record.requests] == [" word" * 7] * 5
    assert {request.finish_reason for request in record.requests} == {"length"}
    assert record.requests[0].stats.denoising_steps == 3


def test_a_host_that_is_back_before_the_next_step_is_over_costs_nothing():
    engine = SteppedEngine(step_s=0.02, tokens_per_step=1, max_num_seqs=1)
    engine.add(requests(1, max_tokens=9)[0])
    engine.step()
    start = time.perf_counter()
    for _ in range(3):
        time.sleep(0.01)
        engine.step()
    assert 0.055 < time.perf_counter() - start < 0.085, "three steps, without the host's 0.03 s"


def test_an_aborted_request_takes_part_no_longer():
    engine = SteppedEngine(step_s=0.0001, tokens_per_step=1, max_num_seqs=1)
    for request in requests(3):
        engine.add(request)
    assert [delta.request_id for delta in engine.step()] == ["0"]
    engine.abort("0")
    engine.abort("1")
    assert [delta.request_id for delta in engine.step()] == ["2"]
    assert set(engine.running_requests) == {"2"}


async def test_it_runs_behind_an_event_loop_as_the_real_one_does():
    engine = stepped_factory(0.001, 2.0, 4)(EngineConfig())
    deltas = [delta async for delta in engine.generate(requests(1)[0])]
    engine.shutdown()
    assert sum(len(delta.token_ids) for delta in deltas) == 7
    assert deltas[-1].finish_reason == "length"


def test_more_are_in_flight_than_have_places():
    args = parse_arguments(["--max-num-seqs", "10"])
    assert (in_flight(args), args.num_prompts) == (13, 40)
    with pytest.raises(SystemExit):
        parse_arguments(["--max-num-seqs", "10", "--num-prompts", "12"])


def test_a_pair_is_compared_by_what_clients_received_per_second():
    assert Pair(100, 50.0, 100, 45.0, 20.0).ratio == 0.9
