"""What a router knows over time: published loads, requests in flight, prefixes. No Ray."""

from __future__ import annotations

from random import Random

import pytest

from focus_ray.openai.messages import ChatPrompt, Submission, TextPrompt, TokenPrompt
from focus_ray.sampling import SamplingParams
from focus_ray.serve.prefix_memory import PrefixMemory
from focus_ray.serve.routing_facts import CHUNK_TOKENS, MAX_CHUNKS, RequestFacts, facts_of
from focus_ray.serve.routing_ledger import MAX_AGE_S, RoutingLedger, Sent, Unseen
from focus_ray.serve.routing_state import DELAY_S, STALE_AFTER_S, RoutingState

SHORT = RequestFacts(prompt_tokens=64)


def stats(epoch=1, tokens=500.0, step_s=0.02, num_running=0, **changed):
    """With no more requests than a test sends, which says that there is no other router."""
    return {
        "epoch": epoch,
        "next_step_tokens": tokens,
        "waiting_tokens": 0.0,
        "saturation_tokens": 1000.0,
        "tokens_per_sequence": 10.0,
        "remaining_tokens": 640 * tokens / 10,
        "num_running": num_running,
        "num_waiting": 0,
        "free_pages": 1000,
        "total_pages": 2000,
        "page_size": 64,
        "step_s": step_s,
        **changed,
    }


def knowing(**published):
    state = RoutingState(Random(0))
    for name, each in published.items():
        state.observe(name, each, 0.0)
    return state


def sent(name, replica_id="a", call_id=None, at_s=1.0, num_sequences=1):
    return Sent(name, call_id or name, replica_id, 10.0, 2.0, 3, num_sequences, at_s)


def test_a_burst_between_two_publications_spreads():
    state = knowing(a=stats(), b=stats(tokens=530.0), c=stats())
    firsts = [state.choose(f"{n}", f"{n}", "abc", SHORT, 0.01)[0] for n in range(30)]
    counts = {name: firsts.count(name) for name in "abc"}
    assert counts["a"] == pytest.approx(11, abs=1)
    assert counts["b"] == pytest.approx(8, abs=1)


def test_a_publication_takes_the_place_of_what_it_has_seen():
    state = knowing(a=stats(), b=stats(tokens=505.0))
    assert state.choose("1", "1", "ab", SHORT, 0.1)[0] == "a"
    assert state.rank("ab", SHORT, 0.1)[0] == "b"
    state.observe("a", stats(epoch=2, tokens=500.0), 0.2)
    assert state.rank("ab", SHORT, 0.2)[0] == "b", "it may be older than the request"
    state.observe("a", stats(epoch=3, tokens=500.0), 0.2 + DELAY_S)
    assert state.rank("ab", SHORT, 0.2 + DELAY_S)[0] == "a"


def test_an_epoch_that_is_known_brings_nothing_new():
    state = knowing(a=stats(epoch=5, tokens=100.0), b=stats(epoch=5))
    state.observe("a", stats(epoch=4, tokens=900.0), 0.1)
    assert state.rank("ab", SHORT, 0.1)[0] == "a"
    # Dated by when the epoch came first, however often it is told.
    state.observe("a", stats(epoch=5, tokens=100.0), STALE_AFTER_S)
    state.observe("b", stats(epoch=6), STALE_AFTER_S)
    assert state.rank("ab", SHORT, STALE_AFTER_S + 0.5)[0] == "b"


@pytest.mark.parametrize(
    "published",
    [
        pytest.param({}, id="nothing: no load is recorded"),
        pytest.param({"epoch": 1, "occupancy": 0.5}, id="fields of another version"),
    ],
)
def test_what_is_not_a_load_is_left(published):
    state = knowing(a=published, b=published, c=published)
    firsts = {state.rank("abc", SHORT, 0.0)[0] for _ in range(50)}
    assert firsts == set("abc")


def test_a_replica_that_slows_down_gets_less():
    state = RoutingState(Random(0))
    for epoch in range(1, 60):
        for name, step_s in (("a", 0.06), ("b", 0.02), ("c", 0.02)):
            state.observe(name, stats(epoch, step_s=step_s, num_running=1), epoch * 0.1)
    firsts = [state.choose(f"{n}", f"{n}", "abc", SHORT, 5.9)[0] for n in range(60)]
    assert "a" not in firsts


def test_an_idle_replica_keeps_its_pace():
    """Its last steps were long because they were full."""
    state = RoutingState(Random(0))
    for name in "abc":
        state.observe(name, stats(num_running=1), 0.0)
    for epoch in range(2, 20):
        idle, busy = stats(epoch, tokens=0.0), stats(epoch, num_running=1)
        for name, each in (("a", idle), ("b", busy), ("c", busy)):
            state.observe(name, each, epoch * 0.1)
    assert state.rank("abc", SHORT, 2.0)[0] == "a"


def test_replicas_that_are_gone_are_forgotten():
    state = knowing(a=stats(), b=stats(tokens=900.0))
    state.choose("1", "1", "ab", SHORT, 0.0)
    state.retain({"b"})
    assert state.rank("b", SHORT, 0.0) == ["b"]
    state.completed("a", "1", 0.1)
    state.routed("1", "a", 0.1)
    # The same name again would be a new process, which nothing is known of.
    assert state.rank("ab", SHORT, 0.1) == ["b", "a"]


def test_requests_with_one_beginning_go_where_it_is():
    state = knowing(a=stats(), b=stats(), c=stats())
    long = "the same long document. " * 200
    prompts = [TextPrompt(f"{long}{question}") for question in ("who?", "why?", "when?")]
    facts = [facts_of(Submission("x", prompt, SamplingParams())) for prompt in prompts]
    first = state.choose("0", "0", "abc", facts[0], 0.0)[0]
    for number, now_s in ((1, 1.0), (2, 2.0)):
        for name in "abc":
            published = stats(1 + number, tokens=500.0 + 10.0 * number * (name == first))
            state.observe(name, published, now_s)
        order = state.choose(f"{number}", f"{number}", "abc", facts[number], now_s)
        assert (order[0] == first) is (number == 1), "1200 tokens are worth 10 a step, not 20"


class TestLedger:
    def test_completed_after_routed(self):
        ledger = RoutingLedger()
        ledger.choose(sent("1"))
        ledger.routed("1", "a", 1.1)
        assert ledger.num_open("a") == 1
        assert ledger.unseen("a", 0.5) == Unseen(10.0, 2.0, 3)
        ledger.completed("a", "1", 1.2)
        assert ledger.num_open("a") == 0
        assert ledger.unseen("a", 0.5) == Unseen()

    def test_what_a_publication_saw_and_has_ended_since_is_taken_off(self):
        ledger = RoutingLedger()
        ledger.choose(sent("1", at_s=1.0))
        assert ledger.unseen("a", 1.5) == Unseen()
        ledger.completed("a", "1", 2.0)
        assert ledger.unseen("a", 1.5) == Unseen(-10.0, -2.0, -3)
        assert ledger.unseen("a", 2.0) == Unseen()

    def test_choosing_again_counts_once(self):
        ledger = RoutingLedger()
        for replica_id in ("a", "a", "b"):
            ledger.choose(sent("1", replica_id))
        assert ledger.num_open("a") == 0
        assert ledger.num_open("b") == 1

    def test_another_replica_took_it(self):
        ledger = RoutingLedger()
        ledger.choose(sent("1", "a"))
        ledger.routed("1", "b", 1.1)
        assert (ledger.num_open("a"), ledger.num_open("b")) == (0, 1)
        ledger.completed("b", "1", 1.2)
        assert ledger.num_open("b") == 0

    def test_completed_before_routed(self):
        ledger = RoutingLedger()
        ledger.choose(sent("1", "a"))
        ledger.completed("b", "1", 1.1)
        ledger.routed("1", "b", 1.2)
        assert (ledger.num_open("a"), ledger.num_open("b")) == (0, 0)

    def test_rejected_and_sent_to_the_same_replica_again(self):
        ledger = RoutingLedger()
        ledger.choose(sent("1", "a"))
        ledger.completed("a", "1", 1.1)
        ledger.choose(sent("1", "a"))
        ledger.routed("1", "a", 1.2)
        assert ledger.num_open("a") == 1

    def test_prompts_of_one_http_request_share_a_call(self):
        ledger = RoutingLedger()
        for name, replica_id in (("1", "a"), ("2", "a"), ("3", "b")):
            ledger.choose(sent(name, replica_id, call_id="call", num_sequences=2))
        ledger.completed("a", "call", 1.1)
        assert (ledger.num_open("a"), ledger.num_open("b")) == (2, 2)
        ledger.completed("b", "call", 1.2)
        ledger.completed("a", "call", 1.3)
        assert (ledger.num_open("a"), ledger.num_open("b")) == (0, 0)

    def test_calls_that_were_never_counted_leave_nothing(self):
        ledger = RoutingLedger()
        ledger.completed("a", "describe", 1.0)
        ledger.choose(sent("1", "a", call_id="describe"))
        ledger.routed("1", "a", 1.1)
        assert ledger.num_open("a") == 1

    def test_what_is_never_heard_of_again_is_given_up(self):
        ledger = RoutingLedger()
        ledger.choose(sent("lost", "a", at_s=1.0))
        ledger.choose(sent("1", "b", at_s=1.5 + MAX_AGE_S))
        assert (ledger.num_open("a"), ledger.num_open("b")) == (0, 1)


class TestFacts:
    def submission(self, prompt, **options):
        return facts_of(Submission("x", prompt, SamplingParams(**options)))

    def test_lengths(self):
        facts = self.submission(TokenPrompt(tuple(range(700))), max_tokens=9, n=2, temperature=1.0)
        assert (facts.prompt_tokens, facts.max_tokens, facts.num_completions) == (700, 9, 2)
        assert len(facts.chunks) == 700 // CHUNK_TOKENS
        assert self.submission(TextPrompt("x" * 401)).prompt_tokens == 101

    def test_a_conversation_that_goes_on_begins_with_what_was_said(self):
        turns = [
            {"role": "user", "content": "x" * 500},
            {"role": "assistant", "content": "y" * 500},
        ]
        earlier = self.submission(ChatPrompt(tuple(turns[:1]))).chunks
        later = self.submission(ChatPrompt(tuple(turns))).chunks
        assert earlier
        assert later[: len(earlier)] == earlier
        assert len(later) > len(earlier)

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param(TextPrompt("y" + "x" * 999), id="another beginning"),
            pytest.param(TextPrompt("x" * 1000, add_special_tokens=False), id="another frame"),
            pytest.param(ChatPrompt(({"role": "user", "content": "x" * 1000},)), id="a chat"),
            pytest.param(TokenPrompt(tuple(b"x" * 1000)), id="ids"),
        ],
    )
    def test_prompts_that_begin_otherwise_share_no_chunk(self, other):
        chunks = self.submission(TextPrompt("x" * 1000)).chunks
        assert not set(chunks) & set(self.submission(other).chunks)

    def test_a_chunk_stands_for_all_before_it(self):
        chunks = self.submission(TextPrompt("x" * 10000)).chunks
        assert len(set(chunks)) == len(chunks)

    def test_prompts_without_end_are_cut(self):
        assert len(self.submission(TextPrompt("x" * 10**6)).chunks) == MAX_CHUNKS
        assert self.submission(TextPrompt("")).chunks == ()


class TestPrefixMemory:
    def test_leading_chunks_count(self):
        memory = PrefixMemory()
        memory.remember("a", [b"1", b"2", b"3"])
        assert memory.num_held("a", [b"1", b"2", b"x"]) == 2
        assert memory.num_held("a", [b"x", b"2", b"3"]) == 0
        assert memory.num_held("a", [b"1", b"2", b"3"]) == 3
        assert memory.num_held("b", [b"1"]) == 0

    def test_ends_of_old_prompts_are_forgotten_first(self):
        memory = PrefixMemory(max_chunks_per_replica=4)
        memory.remember("a", [b"1", b"2", b"3"])
        memory.remember("a", [b"x", b"y"])
        assert memory.num_held("a", [b"1", b"2", b"3"]) == 2
        assert memory.num_held("a", [b"x", b"y"]) == 2

    def test_replicas_that_are_gone_are_forgotten(self):
        memory = PrefixMemory()
        memory.remember("a", [b"1"])
        memory.retain({"b"})
        assert memory.num_held("a", [b"1"]) == 0
