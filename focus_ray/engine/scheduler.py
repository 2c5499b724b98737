"""Who runs in the next step, and what the answers of the device mean for each sequence.

Holds no tensors and draws no samples. A step is planned while the one before it runs: what is known
is what the step before that one answered. Mirrors of the device's blocks are NumPy arrays over
slots (``slots.py``), so that planning and taking up a step need no loop over sequences; loops run
only over the few that are admitted, prefilled, preempted, close a block or emit tokens.

Pages and slots that a sequence gives up are free at once, although a step that still writes to them
may be in flight. That is safe because all steps run in order on one stream: whoever gets such a
page or slot next is in a step that is launched later. What that earlier step says of a slot's
former occupant is recognised by the number of its admission, and dropped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from focus_ray.engine.emission import NewTokens, emit
from focus_ray.engine.occupancy import (
    STEPS,
    EnginePace,
    Forecast,
    SlotPaces,
    places_left,
    tokens_to_process,
)
from focus_ray.engine.outputs import DecodingCounts
from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import PageUpdate, PrefillChunk, SlotStart, StepPlan, StepResult
from focus_ray.engine.recording import record_alternatives, record_trace
from focus_ray.engine.request import Sequence, SequenceState
from focus_ray.engine.slots import (
    NOBODY,
    WANTS_FILTERED,
    WANTS_SAMPLED,
    WANTS_SUPPRESSED,
    WANTS_TOP,
    Slots,
)


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes a scheduler works within; all in tokens, sequences or pages.

    Args:
        max_num_batched_tokens: a step's tokens, prefill and decoding together, to aim at.
        max_step_tokens: a step's tokens that there is room for, at least three blocks; what does
            not fit of the decoding ones, the device puts off to the next step.
        max_prefill_rows: blocks of prefill in a step that there is room for, at least one.
        max_decode_tokens: what the decoding sequences of a step may be predicted to process
            together before more are admitted; None: slots and pages alone decide.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    block_length: int
    mask_token_id: int
    max_step_tokens: int
    max_prefill_rows: int
    record_trace: bool = False
    max_decode_tokens: float | None = None


@dataclass(frozen=True)
class _InFlight:
    """What must be remembered of a step until its result is there.

    Args:
        decoding_M: number of admission of the sequence that decodes in each slot, or ``NOBODY``.
    """

    decoding_M: NDArray[np.int64]
    num_starts: int
    num_prefill_tokens: int


class Scheduler:
    """Continuous batching at the granularity of a denoising step.

    Decoding sequences take part in every step; what is left of the token budget goes to prefill in
    order of admission, at least one block a step, so that neither starves. When pages run out the
    sequence admitted last gives up its place and waits at the front; the one admitted first can
    take every page, so something always progresses.
    """

    def __init__(self, limits: SchedulerLimits, pool: PagePool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._slots = Slots(limits.max_num_seqs, limits.block_length, limits.mask_token_id)
        self._stops: list[int] = []
        self._in_flight: deque[_InFlight] = deque()
        self._num_decode_tokens = 0  # of the last step that is known
        self._total_C = np.zeros(self._slots.counts_MC.shape[1], np.int64)
        self._paces = SlotPaces(limits.max_num_seqs)
        self._engine_pace = EnginePace(limits.block_length)
        self._waiting_prefill = 0  # tokens, of all that wait; and what they may still emit
        self._waiting_output = 0

    @property
    def num_running(self) -> int:
        return self._slots.num_taken

    @property
    def num_free_slots(self) -> int:
        return self._slots.num_free

    @property
    def num_free_places(self) -> int:
        """Sequences that could be admitted now, if there are pages for them."""
        most = self.limits.max_decode_tokens
        if most is None:
            return self.num_free_slots
        forecast = self.forecast()
        places = places_left(
            most - forecast.next_step_tokens,
            forecast.tokens_per_sequence,
            anybody_runs=self.num_running > 0,
        )
        return min(places, self.num_free_slots)

    @property
    def num_in_flight(self) -> int:
        """Planned steps whose results have not been applied."""
        return len(self._in_flight)

    @property
    def counts(self) -> DecodingCounts:
        """What all sequences together have computed so far."""
        return DecodingCounts.from_array(self._total_C)

    def forecast(self) -> Forecast:
        """What is predicted of the sequences that run and wait.

        Waiting tokens are those of a step, were all admitted that wait: by as many as the average
        of a sequence, and prefill as far as a step may aim at it.
        """
        slots, pace = self._slots, self._engine_pace.now
        processed_M, decoded_M = self._paces.predicted(slots.counts_MC[:, STEPS], pace)
        left_M = np.where(slots.taken_M, slots.limit_M - slots.emitted_end_M, 0)
        prefill = int(slots.to_prefill_M.sum()) + self._waiting_prefill
        return Forecast(
            next_step_tokens=float(processed_M[slots.taken_M].sum()),
            waiting_tokens=len(self.waiting) * pace.processed
            + min(prefill, self.limits.max_num_batched_tokens),
            remaining_tokens=tokens_to_process(left_M, processed_M, decoded_M)
            + self._waiting_output * pace.processed / pace.decoded
            + prefill,
            tokens_per_sequence=pace.processed,
            retained_ratio=pace.processed / pace.entered,
            decoded_per_step=pace.decoded,
        )

    def has_unfinished(self) -> bool:
        """Whether a sequence waits or runs, or a result is due."""
        return bool(self.waiting or self._in_flight) or self.num_running > 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._count_waiting(sequence, 1)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; its slot and pages are free at once."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
            self._count_waiting(sequence, -1)
        elif sequence.slot >= 0:
            self._stop(sequence.slot)
            self._slots.vacate(sequence.slot)
        self.pool.free(sequence.finish())

    def _count_waiting(self, sequence: Sequence, change: int) -> None:
        """Of one that comes to wait (1), or is about to leave (-1)."""
        self._waiting_prefill += change * sequence.remaining_prefill
        self._waiting_output += change * sequence.num_left

    # --- planning -----------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step, which must be launched; None when there is nothing to run."""
        slots = self._slots
        over_M = slots.decoding_M & ~slots.active_M
        assert not over_M.any(), f"texts that only the device took to be final: {over_M.nonzero()}"
        starts: list[SlotStart] = []
        changed: dict[int, int] = {}  # by slot, the first entry of its page table that changes
        if self._grow(changed):
            self._admit(starts, changed)
        prefill = self._prefill(starts, changed)
        decoding_M = slots.decoding_M
        if not prefill and not decoding_M.any():
            return None  # stops wait for the next plan: the device does nothing until then
        stops, self._stops = self._stops, []
        wants = slots.wants_M4[decoding_M].max(axis=0, initial=0)
        plan = StepPlan(
            stops=stops,
            starts=starts,
            page_updates=[
                PageUpdate(slot, first, slots.sequence(slot).pages[first:])
                for slot, first in changed.items()
                if slots.is_taken(slot)  # it may have been preempted after it got a page
            ],
            prefill=prefill,
            num_top_logprobs=int(wants[WANTS_TOP]) - 1 if wants[WANTS_TOP] else None,
            any_sampled=bool(wants[WANTS_SAMPLED]),
            any_filtered=bool(wants[WANTS_FILTERED]),
            any_suppressed=bool(wants[WANTS_SUPPRESSED]),
            record_trace=self.limits.record_trace,
        )
        decoding_now_M = np.where(decoding_M, slots.admitted_M, NOBODY)
        self._in_flight.append(_InFlight(decoding_now_M, len(starts), plan.num_prefill_tokens))
        return plan

    def _grow(self, changed: dict[int, int]) -> bool:
        """Give decoding sequences room for all they may write; False when one was preempted."""
        slots, page_size = self._slots, self.pool.page_size
        end_M = slots.may_write_to()
        preempted = False
        for slot in slots.in_order_of_admission(slots.decoding_M & (end_M > slots.capacity_M)):
            while slots.is_taken(slot) and end_M[slot] > slots.capacity_M[slot]:
                if not self.pool.num_free:
                    self._preempt(slots.youngest())
                    preempted = True
                    continue
                sequence = slots.sequence(slot)
                changed.setdefault(slot, len(sequence.pages))
                sequence.pages += self.pool.allocate(1)
                slots.capacity_M[slot] += page_size
        return not preempted

    def _preempt(self, slot: int) -> None:
        """Take a sequence out; what the step in flight does for it is lost, and done again."""
        self._stop(slot)
        sequence = self._slots.sequence(slot)
        block = self._slots.snapshot(slot)
        self._slots.vacate(slot)
        self.pool.free(sequence.preempt(block))
        self.waiting.appendleft(sequence)
        self._count_waiting(sequence, 1)
        self.num_preemptions += 1

    def _stop(self, slot: int) -> None:
        """Before a slot is vacated: tell the device, unless it has said so itself."""
        if self._slots.active_M[slot]:
            self._stops.append(slot)

    def _admit(self, starts: list[SlotStart], changed: dict[int, int]) -> None:
        page_size, num_places = self.pool.page_size, self.num_free_places
        while self.waiting and num_places:
            sequence = self.waiting[0]
            match = self.pool.match(sequence.canvas[: sequence.num_committed])
            end = min(sequence.num_committed + 2 * self.limits.block_length, len(sequence.canvas))
            missing = -(-end // page_size) - len(match.pages)
            if missing > self.pool.num_free:
                self.pool.free(match.pages)
                return
            self.waiting.popleft()
            self._count_waiting(sequence, -1)
            num_places -= 1
            slot = self._slots.reserve()
            pages = match.pages + self.pool.allocate(missing)
            cached_tokens = len(match.pages) * page_size
            sequence.admit(slot, pages, cached_tokens, match.node)
            sequence.num_registered_pages = len(match.pages)
            self.num_cached_tokens += cached_tokens
            changed[slot] = 0
            self._slots.occupy(sequence, len(pages) * page_size)
            if not sequence.remaining_prefill:
                starts.append(self._start(sequence))

    def _prefill(self, starts: list[SlotStart], changed: dict[int, int]) -> list[PrefillChunk]:
        """The chunks of the step; who has nothing left to prefill behind them starts in it too.

        A chunk counts as computed as soon as it is planned: whoever reads its KV does so in a later
        step or, since all KV of a layer is written before any is read, in this one.
        """
        block_length = self.limits.block_length
        budget = self._prefill_budget(len(starts))
        chunks = []
        for slot in self._slots.in_order_of_admission(self._slots.prefilling_M):
            if budget < block_length:
                break
            sequence = self._slots.sequence(slot)
            self._share_prefix(sequence, changed)
            length = min(sequence.remaining_prefill, budget // block_length * block_length)
            if length:
                first = sequence.num_computed
                token_ids = sequence.canvas[first : first + length]
                chunks.append(PrefillChunk(slot, first, token_ids))
                sequence.computed(length)
                self._register_pages(sequence)
                budget -= length
            self._slots.to_prefill_M[slot] = sequence.remaining_prefill
            if not sequence.remaining_prefill:
                starts.append(self._start(sequence))
                budget -= block_length
        return chunks

    def _prefill_budget(self, num_starts: int) -> int:
        """Tokens of prefill: what decoding is likely to leave, at least a block.

        Decoding is taken to need what it last did, and whole blocks for whoever started since. Two
        blocks of what a step can hold are never taken away from it.
        """
        limits, block_length = self.limits, self.limits.block_length
        num_starts += sum(step.num_starts for step in self._in_flight)
        left = limits.max_num_batched_tokens - self._num_decode_tokens - num_starts * block_length
        return min(
            max(left, block_length),
            limits.max_step_tokens - 2 * block_length,
            limits.max_prefill_rows * block_length,
        )

    def _share_prefix(self, sequence: Sequence, changed: dict[int, int]) -> None:
        """A prefilling sequence takes over what others computed since it was admitted.

        Completions of one prompt are admitted together: the first computes it, the rest share it.
        """
        if sequence.num_computed % self.pool.page_size:
            return  # in the middle of a page of its own
        rest = sequence.canvas[sequence.num_computed : sequence.num_committed]
        match = self.pool.match(rest, sequence.prefix_node)
        if match.pages:
            changed.setdefault(sequence.slot, sequence.num_registered_pages)
            num_tokens = len(match.pages) * self.pool.page_size
            self.pool.free(sequence.share(match, num_tokens))
            self.num_cached_tokens += num_tokens

    def _start(self, sequence: Sequence) -> SlotStart:
        slots, slot = self._slots, sequence.slot
        slots.registered_end_M[slot] = sequence.num_registered_pages * self.pool.page_size
        return slots.start(slot)

    def _register_pages(self, sequence: Sequence) -> None:
        """Make pages whose every token is computed and final findable."""
        size = self.pool.page_size
        for index in range(sequence.num_registered_pages, sequence.num_computed // size):
            tokens = sequence.canvas[index * size : (index + 1) * size]
            sequence.prefix_node = self.pool.register(
                sequence.pages[index], sequence.prefix_node, tokens
            )
            sequence.num_registered_pages += 1

    # --- applying -----------------------------------------------------------------------------

    def apply(self, result: StepResult) -> list[NewTokens]:
        """Take up the oldest step in flight; returns what became final, an entry per sequence."""
        launched = self._in_flight.popleft()
        self._num_decode_tokens = result.num_tokens - launched.num_prefill_tokens
        slots = self._slots
        after = slots.compare(result, launched.decoding_M)
        counted_C = after.counted_MC.sum(0)
        self._total_C += counted_C
        record_alternatives(slots, after, result)
        record_trace(slots, after, result)
        emitted = emit(slots, after)
        for slot in np.flatnonzero(after.closed_M).tolist():
            slots.sequence(slot).close_block(after.token_ids_MB[slot])
        self._register_final(after.took_part_M)
        slots.take(result, after)
        self._paces.take(after.counted_MC, slots.counts_MC[:, STEPS])
        self._engine_pace.take(counted_C)
        return emitted

    def _register_final(self, took_part_M: NDArray[np.bool_]) -> None:
        """Register the pages that became full and final before the current blocks.

        What is left over of a closed block is computed with the next step that its sequence takes
        part in, which the device may put off, or the host may prevent by ending the sequence. So a
        page is registered only when such a step is behind: then, all that stands left of the block
        which it decoded from is final, and no step in flight writes to it again.
        """
        slots = self._slots
        final_M = slots.block_start_M  # as before the step
        due_M = took_part_M & (final_M - slots.registered_end_M >= self.pool.page_size)
        for slot in np.flatnonzero(due_M).tolist():
            sequence = slots.sequence(slot)
            sequence.num_computed = int(final_M[slot])
            self._register_pages(sequence)
            slots.registered_end_M[slot] = sequence.num_registered_pages * self.pool.page_size
