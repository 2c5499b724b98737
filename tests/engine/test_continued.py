"""A request that one engine began and another one finishes, cut wherever the first could die."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from small_engine import small_engine

from focus_ray.engine.completion import Completion
from focus_ray.engine.emission import NewTokens
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.engine.request import Sequence
from focus_ray.errors import RequestRejected
from focus_ray.sampling import RepetitionDetection, SamplingParams

B, MASK = 16, 509
PROMPT = tuple(range(40, 61))  # ends within a block
LENGTH = 45  # tokens of an answer; it does too


make_engine = partial(small_engine, decoding="block")


def request(name, prompt=PROMPT, continued=None, **params):
    settings = {"max_tokens": LENGTH, "ignore_eos": True, "temperature": 0.0, "logprobs": 1}
    params = SamplingParams(**{**settings, **params})
    return GenerationRequest(name, prompt, params, continued=continued)


def run(engine, requests):
    """All deltas of each request."""
    deltas = {item.request_id: [] for item in requests}
    for item in requests:
        engine.add(item)
    while engine.has_unfinished():
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    return deltas


def ids_of(deltas, index=0):
    return tuple(i for delta in deltas if delta.index == index for i in delta.token_ids)


def logprobs_of(deltas):
    return [(entry.logprob, *entry.top) for delta in deltas for entry in delta.logprobs or ()]


CASES = [
    pytest.param({}, id="greedy"),
    pytest.param({"unmasking": "low_confidence_static", "denoising_steps": 5}, id="by schedule"),
    pytest.param(
        {"temperature": 1.5, "seed": 5, "top_k": 30, "denoising_steps": 8},
        id="a draw knows its position and step",
    ),
    pytest.param({"unmasking": "joint_threshold", "editing_threshold": 0.97}, id="edited"),
    pytest.param({"max_tokens": 43}, id="the limit is a block's end"),
]


@pytest.mark.parametrize("params", CASES)
def test_whole_blocks_come_to_the_same_from_any_cut(golden_sdar, params):
    whole = run(make_engine(golden_sdar), [request("whole", **params)])["whole"]
    cuts = [ids_of(whole[:count]) for count in range(len(whole))]
    assert len(cuts) > 3, "the case has become too short"
    second = make_engine(golden_sdar, seed=9)
    rest = run(
        second, [request(str(i), continued={0: ids}, **params) for i, ids in enumerate(cuts)]
    )
    for i, ids in enumerate(cuts):
        found = rest[str(i)]
        assert ids + ids_of(found) == ids_of(whole)
        assert found[-1].finish_reason == whole[-1].finish_reason == "length"
        assert found[-1].stats.prompt_tokens == len(PROMPT)
        for ours, theirs in zip(logprobs_of(found), logprobs_of(whole[i:]), strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
            assert ours[1][0] == theirs[1][0]
    assert second.load().free_pages == second.load().total_pages


@pytest.mark.parametrize("decoding", ["delayed", "focus"])
def test_evicting_engines_go_on_behind_what_was_sent(golden_sdar, decoding):
    """Their text may be another one, but of the length that is left, and after the same tokens."""
    params = {"decoding": decoding, "record_trace": True}
    whole = run(make_engine(golden_sdar, **params), [request("whole")])["whole"]
    cuts = [ids_of(whole[:count]) for count in range(len(whole))]
    rest = run(
        make_engine(golden_sdar, **params),
        [request(str(i), continued={0: ids}) for i, ids in enumerate(cuts)],
    )
    for i, ids in enumerate(cuts):
        assert len(ids) + len(ids_of(rest[str(i)])) == LENGTH
        assert_consistent(ids, rest[str(i)])


def assert_consistent(sent, deltas):
    """What the engine decoded of its blocks is what was sent, then what it sent itself."""
    text = PROMPT + sent + ids_of(deltas)
    decoded = {}
    for step in deltas[-1].trace:
        assert not decoded.keys() & set(step.positions), "decoded twice"
        decoded |= zip(step.positions, step.token_ids, strict=True)
    first = (len(PROMPT) + len(sent)) // B * B
    for position in range(max(first, len(PROMPT)), len(text)):
        assert decoded[position] == text[position]


def test_what_was_sent_stays_even_if_this_engine_would_say_something_else(golden_sdar):
    """The first one may be of other numerics: another GPU, another batch, other evictions."""
    engine = make_engine(golden_sdar, record_trace=True)
    sent = tuple(range(200, 218))
    free = ids_of(run(engine, [request("free")])["free"])
    deltas = run(engine, [request("a", continued={0: sent})])["a"]
    assert free[:18] != sent
    assert len(ids_of(deltas)) == LENGTH - 18
    assert_consistent(sent, deltas)


def mixed(i):
    """Parameters of many kinds."""
    params = {
        "max_tokens": 60 + 3 * i,
        "unmasking": ("low_confidence_dynamic", "low_confidence_static", "sequential")[i % 3],
        "confidence_threshold": (0.3, 0.6, 0.9)[i % 3],
        "denoising_steps": 1 + 5 * i % 16,
    }
    return params | ({"temperature": 1.0, "seed": i} if i % 2 else {})


def test_many_cut_at_once_in_an_engine_that_preempts(golden_sdar):
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(2, 500, 1 + 5 * i % 60).tolist()) for i in range(8)]
    requests = [request(str(i), prompt, **mixed(i)) for i, prompt in enumerate(prompts)]
    whole = run(make_engine(golden_sdar), requests)
    cuts = [ids_of(whole[str(i)][: i * len(whole[str(i)]) // 20]) for i in range(8)]
    engine = make_engine(golden_sdar, num_pages=8, max_model_len=128)
    rest = run(
        engine,
        [request(str(i), prompts[i], continued={0: ids}, **mixed(i)) for i, ids in enumerate(cuts)],
    )
    assert engine.load().num_preemptions > 3
    assert sum(map(bool, cuts)) > 4
    for i, ids in enumerate(cuts):
        assert ids + ids_of(rest[str(i)]) == ids_of(whole[str(i)])


def test_completions_go_on_under_their_own_numbers_and_seeds(golden_sdar):
    """One of three has ended, one has not begun."""
    params = {"n": 3, "temperature": 2.0, "seed": 3, "max_tokens": 40}
    whole = run(make_engine(golden_sdar), [request("a", **params)])["a"]
    ids = [ids_of(whole, index) for index in range(3)]
    continued = {0: ids[0][:11], 2: ()}
    rest = run(make_engine(golden_sdar), [request("a", continued=continued, **params)])["a"]
    assert {delta.index for delta in rest} == {0, 2}
    assert ids[0][:11] + ids_of(rest, 0) == ids[0]
    assert ids_of(rest, 2) == ids[2]


def test_stop_ids_end_it_where_they_would_have(golden_sdar):
    free = ids_of(run(make_engine(golden_sdar), [request("free")])["free"])
    stop = free[30]
    first = free.index(stop)
    engine = make_engine(golden_sdar)
    deltas = run(engine, [request("a", continued={0: free[:first]}, stop_token_ids=[stop])])["a"]
    assert ids_of(deltas) == (stop,)
    assert deltas[-1].stop_reason == stop


def test_min_tokens_count_what_was_emitted_before(golden_sdar):
    free = ids_of(run(make_engine(golden_sdar), [request("free")])["free"])
    params = {"min_tokens": 30, "stop_token_ids": sorted({*free, *range(300, 340)})[:60]}
    whole = ids_of(run(make_engine(golden_sdar), [request("whole", **params)])["whole"])
    assert not set(whole[:30]) & set(params["stop_token_ids"])
    cuts = [whole[:count] for count in (9, 11, 29)]
    requests = [request(str(len(ids)), continued={0: ids}, **params) for ids in cuts]
    rest = run(make_engine(golden_sdar), requests)
    assert [ids + ids_of(rest[str(len(ids))]) for ids in cuts] == [whole] * 3


def test_repetition_is_seen_across_the_cut(golden_sdar):
    rule = RepetitionDetection(min_pattern_size=1, max_pattern_size=4, min_count=2)
    params = {"max_tokens": 200, "repetition_detection": rule}
    whole = run(make_engine(golden_sdar), [request("whole", **params)])["whole"]
    assert whole[-1].stop_reason == "repetition"
    ids = ids_of(whole)
    rest = run(make_engine(golden_sdar), [request("a", continued={0: ids[:-1]}, **params)])["a"]
    assert (ids_of(rest), rest[-1].stop_reason) == (ids[-1:], "repetition")


@pytest.mark.parametrize(
    ("continued", "params", "param"),
    [
        pytest.param({}, {}, "continued", id="nothing to run"),
        pytest.param({1: ()}, {}, "continued", id="no such completion"),
        pytest.param({0: (7, MASK)}, {}, "continued[0]", id="mask id"),
        pytest.param({0: (7, 512)}, {}, "continued[0]", id="id past the vocabulary"),
        pytest.param({0: (7,) * LENGTH}, {}, "continued", id="as long as it may get"),
        pytest.param({0: (7,) * 2000}, {}, "continued", id="longer"),
        pytest.param({0: (7, 8)}, {"stop_token_ids": [7]}, "continued", id="had stopped"),
    ],
)
def test_what_cannot_go_on_is_refused(golden_sdar, continued, params, param):
    engine = make_engine(golden_sdar)
    with pytest.raises(RequestRejected) as error:
        engine.add(request("a", continued=continued, **params))
    assert error.value.param == param
    assert not engine.has_unfinished() and not engine.running_requests


class Bytes:
    """A tokenizer whose ids are bytes; what detokenizers ask of one."""

    def bytes_of_id(self, skip_special_tokens):
        return {i: bytes([i]) for i in range(256)}


TEXT = "Zoë said: “stop”, so we sto… 😀 and STOPPED there."


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, id="half characters"),
        pytest.param({"stop": ("STOP",)}, id="stop string, held back"),
        pytest.param(
            {"stop": ("stop", "sto… 😀"), "min_tokens": 20, "include_stop_str_in_output": True},
            id="kept, after some tokens",
        ),
    ],
)
def test_text_goes_on_where_the_text_before_ended(params):
    """What was held back when an engine died is there when the next one decides on it."""
    ids = tuple(TEXT.encode())

    def completion(known):
        canvas = np.array([0, *ids], np.int32)
        settings = SamplingParams(max_tokens=len(ids), **params)
        sequence = Sequence("a", 0, settings, 0, 1, canvas, 4, frozenset(), num_continued=known)
        return Completion(sequence, Bytes())

    def text(made, start):
        told = ""
        for end in range(start, len(ids), 3):
            delta = made.take(NewTokens(made.sequence, ids[end : end + 3], None))
            told += delta.text
            yield told, end + 3, delta.finish_reason
            if delta.finish_reason:
                return

    whole = list(text(completion(0), 0))
    assert whole[-1][0] in TEXT
    for told, known, finish_reason in whole[:-1]:
        assert finish_reason is None
        *_, (rest, _, reason) = text(completion(known), known)
        assert (told + rest, reason) == (whole[-1][0], whole[-1][2])
