"""The scheduler against a runner of a few lines: no model, no tensors."""

import numpy as np
import pytest

from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import StepResult
from focus_ray.engine.request import Sequence, SequenceState
from focus_ray.engine.scheduler import Scheduler, SchedulerLimits
from focus_ray.sampling import SamplingParams

B, MASK, PAGE = 4, 99, 8


class FakeRunner:
    """Decodes the leftmost masked token of every block; its value is its absolute position."""

    def __init__(self):
        self.blocks = {}

    def run(self, plan):
        for start in plan.starts:
            block = start.block
            self.blocks[start.slot] = [
                start.block_start,
                block.token_ids_B.copy(),
                block.decoded_B.copy(),
            ]
        ids, decoded = [], []
        for slot in plan.decode_slots_N:
            first, token_ids, known = self.blocks[slot]
            committed = known.all()
            if not committed:
                where = known.argmin()
                token_ids[where], known[where] = first + where, True
            ids.append(token_ids.copy())
            decoded.append(known.copy())
            if committed:
                self.blocks[slot] = [first + B, np.full(B, MASK, np.int32), np.zeros(B, bool)]
        n = len(plan.decode_slots_N)
        return StepResult(
            np.array(ids, np.int32).reshape(n, B),
            np.array(decoded, bool).reshape(n, B),
            np.ones((n, B), np.float32),
            np.zeros((n, B), np.float32),
            np.ones((n, B), bool),
            np.ones((n, B), bool),
        )


def sequence(name, prompt_len, max_tokens=8, prompt_value=None):
    blocks = -(-(prompt_len + max_tokens) // B)
    canvas = np.zeros(blocks * B, np.int32)
    canvas[:prompt_len] = np.arange(prompt_len) if prompt_value is None else prompt_value
    made = Sequence(
        request_id=name,
        index=0,
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        seed=0,
        prompt_len=prompt_len,
        canvas=canvas,
        block_length=B,
        stop_token_ids=frozenset(),
    )
    made.num_committed = prompt_len // B * B
    return made


def scheduler(*, slots=4, pages=32, batched=64, caching=True, trace=False):
    limits = SchedulerLimits(slots, batched, B, MASK, trace)
    return Scheduler(limits, PagePool(pages, PAGE, caching))


def drive(sched, runner, *, max_steps=500, on_step=None):
    """Run to the end, as the engine does; returns the emitted tokens of each request."""
    out = {}
    for step in range(max_steps):
        if not sched.has_unfinished():
            return out
        if on_step:
            on_step(step)
        plan = sched.plan()
        assert not plan.is_empty(), "nothing runs although something waits"
        for new in sched.apply(plan, runner.run(plan)):
            tokens = out.setdefault(new.sequence.request_id, [])
            tokens += new.token_ids
            if len(tokens) == new.sequence.params.max_tokens:
                sched.finish(new.sequence)
    raise AssertionError(f"not done after {max_steps} steps")


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens"),
    [
        pytest.param(1, 1, id="one token in, one out"),
        pytest.param(8, 8, id="whole blocks"),
        pytest.param(9, 3, id="partial first block, limit inside it"),
        pytest.param(3, 30, id="many blocks"),
    ],
)
def test_tokens_come_out_in_order(prompt_len, max_tokens):
    sched = scheduler()
    sched.add(sequence("a", prompt_len, max_tokens))
    out = drive(sched, FakeRunner())
    assert out["a"] == list(range(prompt_len, prompt_len + max_tokens))
    assert sched.pool.num_free == 32


def test_sequences_at_different_steps_share_a_pass_and_places_are_refilled_at_once():
    sched, runner = scheduler(slots=2), FakeRunner()
    for name, length in (("a", 4), ("b", 6), ("c", 4)):
        sched.add(sequence(name, 0 if name == "x" else 2, length))
    sizes = []
    while sched.has_unfinished():
        plan = sched.plan()
        sizes.append(len(plan.decode_slots_N))
        for new in sched.apply(plan, runner.run(plan)):
            if new.sequence.num_emitted == new.sequence.params.max_tokens:
                sched.finish(new.sequence)
    # c takes a's place in the very next step: no step runs one sequence while another waits
    assert sizes.index(1) > 5
    assert set(sizes[: sizes.index(1)]) == {2}


def test_prefill_is_chunked_and_shares_steps_with_decoding():
    sched, runner = scheduler(batched=16), FakeRunner()
    sched.add(sequence("short", 1, 20))
    sched.apply(plan := sched.plan(), runner.run(plan))
    sched.add(sequence("long", 40, 4))
    plan = sched.plan()
    assert len(plan.decode_slots_N) == 1
    assert [len(c.token_ids) for c in plan.prefill] == [12]  # 16 less the decoding block
    starts = []
    for _ in range(4):
        starts += [c.start for c in plan.prefill]
        sched.apply(plan, runner.run(plan))
        plan = sched.plan()
    assert starts == [0, 12, 24, 36]
    assert len(plan.decode_slots_N) == 2


def test_prefill_progresses_even_when_decoding_fills_the_budget():
    sched, runner = scheduler(batched=4), FakeRunner()
    sched.add(sequence("a", 1, 20))
    sched.apply(plan := sched.plan(), runner.run(plan))
    sched.add(sequence("b", 12, 4))
    assert [len(c.token_ids) for c in sched.plan().prefill] == [4]


def test_cached_prefix_is_not_prefilled_again():
    sched, runner = scheduler(), FakeRunner()
    sched.add(sequence("a", 20, 4))
    drive(sched, runner)
    again = sequence("b", 20, 4)
    sched.add(again)
    plan = sched.plan()
    assert again.cached_prefix_tokens == 16  # two whole pages
    assert [(c.start, len(c.token_ids)) for c in plan.prefill] == [(16, 4)]


def test_equal_prompts_admitted_together_are_computed_once():
    sched, runner = scheduler(batched=20, pages=64), FakeRunner()
    made = [sequence(str(i), 42, 4) for i in range(4)]
    for item in made:
        sched.add(item)
    out = drive(sched, runner)
    assert [item.prefill_tokens for item in made] == [40, 0, 0, 0]
    assert [item.cached_prefix_tokens for item in made] == [0, 40, 40, 40]
    assert all(tokens == [42, 43, 44, 45] for tokens in out.values())
    assert sched.pool.num_free == 64


def test_sharing_stops_where_prompts_part():
    sched, runner = scheduler(batched=16, pages=64), FakeRunner()
    first, second = sequence("first", 40, 4), sequence("second", 40, 4)
    second.canvas[20] = 77
    for item in (first, second):
        sched.add(item)
    pages = set()
    while sched.has_unfinished():
        plan = sched.plan()
        for item in (first, second):
            assert len(set(item.pages)) == len(item.pages)
        pages = set(first.pages) & set(second.pages) or pages
        for new in sched.apply(plan, runner.run(plan)):
            if new.sequence.num_emitted == 4:
                sched.finish(new.sequence)
    assert len(pages) == 2
    assert (second.cached_prefix_tokens, second.prefill_tokens) == (16, 24)
    assert sched.pool.num_free == 64


def test_generated_blocks_are_cached_too():
    sched, runner = scheduler(), FakeRunner()
    sched.add(sequence("a", 4, 16))
    out = drive(sched, runner)
    follow_up = sequence("b", 20, 4)
    follow_up.canvas[4:20] = out["a"]
    sched.add(follow_up)
    sched.plan()
    # the last block was never committed; positions 0 to 15 were
    assert follow_up.cached_prefix_tokens == 16


@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no cache"])
def test_preemption_loses_nothing_and_returns_every_page(caching):
    sched, runner = scheduler(slots=4, pages=8, caching=caching), FakeRunner()
    for i, name in enumerate("abcd"):
        sched.add(sequence(name, 5, 40, prompt_value=i))
    out = drive(sched, runner, max_steps=5000)
    assert sched.num_preemptions > 0
    for name in "abcd":
        assert out[name] == list(range(5, 45))
    assert sched.pool.num_free == 8


def test_the_oldest_keeps_its_place_and_the_youngest_yields():
    sched, runner = scheduler(slots=2, pages=4), FakeRunner()
    old, young = sequence("old", 8, 16, 1), sequence("young", 8, 16, 2)
    sched.add(old)
    sched.add(young)
    while sched.num_preemptions == 0:
        sched.apply(plan := sched.plan(), runner.run(plan))
    assert old.state is SequenceState.DECODING
    assert young.state is SequenceState.WAITING
    assert sched.waiting[0] is young


def test_decoded_tokens_survive_preemption():
    sched, runner = scheduler(slots=2, pages=4), FakeRunner()
    sched.add(sequence("old", 8, 16, 1))
    sched.add(young := sequence("young", 1, 16, 2))
    while sched.num_preemptions == 0:
        sched.apply(plan := sched.plan(), runner.run(plan))
    saved = young.saved_block
    assert saved is not None
    assert saved.denoising_step == saved.decoded_B.sum() == 2  # in the middle of a block
    start = young.num_committed
    assert saved.token_ids_B[:2].tolist() == [start, start + 1]
    assert young.num_emitted == start + 2 - young.prompt_len


@pytest.mark.parametrize("when", [0, 1, 2, 7], ids=["waiting", "prefill", "decode", "later"])
def test_finishing_at_any_time_frees_everything(when):
    sched, runner = scheduler(batched=8), FakeRunner()
    made = sequence("a", 12, 30)
    sched.add(made)
    for _ in range(when):
        sched.apply(plan := sched.plan(), runner.run(plan))
    sched.finish(made)
    assert sched.pool.num_free == 32
    assert not sched.has_unfinished()
    assert sched.plan().is_empty()


def test_random_aborts_under_pressure_return_the_pool_to_its_start():
    rng = np.random.default_rng(1)
    sched, runner = scheduler(slots=3, pages=9), FakeRunner()
    live = {}
    for i in range(60):
        live[i] = sequence(str(i), int(rng.integers(1, 20)), int(rng.integers(1, 40)), i % 5)
        sched.add(live[i])

    def abort_some(step):
        if rng.random() < 0.05:
            waiting_or_running = [s for s in live.values() if s.state is not SequenceState.FINISHED]
            if waiting_or_running:
                sched.finish(waiting_or_running[rng.integers(len(waiting_or_running))])

    drive(sched, runner, max_steps=20_000, on_step=abort_some)
    assert sched.num_preemptions > 0
    assert sched.pool.num_free == 9
    assert sched.num_free_slots == 3


def test_a_trace_lists_every_step():
    sched, runner = scheduler(trace=True), FakeRunner()
    made = sequence("a", 6, 6)
    sched.add(made)
    drive(sched, runner)
    assert [step.positions for step in made.trace] == [(6,), (7,), (), (8,), (9,), (10,), (11,)]
    assert [len(step.masked) for step in made.trace] == [2, 1, 0, 4, 3, 2, 1]
    assert [step.is_commit for step in made.trace] == [False] * 2 + [True] + [False] * 4
    assert [step.block_start for step in made.trace] == [4, 4, 4, 8, 8, 8, 8]
    assert made.trace[1].retained == (4, 5, 6, 7)
    assert made.trace[4].masked_confidences == (1.0, 1.0, 1.0)


def test_counts_are_of_this_sequence():
    sched, runner = scheduler(), FakeRunner()
    made = sequence("a", 8, 8)
    sched.add(made)
    sched.add(sequence("b", 2, 2))
    drive(sched, runner)
    stats = made.stats()
    assert stats.denoising_steps == stats.decoded_tokens == 8
    assert stats.committed_blocks == 1  # the last block ends the sequence instead
    assert stats.processed_tokens == 9 * B  # eight denoising steps and one commit
    assert stats.prefill_tokens == 8
