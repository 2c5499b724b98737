"""Occupancy of a real engine: what it tells of itself, and admission by it."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from small_engine import small_engine

from focus_ray.engine.outputs import GenerationRequest
from focus_ray.errors import EngineOverloaded
from focus_ray.sampling import SamplingParams

BLOCK = 16


make_engine = partial(small_engine, max_num_seqs=12, saturation_tokens=64)


def request(name, max_tokens=40):
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    return GenerationRequest(name, tuple(range(5, 12 + int(name))), params)


def run(engine, max_tokens=40):
    """Tokens of every of 12 requests, and the engine's load after each step."""
    tokens, loads = {}, []
    for i in range(12):
        engine.add(request(str(i), max_tokens))
    while engine.has_unfinished():
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        loads.append(engine.load())
    return tokens, loads


@pytest.mark.parametrize("decoding", ["block", "focus"])
def test_a_bound_on_occupancy_changes_no_token(golden_sdar, decoding):
    free, loads = run(make_engine(golden_sdar, decoding=decoding))
    assert max(load.num_running for load in loads) == 12
    bound, loads = run(make_engine(golden_sdar, decoding=decoding, max_occupancy=1.0))
    assert bound == free
    assert loads[0].num_running == 64 // BLOCK
    at_once = max(load.num_running for load in loads)
    if decoding == "block":
        assert at_once == 64 // BLOCK
    else:
        assert at_once > 64 // BLOCK, "eviction makes no room"


def test_predictions_are_near_what_steps_turn_out_to_process(golden_sdar):
    _, loads = run(make_engine(golden_sdar, decoding="focus"), max_tokens=120)
    busy = [(a, b) for a, b in pairwise(loads) if a.num_running == b.num_running == 12][6:]
    assert len(busy) > 8
    predicted = sum(a.next_step_tokens for a, _ in busy) / len(busy)
    processed = sum(b.retained_tokens - a.retained_tokens for a, b in busy) / len(busy)
    assert predicted == pytest.approx(processed, rel=0.15)
    assert processed < 0.8 * 12 * BLOCK, "nothing was evicted, so nothing was to be learned"
    last = loads[-1]
    assert last.retained_ratio == pytest.approx(
        last.retained_tokens / last.processed_tokens, rel=0.1
    )
    assert last.decoded_per_step == pytest.approx(last.tokens_per_step, rel=0.1)


def test_a_load_has_a_number_and_the_measures_of_its_engine(golden_sdar):
    engine = make_engine(golden_sdar)
    first, second = engine.load(), engine.load()
    assert second.epoch > first.epoch
    assert (first.saturation_tokens, first.page_size) == (64, BLOCK)
    assert first.tokens_per_sequence == BLOCK


def test_free_slots_that_the_bound_keeps_free_do_not_lengthen_the_queue(golden_sdar):
    engine = make_engine(golden_sdar, decoding="block", max_occupancy=0.25, max_num_waiting=1)
    engine.add(request("0"))
    engine.step()
    engine.add(request("1"))
    with pytest.raises(EngineOverloaded, match="1 sequences wait already"):
        engine.add(request("2"))
    while engine.has_unfinished():
        engine.step()
