"""The simulator of replicas, and what its command writes."""

from __future__ import annotations

import json
from random import Random

import pytest

from focus_ray.benchmarks.routing import compare, main, rate_for, simulate
from focus_ray.benchmarks.routing_cluster import (
    MAX_NUM_SEQS,
    PREFILL_TOKENS,
    Cluster,
    SimulatedReplica,
)
from focus_ray.benchmarks.routing_load import Load, Request
from focus_ray.benchmarks.routing_rivals import ROUTERS
from focus_ray.benchmarks.step_times import StepTimes
from focus_ray.serve.routing_facts import RequestFacts

TIMES = StepTimes(floor_s=0.010, fixed_s=0.002, per_token_s=0.001)


def request(name="r", arrives_s=0.0, prompt_tokens=3, num_steps=5, work=4.0, chunks=()):
    facts = RequestFacts(prompt_tokens=prompt_tokens, chunks=chunks)
    return Request(name, arrives_s, 0, facts, num_steps, work, chunks)


def latencies(requests, slowness=1.0):
    replica = SimulatedReplica("0", TIMES, slowness)
    router = ROUTERS["round_robin"](["0"], Random(0))
    return Cluster([replica], [router], Random(0)).run(requests).latencies_s


def test_fit_finds_the_line_above_the_floor():
    points = [(n, TIMES.of(n)) for n in (1, 4, 20, 40, 80)]
    fitted = StepTimes.fit(points)
    assert fitted.floor_s == pytest.approx(0.010)
    assert fitted.fixed_s == pytest.approx(0.002)
    assert fitted.per_token_s == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        pytest.param([], "0 of 0 steps", id="nothing recorded"),
        pytest.param([(1, 0.01), (2, 0.011)], "0 of 2 steps", id="none beyond the floor"),
        pytest.param([(1, 0.01), (9, 0.02), (9, 0.03)], "different sizes", id="one size"),
        pytest.param([(1, 0.01), (5, 0.04), (9, 0.02)], "not slower", id="faster when larger"),
    ],
)
def test_what_cannot_be_fitted_is_refused(points, reason):
    with pytest.raises(ValueError, match=reason):
        StepTimes.fit(points)


def test_nine_tenths_of_the_best_rate_are_reached_at_saturation_and_not_before():
    def rate(num_tokens):
        return num_tokens / TIMES.of(num_tokens)

    best = 1.0 / TIMES.per_token_s
    assert rate(TIMES.saturation_tokens) == pytest.approx(0.9 * best)
    assert rate(TIMES.saturation_tokens - 1) < 0.9 * best


def test_one_request_takes_its_prefill_and_its_steps():
    assert latencies([request()])["r"] == pytest.approx(0.010 + 5 * 0.010)
    assert latencies([request()], slowness=3.0)["r"] == pytest.approx(3 * 0.060)
    long = request(prompt_tokens=PREFILL_TOKENS + 100, num_steps=1)
    expected = TIMES.of(PREFILL_TOKENS) + TIMES.of(100) + TIMES.of(4)
    assert latencies([long])["r"] == pytest.approx(expected)


def test_sequences_share_steps():
    both = latencies([request("a", work=10.0), request("b", work=20.0)])
    # "a" starts alone, since the first step begins with it; "b" is prefilled beside it.
    assert both["a"] == pytest.approx(0.010 + TIMES.of(10 + 3) + 4 * TIMES.of(30))
    assert both["b"] == pytest.approx(both["a"] + TIMES.of(20))


def test_a_prefix_that_is_held_is_not_computed_again():
    chunks = tuple(b"%d" % n for n in range(30))
    first = request("a", prompt_tokens=1930, num_steps=1, chunks=chunks)
    again = request("b", arrives_s=9.0, prompt_tokens=1930, num_steps=1, chunks=chunks)
    times = latencies([first, again])
    assert times["a"] - times["b"] == pytest.approx(TIMES.of(1930) - TIMES.of(10))


def test_those_who_find_no_place_wait():
    crowd = [request(f"{n}", num_steps=1000) for n in range(MAX_NUM_SEQS + 1)]
    times = latencies(crowd)
    last = f"{MAX_NUM_SEQS}"
    assert times[last] > 1.5 * max(each for name, each in times.items() if name != last) / 2
    assert times[last] > times["0"] + 1000 * TIMES.of(4)


def test_load_says_what_a_step_processes():
    replica = SimulatedReplica("0", TIMES)
    replica.waiting.extend([request("a", work=10.0), request("b", work=20.0)])
    assert replica.load().waiting_tokens == 2 * replica.load().tokens_per_sequence
    replica.begin_step()
    replica.end_step()
    load = replica.load()
    assert (load.next_step_tokens, load.waiting_tokens) == (30.0, 0.0)
    assert (load.num_running, load.num_waiting) == (2, 0)
    assert load.step_s == pytest.approx(TIMES.of(6))


@pytest.mark.parametrize("kind", ["uniform", "skewed", "conversations"])
@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_arrivals_come_at_the_rate_asked_for(kind, arrivals):
    load = Load(kind, arrivals, requests_per_s=10.0, duration_s=400.0, num_routers=3)
    requests = load.draw(1)
    assert len(requests) == pytest.approx(4000, rel=0.15)
    times = [each.arrives_s for each in requests]
    assert times == sorted(times)
    assert {each.router for each in requests} == {0, 1, 2}
    assert requests == load.draw(1)
    assert requests != load.draw(2)


def test_a_turn_begins_with_all_that_was_said():
    load = Load("conversations", "poisson", requests_per_s=50.0, duration_s=20.0, num_routers=1)
    by_name = {each.name: each for each in load.draw(0)}
    later = [each for each in by_name.values() if each.name.endswith("-3")]
    assert later
    for each in later:
        if (before := by_name.get(each.name.removesuffix("3") + "2")) is not None:
            known = before.known_after
            assert each.facts.chunks[: len(known)] == known


@pytest.mark.parametrize("router", ROUTERS)
def test_every_way_of_choosing_serves_everyone(router):
    slowness = [3.0, 1.0, 1.0, 1.0]
    rate = rate_for("skewed", 0.5, slowness, TIMES)
    requests = Load("skewed", "bursty", rate, 20.0, num_routers=2).draw(0)
    outcome = simulate(requests, router, slowness, TIMES, num_routers=2, seed=0)
    assert outcome.latencies_s.keys() == {each.name for each in requests}
    assert sum(outcome.requests_at.values()) == len(requests)
    again = simulate(requests, router, slowness, TIMES, num_routers=2, seed=0)
    assert again.latencies_s == outcome.latencies_s


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "deep" / "routing.json"
    flags = "--num-replicas 3 --duration 1 --seeds 2 --arrivals poisson --load uniform skewed"
    main([*flags.split(), "--router", "occupancy", "power_of_two", "--json", str(path)])
    report = json.loads(path.read_text())
    assert len(report["runs"]) == 2 * 2 * 2
    skewed = next(
        each
        for each in report["comparisons"]
        if (each["load"], each["router"]) == ("skewed", "occupancy")
    )
    assert skewed["p99_lower_by_least"] <= skewed["p99_lower_by"] <= skewed["p99_lower_by_most"]
    assert f"{skewed['p99_lower_by']:.1%}" in capsys.readouterr().out
    assert report["arguments"]["num_replicas"] == 3


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        pytest.param(["--seeds", "0"], "--seeds must be more than 0", id="no seed"),
        pytest.param(["--num-slow", "65"], "--num-slow must be 0 to 64", id="more slow than all"),
    ],
)
def test_flags_without_sense_are_refused(flags, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert reason in capsys.readouterr().err


def test_a_run_without_rows_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match="has no rows"):
        main(["--run", str(path)])


def test_without_serves_default_there_is_nothing_to_compare():
    assert compare([]) == []
