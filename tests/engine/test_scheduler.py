"""The scheduler against a device of numbers: no model, no tensors.

Every step is launched before the result of the one before it is applied, as the engine does it. The
device's tokens follow from the KV that they see, so wrong pages show as wrong tokens.
"""

import numpy as np
import pytest
from fake_device import MASK, FakeDevice, expected_tokens

from focus_ray.engine.outputs import DecodingCounts
from focus_ray.engine.pages import PagePool
from focus_ray.engine.request import Sequence, SequenceState
from focus_ray.engine.scheduler import Scheduler, SchedulerLimits
from focus_ray.kernels.slot_words import COUNTS
from focus_ray.sampling import SamplingParams

B, PAGE = 4, 8


def sequence(name, prompt_len, max_tokens=8, prompt_value=None, **params):
    blocks = -(-(prompt_len + max_tokens) // B)
    canvas = np.zeros(blocks * B, np.int32)
    canvas[:prompt_len] = np.arange(prompt_len) if prompt_value is None else prompt_value
    made = Sequence(
        request_id=name,
        index=0,
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0, **params),
        seed=0,
        prompt_len=prompt_len,
        canvas=canvas,
        block_length=B,
        stop_token_ids=frozenset(params.get("stop_token_ids", ())),
    )
    made.num_committed = prompt_len // B * B
    return made


class System:
    """A scheduler and its device, driven as the engine drives them.

    ``stop_host`` ids end a text for the host alone, as stop strings do.
    """

    def __init__(
        self,
        *,
        slots=4,
        pages=32,
        batched=64,
        caching=True,
        trace=False,
        many=False,
        room=1 << 20,
        rows=1 << 20,
        stop_host=(),
    ):
        limits = SchedulerLimits(slots, batched, B, MASK, room, rows, trace)
        self.pool = PagePool(pages, PAGE, caching)
        self.scheduler = Scheduler(limits, self.pool)
        self.device = FakeDevice(self.pool, num_slots=slots, block_length=B, room=room, many=many)
        self.stop_host = set(stop_host)
        self.out = {}
        self.ended = set()

    def add(self, *sequences):
        for made in sequences:
            self.scheduler.add(made)

    def launch(self):
        plan = self.scheduler.plan()
        if plan is not None:
            self.check_pages()
            self.device.launch(plan)
        return plan

    def apply(self):
        for new in self.scheduler.apply(self.device.collect()):
            made = new.sequence
            tokens = self.out.setdefault(made.request_id, [])
            assert made.state is SequenceState.DECODING and made.request_id not in self.ended
            for token in new.token_ids:
                tokens.append(token)
                if token in made.stop_token_ids | self.stop_host:
                    break
            is_over = tokens[-1] in made.stop_token_ids | self.stop_host
            if is_over or len(tokens) == made.params.max_tokens:
                self.ended.add(made.request_id)
                self.scheduler.finish(made)

    def step(self):
        is_due = self.scheduler.num_in_flight > 0
        plan = self.launch()
        if is_due:
            self.apply()
        assert self.scheduler.num_in_flight <= 1
        return plan

    def run(self, *, max_steps=500, on_step=None):
        """To the end; returns the emitted tokens of each request."""
        for step in range(max_steps):
            if not self.scheduler.has_unfinished():
                return self.out
            if on_step:
                on_step(step)
            before = self.scheduler.num_in_flight
            assert self.step() is not None or before, "nothing runs although something waits"
        raise AssertionError(f"not done after {max_steps} steps")

    def check_pages(self):
        """Who decodes holds pages for all that the coming step may write."""
        slots = self.scheduler._slots
        for slot in np.flatnonzero(slots.decoding_M).tolist():
            made = slots.sequence(slot)
            end = min(made.num_committed + 2 * B, len(made.canvas))
            assert len(made.pages) * PAGE >= end
            assert len(set(made.pages)) == len(made.pages)

    def check_end(self):
        """Everything that was lent is back."""
        assert self.pool.num_free == self.pool.num_pages
        assert self.scheduler.num_free_slots == len(self.device.slots)
        assert not self.scheduler.has_unfinished()
        assert self.scheduler.plan() is None


def expected(made):
    prompt = made.canvas[: made.prompt_len].tolist()
    return expected_tokens(prompt, made.params.max_tokens, B)


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


def test_a_device_that_puts_slots_off_changes_no_token():
    made = [sequence(name, 5 + value, 20, value) for value, name in enumerate("abcdef")]
    system = System(slots=6, room=4 * B, many=True)
    system.add(*made)
    out = system.run()
    assert system.device.num_deferred > 20
    assert [out[item.request_id] for item in made] == [expected(item) for item in made]
    system.check_end()


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


@pytest.mark.parametrize("many", [False, True], ids=["one at a time", "several, anywhere"])
@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no cache"])
def test_preemption_loses_nothing_and_returns_every_page(caching, many):
    system = System(slots=4, pages=8, caching=caching, many=many)
    made = [sequence(name, 5, 40, prompt_value=i) for i, name in enumerate("abcd")]
    system.add(*made)
    out = system.run(max_steps=5000)
    assert system.scheduler.num_preemptions > 0
    assert [out[item.request_id] for item in made] == [expected(item) for item in made]
    system.check_end()


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
    assert second.num_emitted == 0
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


def test_a_stop_id_ends_a_text_on_the_device():
    tokens = expected(sequence("a", 4, 40))
    stop = tokens[21]
    system = System()
    system.add(made := sequence("a", 4, 40, stop_token_ids=(stop,)))
    out = system.run()
    assert out["a"] == tokens[: tokens.index(stop) + 1]
    assert made.stats().denoising_steps == len(out["a"])
    assert all(not plan.stops for plan in system.device.plans)


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
