"""A scheduler and a fake device, driven as the engine drives them; sequences for it.

Every step is launched before the result of the one before it is applied.
"""

import numpy as np
from fake_device import MASK, FakeDevice, expected_tokens

from focus_ray.engine.pages import PagePool
from focus_ray.engine.request import Sequence, SequenceState
from focus_ray.engine.scheduler import Scheduler, SchedulerLimits
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
        max_decode_tokens=None,
        num_evicted=0,
    ):
        limits = SchedulerLimits(slots, batched, B, MASK, room, rows, trace, max_decode_tokens)
        self.pool = PagePool(pages, PAGE, caching)
        self.scheduler = Scheduler(limits, self.pool)
        self.device = FakeDevice(
            self.pool,
            num_slots=slots,
            block_length=B,
            room=room,
            many=many,
            num_evicted=num_evicted,
        )
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
