"""Admission by predicted tokens, and what a scheduler says of the work it has.

As in test_scheduler.py, wrong pages show as wrong tokens.
"""

import numpy as np
import pytest
from fake_system import B, System, expected, sequence

from focus_ray.engine.occupancy import DECODED, PRIOR_STEPS, PROCESSED, STEPS


def crowd(count, prompt_len=3, max_tokens=40, **params):
    return [sequence(str(i), prompt_len, max_tokens, i, **params) for i in range(count)]


def most_at_once(system):
    return max(map(len, system.device.took_part))


@pytest.mark.parametrize("evicted", [0, 3], ids=["none evicted", "most evicted"])
def test_without_a_bound_slots_alone_decide(evicted):
    system = System(slots=8, pages=200, num_evicted=evicted)
    system.add(*crowd(12))
    system.run()
    assert len(system.device.took_part[0]) == 8
    assert most_at_once(system) == 8


def test_under_a_bound_eviction_lets_more_run_at_once():
    """Blocks of 4: 16 tokens are 4 whole blocks, or many more of those that process one each."""
    at_once = {}
    for evicted in (0, 3):
        system = System(slots=32, pages=800, max_decode_tokens=4.0 * B, num_evicted=evicted)
        made = crowd(24, max_tokens=48)
        system.add(*made)
        out = system.run(max_steps=2000)
        assert [out[item.request_id] for item in made] == [expected(item) for item in made]
        assert len(system.device.took_part[0]) == 4, "at first a whole block is reckoned"
        at_once[evicted] = most_at_once(system)
        system.check_end()
    # leftovers add a little to a block of 4, and to 1 of 4
    assert at_once[0] <= 4
    assert at_once[3] >= 10


def test_one_may_always_run():
    system = System(max_decode_tokens=0.5)
    made = crowd(3, max_tokens=6)
    system.add(*made)
    out = system.run()
    assert most_at_once(system) == 1
    assert [out[item.request_id] for item in made] == [expected(item) for item in made]


def test_preempted_ones_come_back_under_a_bound():
    system = System(slots=4, pages=8, max_decode_tokens=3.0 * B)
    made = crowd(4, prompt_len=5)
    system.add(*made)
    out = system.run(max_steps=5000)
    assert system.scheduler.num_preemptions > 0
    assert most_at_once(system) <= 3
    assert [out[item.request_id] for item in made] == [expected(item) for item in made]
    system.check_end()


def test_places_are_slots_until_there_is_a_bound():
    free = System(slots=8)
    bound = System(slots=8, max_decode_tokens=3.0 * B)
    small = System(slots=3, max_decode_tokens=900.0 * B)
    for system, places in ((free, 8), (bound, 3), (small, 3)):
        assert system.scheduler.num_free_places == places
        system.add(*crowd(2))
        system.step()
        assert system.scheduler.num_free_places == places - 2


def test_nothing_to_do_is_nothing_predicted():
    system = System()
    forecast = system.scheduler.forecast()
    assert (forecast.next_step_tokens, forecast.waiting_tokens, forecast.remaining_tokens) == (
        0,
        0,
        0,
    )
    system.add(*crowd(9, prompt_len=20, max_tokens=11))
    system.run()
    forecast = system.scheduler.forecast()
    assert (forecast.next_step_tokens, forecast.waiting_tokens, forecast.remaining_tokens) == (
        0,
        0,
        0,
    )


def test_before_anything_ran_a_sequence_is_a_whole_block_for_every_token():
    system = System(slots=2, batched=64)
    system.add(*crowd(2), *crowd(3, prompt_len=9, max_tokens=10))
    forecast = system.scheduler.forecast()
    assert forecast.next_step_tokens == 0
    assert forecast.tokens_per_sequence == B
    assert forecast.waiting_tokens == 5 * B + 3 * 8
    assert forecast.remaining_tokens == (2 * 40 + 3 * 10) * B + 3 * 8
    system.step()
    forecast = system.scheduler.forecast()
    assert forecast.next_step_tokens == 2 * B
    assert forecast.waiting_tokens == 3 * B + 3 * 8


def test_of_prefill_a_step_takes_no_more_than_it_aims_at():
    system = System(slots=1, batched=16)
    system.add(sequence("a", 43, 4), sequence("b", 43, 4))
    assert system.scheduler.forecast().waiting_tokens == 2 * B + 16
    assert system.scheduler.forecast().remaining_tokens == 2 * 40 + 2 * 4 * B
    system.step()
    # a is admitted, and 16 of its 40 tokens are planned
    assert system.scheduler.forecast().next_step_tokens == B
    assert system.scheduler.forecast().waiting_tokens == B + 16
    assert system.scheduler.forecast().remaining_tokens == 24 + 40 + 2 * 4 * B


def test_each_running_sequence_counts_by_its_own_average():
    """Followed by hand, from the counts that the device sends back."""
    system = System(slots=3, pages=64, many=True, num_evicted=1)
    made = crowd(3, max_tokens=60)
    system.add(*made)
    system.launch()
    for _ in range(8):
        system.launch()
        system.apply()
    forecast = system.scheduler.forecast()
    known_MC = system.scheduler._slots.counts_MC
    assert known_MC[:, STEPS].tolist() == [8, 8, 8]
    of_all = forecast.tokens_per_sequence, forecast.decoded_per_step
    processed = (known_MC[:, PROCESSED] + PRIOR_STEPS * of_all[0]) / (8 + PRIOR_STEPS)
    decoded = (known_MC[:, DECODED] + PRIOR_STEPS * of_all[1]) / (8 + PRIOR_STEPS)
    assert len(set(processed.round(6))) == 3, "all alike tell nothing"
    assert forecast.next_step_tokens == pytest.approx(processed.sum())
    left = np.zeros(3)
    for item in made:
        left[item.slot] = 60 - len(system.out[item.request_id])
    assert forecast.remaining_tokens == pytest.approx((left * processed / decoded).sum())


def test_what_waits_is_counted_however_it_comes_and_goes():
    """Preempted, aborted while waiting, admitted: the sums are those of whoever waits now."""
    system = System(slots=3, pages=9)
    made = crowd(9, prompt_len=10, max_tokens=30)
    system.add(*made)
    scheduler = system.scheduler
    for number in range(400):
        if not scheduler.has_unfinished():
            break
        if number in (5, 60):
            scheduler.finish(scheduler.waiting[-1])
        system.step()
        prefill = sum(item.num_committed for item in scheduler.waiting)
        output = sum(30 - item.num_emitted for item in scheduler.waiting)
        assert (scheduler._waiting_prefill, scheduler._waiting_output) == (prefill, output)
    assert scheduler.num_preemptions > 0
    assert not scheduler.has_unfinished()


def test_ratios_are_those_of_late():
    system = System(slots=4, pages=200, num_evicted=3)
    system.add(*crowd(4, max_tokens=300))
    system.run(max_steps=2000)
    forecast = system.scheduler.forecast()
    # of 4 tokens and a leftover in each fourth step, 3 are evicted; one is decoded
    assert forecast.retained_ratio == pytest.approx(1.25 / 4.25, abs=0.05)
    assert forecast.tokens_per_sequence == pytest.approx(1.25, abs=0.2)
    assert forecast.decoded_per_step == pytest.approx(1.0)
