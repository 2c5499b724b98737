"""Who runs in the next step, and what the answers of the device mean for each sequence.

Holds no tensors and draws no samples. Mirrors of the device's blocks are NumPy arrays over slots
(``slots.py``), so that planning and applying a step take no loop over sequences; loops run only
over the few that are admitted, prefilled, preempted, commit a page or emit tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from focus_ray.engine.counting import COUNT_NAMES, as_counts, count_step
from focus_ray.engine.outputs import DecodingCounts, TokenLogprob
from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import PageUpdate, PrefillChunk, SlotStart, StepPlan, StepResult
from focus_ray.engine.recording import record_alternatives, record_trace
from focus_ray.engine.request import Sequence, SequenceState
from focus_ray.engine.slots import (
    WANTS_FILTERED,
    WANTS_SAMPLED,
    WANTS_SUPPRESSED,
    WANTS_TOP,
    Slots,
)


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes a scheduler works within; all in tokens, sequences or pages."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_length: int
    mask_token_id: int
    record_trace: bool = False


@dataclass(frozen=True)
class NewTokens:
    """Tokens of one sequence that became final and contiguous in a step."""

    sequence: Sequence
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


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
        self._total_C = np.zeros(len(COUNT_NAMES), np.int64)

    @property
    def num_running(self) -> int:
        return self._slots.num_taken

    @property
    def num_free_slots(self) -> int:
        return self._slots.num_free

    @property
    def counts(self) -> DecodingCounts:
        """What all sequences together have computed so far."""
        return as_counts(self._total_C)

    def has_unfinished(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; its slot and pages are free at once."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif sequence.slot >= 0:
            self._slots.vacate(sequence.slot)
        self.pool.free(sequence.finish())

    # --- planning -----------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """Decide the next step; empty when nothing can run."""
        starts: list[SlotStart] = []
        updates: list[PageUpdate] = []
        if self._grow(updates):
            self._admit(starts, updates)
        self._share_prefixes(updates)
        slots_N = np.flatnonzero(self._slots.decoding_M)
        prefill = self._prefill_chunks(len(slots_N) * self.limits.block_length)
        decode_end = self._slots.block_start_M[slots_N].max(initial=0)
        if len(slots_N):
            decode_end += self.limits.block_length
        prefill_end = max((c.start + len(c.token_ids) for c in prefill), default=0)
        wants = self._slots.wants_M4[slots_N].max(axis=0, initial=0)
        return StepPlan(
            starts=starts,
            page_updates=updates,
            decode_slots_N=slots_N,
            prefill=prefill,
            max_kv_len=int(max(decode_end, prefill_end)),
            num_top_logprobs=int(wants[WANTS_TOP]) - 1 if wants[WANTS_TOP] else None,
            any_sampled=bool(wants[WANTS_SAMPLED]),
            any_filtered=bool(wants[WANTS_FILTERED]),
            any_suppressed=bool(wants[WANTS_SUPPRESSED]),
            record_deltas=self.limits.record_trace,
        )

    def _grow(self, updates: list[PageUpdate]) -> bool:
        """Give every decoding sequence room for its block; False when one had to be preempted."""
        end_M = self._slots.block_start_M + self.limits.block_length
        short = np.flatnonzero(self._slots.decoding_M & (end_M > self._slots.capacity_M))
        preempted = False
        for slot in short[np.argsort(self._slots.admitted_M[short])]:
            while self._slots.is_taken(slot) and not self.pool.num_free:
                self._preempt(self._slots.youngest())
                preempted = True
            if self._slots.is_taken(slot):
                sequence = self._slots.sequence(slot)
                pages = self.pool.allocate(1)
                updates.append(PageUpdate(int(slot), len(sequence.pages), pages))
                sequence.pages += pages
                self._slots.capacity_M[slot] += self.pool.page_size
        # pages given to a sequence that was preempted after it
        updates[:] = [u for u in updates if self._slots.is_taken(u.slot)]
        return not preempted

    def _preempt(self, slot: int) -> None:
        sequence = self._slots.sequence(slot)
        block = self._slots.vacate(slot)
        self.pool.free(sequence.preempt(block))
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, starts: list[SlotStart], updates: list[PageUpdate]) -> None:
        while self.waiting and self._slots.num_free:
            sequence = self.waiting[0]
            match = self.pool.match(sequence.canvas[: sequence.num_committed])
            needed = -(-(sequence.num_committed + self.limits.block_length) // self.pool.page_size)
            missing = needed - len(match.pages)
            if missing > self.pool.num_free:
                self.pool.free(match.pages)
                return
            self.waiting.popleft()
            slot = self._slots.reserve()
            pages = match.pages + self.pool.allocate(missing)
            cached_tokens = len(match.pages) * self.pool.page_size
            sequence.admit(slot, pages, cached_tokens, match.node)
            self.num_cached_tokens += cached_tokens
            sequence.num_registered_pages = len(match.pages)
            updates.append(PageUpdate(slot, 0, pages))
            starts.append(self._slots.occupy(sequence, len(pages) * self.pool.page_size))

    def _share_prefixes(self, updates: list[PageUpdate]) -> None:
        """Prefilling sequences take over what others computed since they were admitted.

        Completions of one prompt are admitted together: the first computes it, the rest share it.
        """
        for slot in np.flatnonzero(self._slots.prefilling_M).tolist():
            sequence = self._slots.sequence(slot)
            if sequence.num_computed % self.pool.page_size:
                continue  # in the middle of a page of its own
            rest = sequence.canvas[sequence.num_computed : sequence.num_committed]
            match = self.pool.match(rest, sequence.prefix_node)
            if match.pages:
                first = sequence.num_registered_pages
                num_tokens = len(match.pages) * self.pool.page_size
                self.pool.free(sequence.share(match, num_tokens))
                self.num_cached_tokens += num_tokens
                updates.append(PageUpdate(slot, first, match.pages))
                self._slots.set_phase(sequence)

    def _prefill_chunks(self, num_decode_tokens: int) -> list[PrefillChunk]:
        block_length = self.limits.block_length
        budget = max(self.limits.max_num_batched_tokens - num_decode_tokens, block_length)
        chunks = []
        prefilling = np.flatnonzero(self._slots.prefilling_M)
        for slot in prefilling[np.argsort(self._slots.admitted_M[prefilling])]:
            sequence = self._slots.sequence(slot)
            length = min(sequence.remaining_prefill, budget // block_length * block_length)
            if not length:
                break
            start = sequence.num_computed
            token_ids = sequence.canvas[start : start + length]
            chunks.append(PrefillChunk(int(slot), start, token_ids))
            budget -= length
        return chunks

    # --- applying -----------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult) -> list[NewTokens]:
        """Take up the blocks after a step; returns what became final, one entry per sequence."""
        slots, slots_N = self._slots, plan.decode_slots_N
        before_NB = slots.decoded_MB[slots_N]
        committed_N = before_NB.all(1)
        newly_NB = result.decoded_NB & ~before_NB
        record_alternatives(slots, plan, result)
        if self.limits.record_trace:
            record_trace(slots, plan, result)

        slots.token_ids_MB[slots_N] = result.token_ids_NB
        slots.decoded_MB[slots_N] = result.decoded_NB
        slots.logprobs_MB[slots_N] = np.where(
            newly_NB, result.logprobs_NB, slots.logprobs_MB[slots_N]
        )
        slots.step_M[slots_N] += 1
        counts_NC = count_step(before_NB, result)
        slots.counts_MC[slots_N] += counts_NC
        self._total_C += counts_NC.sum(0)

        emitted = self._emit(slots_N)
        for slot in slots_N[committed_N]:
            self._commit(int(slot))
        for chunk in plan.prefill:
            sequence = self._slots.sequence(chunk.slot)
            sequence.computed(len(chunk.token_ids))
            self._register_pages(sequence)
            self._slots.set_phase(sequence)
        return emitted

    def _emit(self, slots_N: np.ndarray) -> list[NewTokens]:
        """The contiguous decoded prefix of each block, as far as it was not emitted yet."""
        slots = self._slots
        decoded_NB = slots.decoded_MB[slots_N]
        prefix_N = np.where(decoded_NB.all(1), self.limits.block_length, decoded_NB.argmin(1))
        end_N = np.minimum(slots.block_start_M[slots_N] + prefix_N, slots.limit_M[slots_N])
        start_N = slots.emitted_end_M[slots_N]
        emitted = []
        for row in np.flatnonzero(end_N > start_N):
            slot, start, end = slots_N[row], int(start_N[row]), int(end_N[row])
            sequence = slots.sequence(slot)
            first = int(slots.block_start_M[slot])
            token_ids = slots.token_ids_MB[slot, start - first : end - first].tolist()
            logprobs = None
            if sequence.params.logprobs is not None:
                values = slots.logprobs_MB[slot, start - first : end - first].tolist()
                logprobs = [
                    TokenLogprob(token, value, sequence.top_logprobs.pop(start + i, ()))
                    for i, (token, value) in enumerate(zip(token_ids, values, strict=True))
                ]
            sequence.num_emitted += len(token_ids)
            slots.emitted_end_M[slot] = end
            emitted.append(NewTokens(sequence, token_ids, logprobs))
        return emitted

    def _commit(self, slot: int) -> None:
        sequence = self._slots.sequence(slot)
        sequence.commit(self._slots.token_ids_MB[slot])
        self._slots.next_block(slot)
        self._register_pages(sequence)

    def _register_pages(self, sequence: Sequence) -> None:
        """Make pages whose every token is computed and final findable."""
        size = self.pool.page_size
        for index in range(sequence.num_registered_pages, sequence.num_computed // size):
            tokens = sequence.canvas[index * size : (index + 1) * size]
            sequence.prefix_node = self.pool.register(
                sequence.pages[index], sequence.prefix_node, tokens
            )
            sequence.num_registered_pages += 1
