"""The order of replicas as a function of loads. No Ray, no clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from focus_ray.serve.replica_load import ReplicaLoad
from focus_ray.serve.routing_facts import RequestFacts
from focus_ray.serve.routing_ledger import Unseen
from focus_ray.serve.routing_policy import Candidate, rank

# Half full: 50 sequences of 10 tokens, each with 40 steps to run.
HALF = ReplicaLoad(
    epoch=1,
    next_step_tokens=500.0,
    waiting_tokens=0.0,
    saturation_tokens=1000.0,
    tokens_per_sequence=10.0,
    remaining_tokens=20000.0,
    num_running=50,
    num_waiting=0,
    free_pages=1000,
    total_pages=2000,
    page_size=64,
    step_s=0.02,
)
SHORT = RequestFacts(prompt_tokens=40)


def replica(name, *, tokens=500.0, pace_s=0.03, unseen=None, num_open=50, held=0, **load):
    load = replace(HALF, next_step_tokens=tokens, **load)
    return Candidate(name, load, pace_s, unseen or Unseen(), num_open, held)


def order(*candidates, facts=SHORT, seed=0):
    return [choice.replica_id for choice in rank(candidates, facts, Random(seed))]


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        pytest.param([replica("a"), replica("b", tokens=400.0)], "ba", id="fewer tokens a step"),
        pytest.param(
            [replica("a", num_running=9, tokens=600.0), replica("b", num_running=90)],
            "ba",
            id="tokens count, not requests",
        ),
        pytest.param(
            [replica("a", tokens=400.0, waiting_tokens=200.0), replica("b")],
            "ba",
            id="what waits will run",
        ),
        pytest.param(
            [replica("a"), replica("b", tokens=900.0, saturation_tokens=3000.0)],
            "ba",
            id="a larger GPU is saturated later",
        ),
        pytest.param(
            [replica("a", unseen=Unseen(tokens=30.0)), replica("b", tokens=520.0)],
            "ba",
            id="what was sent since counts",
        ),
        pytest.param(
            [replica("a"), replica("b", tokens=520.0, unseen=Unseen(tokens=-30.0))],
            "ba",
            id="what ended since counts too",
        ),
        pytest.param(
            [replica("a", unseen=Unseen(prefill=30.0)), replica("b", tokens=520.0)],
            "ba",
            id="prompts that were sent since are to be computed",
        ),
        pytest.param(
            [replica("a", free_pages=1), replica("b", tokens=2000.0)],
            "ba",
            id="no KV room for the prompt stands behind any occupancy",
        ),
        pytest.param(
            [replica("a", free_pages=9, unseen=Unseen(pages=8)), replica("b", tokens=2000.0)],
            "ba",
            id="pages of what was sent since are taken",
        ),
        pytest.param(
            [replica("a", tokens=300.0, pace_s=0.09), replica("b"), replica("c", tokens=510.0)],
            "bca",
            id="three times slower counts as three times fuller",
        ),
        pytest.param(
            [replica("a", tokens=480.0, pace_s=0.036), replica("b"), replica("c", tokens=510.0)],
            "abc",
            id="paces that differ little are the same",
        ),
        pytest.param(
            [Candidate("a"), replica("b", tokens=2000.0), replica("c")],
            "cba",
            id="no numbers: behind those with numbers",
        ),
    ],
)
def test_order(candidates, expected):
    assert order(*candidates) == list(expected)


@pytest.mark.parametrize(
    ("ahead", "first"),
    [
        # 640 tokens over 40 steps are 16 tokens a step.
        pytest.param(12.0, "holds", id="the prefill saved outweighs the imbalance"),
        pytest.param(20.0, "empty", id="the imbalance outweighs the prefill saved"),
    ],
)
def test_a_prefix_is_worth_its_prefill(ahead, first):
    candidates = [replica("empty"), replica("holds", tokens=500.0 + ahead, held=640)]
    assert order(*candidates, facts=RequestFacts(prompt_tokens=700))[0] == first


def test_a_short_answer_makes_a_prefix_worth_more():
    candidates = [replica("empty"), replica("holds", tokens=600.0, held=640)]
    facts = RequestFacts(prompt_tokens=700)
    assert order(*candidates, facts=facts)[0] == "empty"
    assert order(*candidates, facts=replace(facts, max_tokens=4))[0] == "holds"


def test_a_session_has_a_home_that_all_routers_know_and_leaves_it_when_it_is_full():
    replicas = [replica(name) for name in "abcdefgh"]
    facts = [RequestFacts(prompt_tokens=2000, session=f"session {n}") for n in range(40)]
    homes = [order(*replicas, facts=each)[0] for each in facts]
    assert homes == [order(*reversed(replicas), facts=each, seed=1)[0] for each in facts]
    assert len(set(homes)) > 4
    fuller = [replica(name, tokens=700.0 if name == homes[0] else 500.0) for name in "abcdefgh"]
    assert order(*fuller, facts=facts[0])[0] != homes[0]
    # One replica less moves the sessions that lived there and no others.
    fewer = [order(*replicas[1:], facts=each)[0] for each in facts]
    assert all(now == home for now, home in zip(fewer, homes, strict=True) if home != "a")


def test_completions_of_a_request_are_sequences():
    choice = rank([replica("a")], RequestFacts(prompt_tokens=400, num_completions=3), Random(0))[0]
    assert choice.tokens == 30.0
    assert choice.prefill == 10.0
    assert choice.pages == 7 + 3


@pytest.mark.parametrize(
    "candidates",
    [
        pytest.param([Candidate(name, num_open=5) for name in "abcd"], id="nothing published"),
        pytest.param(
            [replica("a", tokens=0.0, num_open=0), *(Candidate(name) for name in "bcd")],
            id="published by a minority",
        ),
    ],
)
def test_without_numbers_two_at_random_are_compared(candidates):
    firsts = Counter(order(*candidates, seed=seed)[0] for seed in range(400))
    assert set(firsts) == set("abcd")
    busy = [each._replace(num_open=9 if each.replica_id == "a" else 1) for each in candidates]
    assert "a" not in {order(*busy, seed=seed)[0] for seed in range(400)}


def test_the_same_random_numbers_give_the_same_order():
    candidates = [Candidate(name) for name in "abcdefgh"]
    assert order(*candidates, seed=3) == order(*candidates, seed=3)
    assert len({tuple(order(*candidates, seed=seed)) for seed in range(9)}) > 1


def test_what_one_router_sent_others_have_sent_too():
    """Of 100 sequences this router has 25, so there are four that send like it."""
    candidates = [
        replica("a", num_open=13, unseen=Unseen(tokens=40.0)),
        replica("b", num_open=12, tokens=600.0),
    ]
    assert {order(*candidates, seed=seed)[0] for seed in range(50)} == {"b"}
    alone = [each._replace(num_open=50) for each in candidates]
    assert {order(*alone, seed=seed)[0] for seed in range(50)} == {"a"}


def test_several_routers_begin_at_several_replicas():
    """They see the same loads; alone, a router takes the least loaded one however little it is."""
    almost = [replica(name, tokens=500.0 + n) for n, name in enumerate("abcdefgh")]
    assert {order(*almost, seed=seed)[0] for seed in range(50)} == {"a"}
    shared = [each._replace(num_open=5) for each in almost]
    assert len({order(*shared, seed=seed)[0] for seed in range(50)}) > 4


def test_everyone_is_ranked_once():
    candidates = [Candidate("a"), *(replica(name, free_pages=0) for name in "bc"), replica("d")]
    assert sorted(order(*candidates)) == list("abcd")
    assert order() == []


def test_an_idle_fleet_needs_no_averages():
    idle = [
        replica(name, tokens=0.0, tokens_per_sequence=0.0, remaining_tokens=0.0, pace_s=None)
        for name in "ab"
    ]
    busy = replica("c", tokens=1.0, pace_s=None)
    assert order(*idle, busy)[-1] == "c"
