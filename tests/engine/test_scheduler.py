"""Who runs when, and what comes out: the scheduler against a device of numbers, without a model.

The device's tokens follow from the KV that they see, so wrong pages show as wrong tokens.
"""

import pytest
from fake_system import B, System, expected, sequence

from focus_ray.engine.outputs import DecodingCounts
from focus_ray.kernels.slot_words import COUNTS


def test_the_device_counts_in_the_hosts_order():
    assert tuple(DecodingCounts.__dataclass_fields__) == COUNTS


@pytest.mark.parametrize("many", [False, True], ids=["one at a time", "several, anywhere"])
@pytest.mark.parametrize(
    ("prompt_len", "max_tokens"),
    [
        pytest.param(1, 1, id="one token in, one out"),
        pytest.param(8, 8, id="whole blocks"),
        pytest.param(9, 3, id="partial first block, limit inside it"),
        pytest.param(3, 30, id="many blocks"),
    ],
)
def test_tokens_come_out_in_order(prompt_len, max_tokens, many):
    system = System(many=many)
    made = sequence("a", prompt_len, max_tokens)
    system.add(made)
    assert system.run()["a"] == expected(made)
    system.check_end()


def test_a_step_is_launched_before_the_one_before_it_is_applied():
    system = System()
    system.add(sequence("a", 4, 4))
    assert system.launch() is not None
    assert system.launch() is not None  # knows nothing of the first
    assert system.scheduler.num_in_flight == 2
    system.apply()
    assert system.out == {"a": expected(sequence("a", 4, 4))[:1]}


def test_sequences_at_different_steps_share_a_pass_and_places_are_refilled_at_once():
    system = System(slots=2)
    system.add(sequence("a", 2, 4), sequence("b", 2, 6), sequence("c", 2, 4))
    system.run()
    assert [len(present) for present in system.device.took_part[:6]] == [2, 2, 2, 2, 1, 2]
    # the step in between was launched before the host knew that a had ended
    system.check_end()


def test_prefill_is_chunked_and_shares_steps_with_decoding():
    system = System(batched=16)
    system.add(sequence("short", 1, 20))
    system.step()
    system.add(sequence("long", 40, 4))
    system.step()
    starts, lengths = [], []
    for _ in range(4):
        plan = system.device.plans[-1]
        starts += [chunk.start for chunk in plan.prefill]
        lengths += [len(chunk.token_ids) for chunk in plan.prefill]
        system.step()
    assert starts == [0, 12, 24, 36]
    assert lengths == [12, 12, 12, 4]  # 16 less the decoding block


def test_the_step_of_the_last_chunk_denoises_the_first_block():
    system = System(batched=16)
    system.add(made := sequence("a", 22, 4))
    system.step()
    first = system.device.plans[-1]
    assert (len(first.prefill), first.starts) == (1, [])
    system.step()
    second = system.device.plans[-1]
    assert [(chunk.start, len(chunk.token_ids)) for chunk in second.prefill] == [(16, 4)]
    assert [start.block_start for start in second.starts] == [20]
    assert system.device.took_part == [[], [0]]
    assert system.run()["a"] == expected(made)


def test_who_has_nothing_to_prefill_starts_at_once():
    system = System()
    system.add(sequence("a", 3, 4))
    system.step()
    assert system.device.took_part == [[0]]


def test_prefill_progresses_even_when_decoding_fills_the_budget():
    system = System(batched=4)
    system.add(sequence("a", 1, 20))
    system.step()
    system.add(sequence("b", 12, 4))
    system.step()
    assert [len(c.token_ids) for c in system.device.plans[-1].prefill] == [4]


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        pytest.param({"room": 20}, 12, id="two blocks of the room are for decoding"),
        pytest.param({"rows": 2}, 8, id="rows"),
        pytest.param({"batched": 24}, 24, id="tokens to aim at"),
    ],
)
def test_prefill_keeps_to_what_a_step_can_hold(limits, most):
    system = System(**limits)
    made = [sequence(name, 50, 6, value) for value, name in enumerate("abc")]
    system.add(*made)
    out = system.run()
    sizes = [plan.num_prefill_tokens for plan in system.device.plans]
    assert max(sizes) == most
    assert [out[item.request_id] for item in made] == [expected(item) for item in made]


def test_what_decodes_less_leaves_more_to_prefill():
    """Whole blocks are reckoned for who just started, then what was really processed."""
    system = System(batched=40, slots=8)
    system.add(*(sequence(str(i), 1, 30) for i in range(5)))
    system.step()
    system.step()
    system.add(sequence("long", 200, 4))
    system.device.room = 2 * B  # three of five sit steps out
    sizes = []
    for _ in range(4):
        system.step()
        sizes.append(system.device.plans[-1].num_prefill_tokens)
    assert sizes[:2] == [20, 20]
    assert sizes[3] > 20


def test_cached_prefix_is_not_prefilled_again():
    system = System()
    system.add(sequence("a", 20, 4))
    system.run()
    again = sequence("b", 20, 4)
    system.add(again)
    plan = system.step()
    assert again.cached_prefix_tokens == 16  # two whole pages
    assert [(c.start, len(c.token_ids)) for c in plan.prefill] == [(16, 4)]
    assert system.run()["b"] == system.out["a"]


@pytest.mark.parametrize("batched", [20, 1000], ids=["in chunks", "in the very step"])
def test_equal_prompts_admitted_together_are_computed_once(batched):
    system = System(batched=batched, pages=64)
    made = [sequence(str(i), 42, 4) for i in range(4)]
    system.add(*made)
    out = system.run()
    assert [item.prefill_tokens for item in made] == [40, 0, 0, 0]
    assert [item.cached_prefix_tokens for item in made] == [0, 40, 40, 40]
    assert all(tokens == expected(made[0]) for tokens in out.values())
    if batched == 1000:
        assert len(system.device.plans[0].starts) == 4
    system.check_end()


def test_sharing_stops_where_prompts_part():
    system = System(batched=16, pages=64)
    first, second = sequence("first", 40, 4), sequence("second", 40, 4)
    second.canvas[20] = 77
    system.add(first, second)
    pages = set()

    def watch(_):
        nonlocal pages
        pages = set(first.pages) & set(second.pages) or pages

    out = system.run(on_step=watch)
    assert len(pages) == 2
    assert (second.cached_prefix_tokens, second.prefill_tokens) == (16, 24)
    assert [out["first"], out["second"]] == [expected(first), expected(second)]
    system.check_end()


def test_generated_blocks_are_cached_too():
    system = System()
    system.add(sequence("a", 4, 16))
    out = system.run()
    follow_up = sequence("b", 20, 4)
    follow_up.canvas[4:20] = out["a"]
    system.add(follow_up)
    assert system.run()["b"] == expected(follow_up)
    # the last block was never closed; positions 0 to 15 were
    assert follow_up.cached_prefix_tokens == 16


def test_a_stop_id_ends_a_text_on_the_device():
    tokens = expected(sequence("a", 4, 40))
    stop = tokens[21]
    system = System()
    system.add(made := sequence("a", 4, 40, stop_token_ids=(stop,)))
    out = system.run()
    assert out["a"] == tokens[: tokens.index(stop) + 1]
    assert made.stats().denoising_steps == len(out["a"])
    assert all(not plan.stops for plan in system.device.plans)


def test_a_trace_lists_every_step():
    system = System(trace=True)
    made = sequence("a", 6, 6)
    system.add(made)
    tokens = system.run()["a"]
    assert [step.positions for step in made.trace] == [(p,) for p in range(6, 12)]
    assert [step.token_ids for step in made.trace] == [(token,) for token in tokens]
    assert [len(step.masked) for step in made.trace] == [2, 1, 4, 3, 2, 1]
    assert [step.block_start for step in made.trace] == [4, 4, 8, 8, 8, 8]
    assert made.trace[1].retained == (4, 5, 6, 7)
    assert made.trace[2].processed == made.trace[2].retained == (7, 8, 9, 10, 11)
    assert [step.leftover for step in made.trace] == [(), (), (7,), (), (), ()]
    assert made.trace[3].masked_confidences == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("most", "num_steps", "leftover"),
    [
        pytest.param(1, 5, (4, 5, 6, 7), id="ends with an edit: all is left over"),
        pytest.param(9, 6, (), id="ends when nothing changes: nothing is left over"),
    ],
)
def test_a_block_of_joint_threshold_comes_out_when_it_has_settled(most, num_steps, leftover):
    """The fake device decodes every odd position wrong, and edits it in the next step."""
    system = System(trace=True)
    made = sequence("a", 4, 8, unmasking="joint_threshold", max_post_steps=most)
    system.add(made)
    came = []
    tokens = system.run(on_step=lambda _: came.append(len(system.out.get("a", ()))))["a"]
    assert tokens == expected(made)
    assert set(came) <= {0, 4, 8}, "a part of a block came out"
    trace = made.trace
    assert [step.block_start for step in trace] == [4] * num_steps + [8] * num_steps
    assert [step.edited for step in trace[:5]] == [(), (), (5,), (), (7,)]
    assert trace[4].edited_token_ids == (tokens[3],) != trace[3].token_ids
    assert trace[4].edited_confidences == (1.0,)
    assert all(step.edited == () for step in trace[5:num_steps])
    assert trace[num_steps].leftover == leftover
    assert made.stats().edited_tokens == 4
    assert made.stats().decoded_tokens == 8
    system.check_end()


def test_what_is_edited_away_ends_no_text():
    free = sequence("a", 4, 8, unmasking="joint_threshold", max_post_steps=9)
    wrong = (expected(free)[3] + 1) % 97  # what position 7 is decoded to at first
    assert wrong not in expected(free)
    limited = sequence(
        "b", 4, 8, unmasking="joint_threshold", max_post_steps=9, stop_token_ids=(wrong,)
    )
    system = System()
    system.add(limited)
    assert system.run()["b"] == expected(free)


def test_a_trace_has_no_step_that_a_sequence_sat_out():
    system = System(trace=True, room=3 * B, slots=3)
    made = [sequence(name, 2, 10, value) for value, name in enumerate("abc")]
    system.add(*made)
    system.run()
    assert system.device.num_deferred > 0
    assert [len(item.trace) for item in made] == [10, 10, 10]


def test_counts_are_of_this_sequence():
    system = System()
    made = sequence("a", 8, 8)
    system.add(made, sequence("b", 2, 2))
    system.run()
    stats = made.stats()
    assert stats.denoising_steps == stats.decoded_tokens == 8
    assert stats.committed_blocks == 1  # the last block ends the sequence instead
    assert stats.processed_tokens == 8 * B + 1  # the last token of the first block rides along
    assert stats.prefill_tokens == 8
