"""A device without a model: slots, pages and a rule for tokens, as the scheduler sees them.

The KV of a token is one number, made from the token, its position and the KV of everything before
its block, which is read through the slot's page table as a real model reads it. Tokens are made
from the same KV. So whoever reads a page that was not written, not written for the last time, or
written for somebody else, gets other tokens than ``expected_tokens`` gives.

M slots, B block length, P pages per slot.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from focus_ray.engine.outputs import DecodingCounts
from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import PrefillChunk, SlotStart, StepPlan, StepResult, StepTrace

MASK = 99
NUM_TOKENS = 97  # ids that are decoded are below
NOTHING = -1  # in a page table
COUNTS = tuple(DecodingCounts.__dataclass_fields__)


def mix(*values) -> np.ndarray:
    """A hash of 44 bits, elementwise: sums of many stay below 2**63."""
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for value in values:
            state = (state ^ np.asarray(value).astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
            state = state ^ (state >> np.uint64(29))
    return (state >> np.uint64(20)).astype(np.int64)


def expected_tokens(prompt, max_tokens: int, block_length: int) -> list[int]:
    """What a sequence comes to, whatever runs beside it."""
    canvas, before = list(prompt), np.int64(0)
    end = len(prompt) + max_tokens
    for start in range(0, end, block_length):
        position_B = np.arange(start, start + block_length)
        known = max(len(canvas) - start, 0)
        canvas += (mix(before, position_B[known:]) % NUM_TOKENS).tolist()
        before += mix(before, position_B, canvas[start : start + block_length]).sum()
    return canvas[len(prompt) : end]


@dataclass
class Slot:
    """What the device knows of one sequence; ``start`` keeps what never changes."""

    start: SlotStart
    block_start: int
    token_ids_B: np.ndarray
    decoded_B: np.ndarray
    leftover_B: np.ndarray
    closed_ids_B: np.ndarray
    step: int
    counts: dict[str, int]
    post_steps: int = 0
    active: bool = True


class FakeDevice:
    """Runs plans at once and hands out the results when they are collected.

    Args:
        pool: the scheduler's; pages that a step writes must be held.
        room: tokens in a step; decoding slots that do not fit sit it out, in cyclic order.
        many: decode one to three tokens of a block in a step, anywhere; else the leftmost one.
        num_evicted: tokens of each block that count as evicted in each step.

    Under ``joint_threshold`` every other token is decoded wrong and edited by the next step.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        num_slots: int,
        block_length: int,
        pages_per_slot: int = 64,
        room: int = 1 << 30,
        many: bool = False,
        num_evicted: int = 0,
    ) -> None:
        self.pool, self.room, self.many, self.num_evicted = pool, room, many, num_evicted
        self.block_length, self.page_size = block_length, pool.page_size
        self.slots: list[Slot | None] = [None] * num_slots
        self.table_MP = np.full((num_slots, pages_per_slot), NOTHING)
        self.kv = mix(7, np.arange(pool.num_pages * pool.page_size))  # what nobody wrote
        self.results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.took_part: list[list[int]] = []
        self.num_deferred = 0
        self.waited_s = 0.0

    def launch(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        for slot in plan.stops:
            state = self.slots[slot]
            assert state is not None
            state.active = False
        for start in plan.starts:
            self._start(start)
        touched = [update.slot for update in plan.page_updates]
        assert len(set(touched)) == len(touched), "an entry may be written once, in any order"
        for update in plan.page_updates:
            self.table_MP[update.slot, update.first : update.first + len(update.pages)] = (
                update.pages
            )
        self.results.append(self._step(plan))

    def collect(self) -> StepResult:
        return self.results.popleft()

    def _start(self, start: SlotStart) -> None:
        before = self.slots[start.slot]
        assert before is None or not before.active, "a slot is taken that still decodes"
        none_B = np.zeros(self.block_length, bool)
        self.slots[start.slot] = Slot(
            start=start,
            block_start=start.block_start,
            token_ids_B=start.block.token_ids_B.copy(),
            decoded_B=start.block.decoded_B.copy(),
            leftover_B=none_B,
            closed_ids_B=np.full(self.block_length, MASK, np.int32),
            step=start.block.denoising_step,
            post_steps=start.block.post_steps,
            counts=dict.fromkeys(COUNTS, 0),
        )

    def _step(self, plan: StepPlan) -> StepResult:
        length, num_slots = self.block_length, len(self.slots)
        active = [m for m, state in enumerate(self.slots) if state is not None and state.active]
        present = self._that_fit(active, plan.num_prefill_tokens)
        self.took_part.append(present)
        trace = self._empty_trace()
        num_tokens = plan.num_prefill_tokens
        written: list[int] = []
        for m in present:
            state = self._at(m)
            if state.leftover_B.any():
                start = state.block_start - length
                written += self._write(m, start, state.closed_ids_B, state.leftover_B)
        for chunk in plan.prefill:
            written += self._prefill(chunk)
        for m in present:
            state = self._at(m)
            everything_B = np.ones(length, bool)
            written += self._write(m, state.block_start, state.token_ids_B, everything_B)
        assert len(set(written)) == len(written), "two tokens of a step go to one place"
        for m in present:
            num_tokens += length + int(self._at(m).leftover_B.sum())
            self._decode(m, trace)
        states = [state or self._nobody() for state in self.slots]
        zeros_MB = np.zeros((num_slots, length), np.float32)
        return StepResult(
            active_M=np.array([state.active for state in states]),
            block_start_M=np.array([state.block_start for state in states], np.int32),
            token_ids_MB=np.stack([state.token_ids_B for state in states]),
            decoded_MB=np.stack([state.decoded_B for state in states]),
            logprobs_MB=zeros_MB,
            closed_ids_MB=np.stack([state.closed_ids_B for state in states]),
            closed_logprobs_MB=zeros_MB,
            denoising_step_M=np.array([state.step for state in states], np.int32),
            post_steps_M=np.array([state.post_steps for state in states], np.int32),
            counts_MC=np.array([[*state.counts.values()] for state in states], np.int32),
            num_tokens=num_tokens,
            trace=trace if plan.record_trace else None,
        )

    def _that_fit(self, active: list[int], num_prefill_tokens: int) -> list[int]:
        """The slots that take part, from another first one in every step."""
        left = self.room - num_prefill_tokens
        first = len(self.plans) % len(self.slots)
        present = []
        for m in sorted(active, key=lambda m: (m - first) % len(self.slots)):
            left -= self.block_length + int(self._at(m).leftover_B.sum())
            if left < 0:
                break
            present.append(m)
        self.num_deferred += len(active) - len(present)
        return sorted(present)

    def _prefill(self, chunk: PrefillChunk) -> list[int]:
        starts = range(chunk.start, chunk.start + len(chunk.token_ids) + 1, self.block_length)
        written = []
        for start, end in pairwise(starts):
            token_ids_B = chunk.token_ids[start - chunk.start : end - chunk.start]
            everything_B = np.ones(self.block_length, bool)
            written += self._write(chunk.slot, start, token_ids_B, everything_B)
        return written

    def _places(self, m: int, position: np.ndarray) -> np.ndarray:
        pages = self.table_MP[m, position // self.page_size]
        assert (pages != NOTHING).all(), f"slot {m} has no pages up to {position.max()}"
        return pages * self.page_size + position % self.page_size

    def _before(self, m: int, block_start: int) -> np.int64:
        """All that stands before a block, in one number."""
        return self.kv[self._places(m, np.arange(block_start))].sum()

    def _write(self, m: int, start: int, token_ids_B, chosen_B) -> list[int]:
        position = start + np.flatnonzero(chosen_B)
        places = self._places(m, position)
        held = [self.pool._holders[page] for page in set((places // self.page_size).tolist())]
        assert min(held, default=1) > 0, f"slot {m} writes to a page that nobody holds"
        self.kv[places] = mix(self._before(m, start), position, token_ids_B[chosen_B])
        return places.tolist()

    def _decode(self, m: int, trace: StepTrace) -> None:
        state, length = self._at(m), self.block_length
        before = self._before(m, state.block_start)
        position_B = state.block_start + np.arange(length)
        is_joint = state.start.params.unmasking == "joint_threshold"
        right_B = mix(before, position_B) % NUM_TOKENS
        is_answer_B = state.decoded_B & (position_B >= state.start.prompt_len)
        edited = np.flatnonzero(is_joint & is_answer_B & (state.token_ids_B != right_B))
        masked = np.flatnonzero(~state.decoded_B)
        is_post_step = is_joint and not len(masked)
        assert len(masked) or is_post_step, "a block that is wholly decoded stayed"
        if self.many and len(masked):
            order = mix(before, position_B[masked], state.step).argsort()
            masked = masked[order[: 1 + mix(before, state.step) % 3]]
        else:
            masked = masked[:1]
        trace.took_part_M[m] = trace.processed_MB[m] = trace.retained_MB[m] = True
        trace.leftover_MB[m] = state.leftover_B
        num_processed = length + int(state.leftover_B.sum())
        for name, count in (
            ("denoising_steps", 1),
            ("processed_tokens", num_processed),
            ("retained_tokens", num_processed - self.num_evicted),
            ("decoded_tokens", len(masked)),
            ("edited_tokens", len(edited)),
        ):
            state.counts[name] += count
        state.token_ids_B[edited] = right_B[edited]
        wrong = position_B[masked] % 2 if is_joint else 0
        state.token_ids_B[masked] = (right_B[masked] + wrong) % NUM_TOKENS
        state.decoded_B[masked] = True
        state.leftover_B = np.zeros(length, bool)
        state.step += 1
        state.post_steps += is_post_step
        if is_joint and not (is_post_step and self._is_last(state, len(edited))):
            return
        if self._is_final(state):
            state.active = False
        elif state.decoded_B.all():
            state.leftover_B[masked] = True  # its KV was that of a mask
            state.leftover_B[:] |= len(edited) > 0
            state.closed_ids_B, state.block_start = state.token_ids_B, state.block_start + length
            state.token_ids_B = np.full(length, MASK, np.int32)
            state.decoded_B, state.step, state.post_steps = np.zeros(length, bool), 0, 0

    def _is_last(self, state: Slot, num_edited: int) -> bool:
        """Nothing changes any more in a block without masks."""
        most = state.start.params.max_post_steps
        assert most is not None
        return not num_edited or state.post_steps >= most

    def _is_final(self, state: Slot) -> bool:
        """A stop id or the limit is behind the contiguous decoded tokens."""
        start = state.start
        prefix = self.block_length if state.decoded_B.all() else int(state.decoded_B.argmin())
        first = max(start.prompt_len - state.block_start, 0)
        out = state.token_ids_B[first:prefix].tolist()
        assert start.params.max_tokens is not None
        limit = start.prompt_len + start.params.max_tokens
        return state.block_start + prefix >= limit or not set(start.stop_token_ids).isdisjoint(out)

    def _at(self, m: int) -> Slot:
        state = self.slots[m]
        assert state is not None
        return state

    def _nobody(self) -> Slot:
        """What a row says in which nobody ever sat; nothing of it may be believed."""
        ids_B, some_B = np.full(self.block_length, 5, np.int32), np.ones(self.block_length, bool)
        counts = dict.fromkeys(COUNTS, 1000)
        return Slot(None, 4, ids_B, some_B, some_B, ids_B, 3, counts, active=False)  # type: ignore[arg-type]

    def _empty_trace(self) -> StepTrace:
        shape = (len(self.slots), self.block_length)
        return StepTrace(
            took_part_M=np.zeros(shape[0], bool),
            processed_MB=np.zeros(shape, bool),
            retained_MB=np.zeros(shape, bool),
            leftover_MB=np.zeros(shape, bool),
            confidences_MB=np.ones(shape, np.float32),
        )
