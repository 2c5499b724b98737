"""What may happen while a step is in flight: preemption, ends, aborts, slots that are put off.

As in test_scheduler.py, wrong pages show as wrong tokens.
"""

import numpy as np
import pytest
from fake_system import B, System, expected, sequence

from focus_ray.engine.request import SequenceState
from focus_ray.kernels.slot_words import COUNTS


def test_a_device_that_puts_slots_off_changes_no_token():
    made = [sequence(name, 5 + value, 20, value) for value, name in enumerate("abcdef")]
    system = System(slots=6, room=4 * B, many=True)
    system.add(*made)
    out = system.run()
    assert system.device.num_deferred > 20
    assert [out[item.request_id] for item in made] == [expected(item) for item in made]
    system.check_end()


def test_a_page_is_found_only_after_what_was_left_over_of_it_is_computed():
    """The device closes a block, then puts its sequence off: another may not read the page yet."""
    system = System(slots=2)
    made = sequence("a", 4, 16)
    system.add(made)
    while made.slot < 0 or system.device.slots[made.slot].block_start < 8:
        system.step()
    system.device.room = 0
    for _ in range(3):
        system.step()
    assert made.num_committed == 8
    page = made.canvas[:8].copy()
    assert system.pool.match(page).pages == []
    system.device.room = 1 << 20
    system.step()
    assert system.pool.match(page).pages == []  # launched, but not known to have taken part
    system.step()
    match = system.pool.match(page)
    assert match.pages == made.pages[:1]
    system.pool.free(match.pages)
    assert system.run()["a"] == expected(made)


JOINT = {"unmasking": "joint_threshold", "max_post_steps": 2}


@pytest.mark.parametrize("params", [{}, JOINT], ids=["decoded once", "edited"])
@pytest.mark.parametrize("many", [False, True], ids=["one at a time", "several, anywhere"])
@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no cache"])
def test_preemption_loses_nothing_and_returns_every_page(caching, many, params):
    system = System(slots=4, pages=8, caching=caching, many=many)
    made = [sequence(name, 5, 40, prompt_value=i, **params) for i, name in enumerate("abcd")]
    system.add(*made)
    out = system.run(max_steps=5000)
    assert system.scheduler.num_preemptions > 0
    assert [out[item.request_id] for item in made] == [expected(item) for item in made]
    system.check_end()


def test_steps_without_a_mask_are_counted_on_after_preemption():
    """The younger one is preempted between an edit and the step that would find nothing to edit."""
    system = System(slots=2, pages=4)
    system.add(sequence("old", 8, 24, 1), young := sequence("young", 5, 20, 2, **JOINT))
    while system.scheduler.num_preemptions == 0:
        system.step()
    assert young.saved_block is not None
    assert young.saved_block.decoded_B.all()
    assert young.saved_block.post_steps == 1
    system.run()
    starts = [start for plan in system.device.plans for start in plan.starts]
    assert [start.block.post_steps for start in starts if start.block.decoded_B.all()] == [1]
    assert system.out["young"] == expected(young)


def test_the_oldest_keeps_its_place_and_the_youngest_yields():
    system = System(slots=2, pages=4)
    old, young = sequence("old", 8, 16, 1), sequence("young", 8, 16, 2)
    system.add(old, young)
    while system.scheduler.num_preemptions == 0:
        system.step()
    assert old.state is SequenceState.DECODING
    assert young.state is SequenceState.WAITING
    assert system.scheduler.waiting[0] is young
    # the device is told, and the step that it was in when it lost its place does not count
    assert system.device.plans[-1].stops == [1]
    assert young.num_emitted == len(system.out["young"])


def test_what_is_known_when_a_sequence_is_preempted_survives():
    system = System(slots=2, pages=4)
    system.add(sequence("old", 8, 24, 1), young := sequence("young", 1, 24, 2))
    while system.scheduler.num_preemptions == 0:
        decoded_MB = system.scheduler._slots.decoded_MB.copy()
        slot, num_committed = young.slot, young.num_committed
        system.step()
    saved = young.saved_block
    assert saved is not None
    # as of the results that were applied when it lost its place, with one more in flight
    assert saved.decoded_B.tolist() == decoded_MB[slot].tolist()
    assert saved.denoising_step == saved.decoded_B.sum() > 0  # in the middle of a block
    assert young.num_committed == num_committed
    start, num_decoded = young.num_committed - young.prompt_len, int(saved.decoded_B.sum())
    assert saved.token_ids_B[:num_decoded].tolist() == expected(young)[start : start + num_decoded]
    assert system.run()["young"] == expected(young)


def test_a_result_means_nothing_to_who_took_the_slot_in_the_meantime():
    system = System(slots=1)
    first, second = sequence("first", 4, 20, 1), sequence("second", 4, 20, 2)
    system.add(first, second)
    for _ in range(3):
        system.step()
    emitted = len(system.out["first"])
    system.scheduler.finish(first)  # with a step of it in flight
    plan = system.step()
    assert plan.stops == [0]
    assert [start.slot for start in plan.starts] == [0]
    assert (len(system.out["first"]), "second" in system.out) == (emitted, False)
    assert system.run()["second"] == expected(second)
    assert second.stats().denoising_steps == 20
    counts = system.scheduler.counts
    assert counts.denoising_steps == first.stats().denoising_steps + 20


def test_the_device_is_told_only_what_it_does_not_know():
    system = System(slots=1)
    system.add(sequence("limit", 4, 3), sequence("late", 4, 3))
    system.run()
    assert [plan.stops for plan in system.device.plans] == [[]] * len(system.device.plans)


@pytest.mark.parametrize("many", [False, True], ids=["one at a time", "several, anywhere"])
def test_a_text_that_only_the_host_can_end_is_stopped(many):
    tokens = expected(sequence("a", 4, 30))
    system = System(slots=1, stop_host=tokens[9:10], many=many)
    where = tokens.index(tokens[9])
    system.add(sequence("a", 4, 30), sequence("b", 4, 1, prompt_value=3))
    out = system.run()
    assert out["a"] == tokens[: where + 1]
    assert sum(len(plan.stops) for plan in system.device.plans) == 1
    system.check_end()


def test_a_stop_waits_for_the_next_step_that_is_launched():
    system = System(slots=1)
    system.add(made := sequence("a", 4, 30))
    system.step()
    system.step()
    system.scheduler.finish(made)
    assert system.step() is None  # takes up the result that was due, and launches nothing
    assert not system.scheduler.has_unfinished()
    system.add(late := sequence("b", 40, 4))
    assert system.step().stops == [0]
    assert system.run()["b"] == expected(late)


@pytest.mark.parametrize("when", [0, 1, 2, 7], ids=["waiting", "prefill", "start", "later"])
def test_finishing_at_any_time_frees_everything(when):
    system = System(batched=8)
    made = sequence("a", 12, 30)
    system.add(made)
    for _ in range(when):
        system.step()
    system.scheduler.finish(made)
    assert system.pool.num_free == 32
    system.run()
    system.check_end()


@pytest.mark.parametrize("room", [1 << 20, 5 * B], ids=["room for all", "slots are put off"])
@pytest.mark.parametrize("seed", range(4))
def test_random_crowds_get_their_tokens_and_return_everything(seed, room):
    """Arrivals, aborts, too few pages, shared prefixes; decoding several tokens a step."""
    rng = np.random.default_rng(seed)
    system = System(slots=5, pages=14, batched=24, room=room, many=True)
    made = [
        sequence(str(i), int(rng.integers(1, 40)), int(rng.integers(1, 40)), i % 3)
        for i in range(60)
    ]
    waiting, aborted = list(made), set()

    def come_and_go(_):
        while waiting and rng.random() < 0.3:
            system.add(waiting.pop())
        live = [s for s in made if s.state is not SequenceState.FINISHED and s not in waiting]
        if live and rng.random() < 0.04:
            victim = live[rng.integers(len(live))]
            aborted.add(victim.request_id)
            system.scheduler.finish(victim)

    while waiting:
        come_and_go(None)
        system.step()
    system.run(max_steps=20_000, on_step=come_and_go)
    assert system.scheduler.num_preemptions > 0
    assert 0 < len(aborted) < 30
    for item in made:
        tokens, want = system.out.get(item.request_id, []), expected(item)
        assert tokens == (want[: len(tokens)] if item.request_id in aborted else want)
    stats = [item.stats() for item in made]
    for name in COUNTS:
        assert sum(getattr(s, name) for s in stats) == getattr(system.scheduler.counts, name)
    system.check_end()
