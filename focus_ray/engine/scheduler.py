"""Who runs in the next step, and what the answers of the device mean for each sequence.

Holds no tensors and draws no samples. Mirrors of the device's blocks are NumPy arrays over slots
(M slots, B block length), so that planning and applying a step take no loop over sequences; loops
run only over the few that are admitted, prefilled, preempted, commit a page or emit tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from focus_ray.engine.outputs import DenoisingStep, TokenLogprob
from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import (
    BlockSnapshot,
    PageUpdate,
    PrefillChunk,
    SlotStart,
    StepPlan,
    StepResult,
)
from focus_ray.engine.request import Sequence, SequenceState


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
        self.num_decoded_tokens = 0
        self.num_cached_tokens = 0
        m, b = limits.max_num_seqs, limits.block_length
        self._running: list[Sequence | None] = [None] * m
        self._free_slots = list(range(m - 1, -1, -1))
        self._admissions = 0
        self._admitted_M = np.zeros(m, np.int64)
        self._decoding_M = np.zeros(m, np.bool_)
        self._prefilling_M = np.zeros(m, np.bool_)
        self._block_start_M = np.zeros(m, np.int64)
        self._capacity_M = np.zeros(m, np.int64)
        self._emitted_end_M = np.zeros(m, np.int64)
        self._limit_M = np.zeros(m, np.int64)
        self._step_M = np.zeros(m, np.int64)
        self._denoised_M = np.zeros((m, 4), np.int64)
        self._wants_M = np.zeros((m, 4), np.int64)
        self._token_ids_MB = np.zeros((m, b), np.int32)
        self._decoded_MB = np.zeros((m, b), np.bool_)
        self._logprobs_MB = np.zeros((m, b), np.float32)

    @property
    def num_running(self) -> int:
        return self.limits.max_num_seqs - len(self._free_slots)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def has_unfinished(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; its slot and pages are free at once."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif sequence.slot >= 0:
            self._settle_counts(sequence)
            self._vacate(sequence.slot)
        self.pool.free(sequence.finish())

    # --- planning -----------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """Decide the next step; empty when nothing can run."""
        starts: list[SlotStart] = []
        updates: list[PageUpdate] = []
        if self._grow(updates):
            self._admit(starts, updates)
        self._share_prefixes(updates)
        slots_N = np.flatnonzero(self._decoding_M)
        prefill = self._prefill_chunks(len(slots_N) * self.limits.block_length)
        decode_end = self._block_start_M[slots_N].max(initial=0)
        if len(slots_N):
            decode_end += self.limits.block_length
        prefill_end = max((c.start + len(c.token_ids) for c in prefill), default=0)
        wants = self._wants_M[slots_N].max(axis=0, initial=0)
        return StepPlan(
            starts=starts,
            page_updates=updates,
            decode_slots_N=slots_N,
            prefill=prefill,
            max_kv_len=int(max(decode_end, prefill_end)),
            num_top_logprobs=int(wants[0]) - 1 if wants[0] else None,
            any_sampled=bool(wants[1]),
            any_filtered=bool(wants[2]),
            any_suppressed=bool(wants[3]),
        )

    def _grow(self, updates: list[PageUpdate]) -> bool:
        """Give every decoding sequence room for its block; False when one had to be preempted."""
        end_M = self._block_start_M + self.limits.block_length
        short = np.flatnonzero(self._decoding_M & (end_M > self._capacity_M))
        preempted = False
        for slot in short[np.argsort(self._admitted_M[short])]:
            while self._running[slot] is not None and not self.pool.num_free:
                self._preempt(self._youngest())
                preempted = True
            sequence = self._running[slot]
            if sequence is not None:
                pages = self.pool.allocate(1)
                updates.append(PageUpdate(int(slot), len(sequence.pages), pages))
                sequence.pages += pages
                self._capacity_M[slot] += self.pool.page_size
        # pages given to a sequence that was preempted after it
        updates[:] = [u for u in updates if self._running[u.slot] is not None]
        return not preempted

    def _youngest(self) -> int:
        occupied_M = self._decoding_M | self._prefilling_M
        return int(np.where(occupied_M, self._admitted_M, -1).argmax())

    def _preempt(self, slot: int) -> None:
        sequence = self._sequence(slot)
        block = BlockSnapshot(
            self._token_ids_MB[slot].copy(),
            self._decoded_MB[slot].copy(),
            self._logprobs_MB[slot].copy(),
            int(self._step_M[slot]),
        )
        self._settle_counts(sequence)
        self._vacate(slot)
        self.pool.free(sequence.preempt(block))
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _vacate(self, slot: int) -> None:
        self._running[slot] = None
        self._decoding_M[slot] = self._prefilling_M[slot] = False
        self._free_slots.append(slot)

    def _admit(self, starts: list[SlotStart], updates: list[PageUpdate]) -> None:
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            match = self.pool.match(sequence.canvas[: sequence.num_committed])
            needed = -(-(sequence.num_committed + self.limits.block_length) // self.pool.page_size)
            missing = needed - len(match.pages)
            if missing > self.pool.num_free:
                self.pool.free(match.pages)
                return
            self.waiting.popleft()
            slot = self._free_slots.pop()
            pages = match.pages + self.pool.allocate(missing)
            cached_tokens = len(match.pages) * self.pool.page_size
            sequence.admit(slot, pages, cached_tokens, match.node)
            self.num_cached_tokens += cached_tokens
            sequence.num_registered_pages = len(match.pages)
            updates.append(PageUpdate(slot, 0, pages))
            starts.append(self._occupy(sequence))

    def _share_prefixes(self, updates: list[PageUpdate]) -> None:
        """Prefilling sequences take over what others computed since they were admitted.

        Completions of one prompt are admitted together: the first computes it, the rest share it.
        """
        for slot in np.flatnonzero(self._prefilling_M).tolist():
            sequence = self._sequence(slot)
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
                self._set_phase(sequence)

    def _occupy(self, sequence: Sequence) -> SlotStart:
        """Fill the mirrors of a slot; returns the same facts for the device."""
        slot, params = sequence.slot, sequence.params
        block = sequence.saved_block or sequence.new_block(self.limits.mask_token_id)
        sequence.saved_block = None
        self._running[slot] = sequence
        self._admitted_M[slot] = self._admissions
        self._admissions += 1
        self._set_phase(sequence)
        self._block_start_M[slot] = sequence.num_committed
        self._capacity_M[slot] = len(sequence.pages) * self.pool.page_size
        self._emitted_end_M[slot] = sequence.prompt_len + sequence.num_emitted
        self._limit_M[slot] = sequence.limit
        self._step_M[slot] = block.denoising_step
        self._denoised_M[slot] = 0
        self._token_ids_MB[slot] = block.token_ids_B
        self._decoded_MB[slot] = block.decoded_B
        self._logprobs_MB[slot] = block.logprobs_B
        filtered = (params.top_p or 1.0) < 1.0 or (params.top_k or 0) > 0 or params.min_p > 0.0
        self._wants_M[slot] = (
            0 if params.logprobs is None else params.logprobs + 1,
            bool(params.temperature),
            bool(params.temperature) and filtered,
            params.min_tokens > 0,
        )
        return SlotStart(
            slot=slot,
            block=block,
            block_start=sequence.num_committed,
            prompt_len=sequence.prompt_len,
            params=params,
            seed=sequence.seed,
            stop_token_ids=tuple(sequence.stop_token_ids),
        )

    def _prefill_chunks(self, num_decode_tokens: int) -> list[PrefillChunk]:
        block_length = self.limits.block_length
        budget = max(self.limits.max_num_batched_tokens - num_decode_tokens, block_length)
        chunks = []
        prefilling = np.flatnonzero(self._prefilling_M)
        for slot in prefilling[np.argsort(self._admitted_M[prefilling])]:
            sequence = self._sequence(slot)
            length = min(sequence.remaining_prefill, budget // block_length * block_length)
            if not length:
                break
            start = sequence.num_computed
            token_ids = sequence.canvas[start : start + length]
            chunks.append(PrefillChunk(int(slot), start, token_ids))
            budget -= length
        return chunks

    def _set_phase(self, sequence: Sequence) -> None:
        self._decoding_M[sequence.slot] = sequence.state is SequenceState.DECODING
        self._prefilling_M[sequence.slot] = sequence.state is SequenceState.PREFILLING

    # --- applying -----------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult) -> list[NewTokens]:
        """Take up the blocks after a step; returns what became final, one entry per sequence."""
        slots_N = plan.decode_slots_N
        before_NB = self._decoded_MB[slots_N]
        committed_N = before_NB.all(1)
        newly_NB = result.decoded_NB & ~before_NB
        self._record(plan, result, newly_NB)

        self._token_ids_MB[slots_N] = result.token_ids_NB
        self._decoded_MB[slots_N] = result.decoded_NB
        self._logprobs_MB[slots_N] = np.where(
            newly_NB, result.logprobs_NB, self._logprobs_MB[slots_N]
        )
        self._step_M[slots_N] += 1
        self._denoised_M[slots_N, 0] += ~committed_N
        self._denoised_M[slots_N, 1] += result.num_processed_N
        self._denoised_M[slots_N, 3] += result.num_retained_N
        self._denoised_M[slots_N, 2] += newly_NB.sum(1)
        self.num_decoded_tokens += int(newly_NB.sum())

        emitted = self._emit(slots_N)
        for slot in slots_N[committed_N]:
            self._commit(int(slot))
        for chunk in plan.prefill:
            sequence = self._sequence(chunk.slot)
            sequence.computed(len(chunk.token_ids))
            self._register_pages(sequence)
            self._set_phase(sequence)
        return emitted

    def _emit(self, slots_N: np.ndarray) -> list[NewTokens]:
        """The contiguous decoded prefix of each block, as far as it was not emitted yet."""
        decoded_NB = self._decoded_MB[slots_N]
        prefix_N = np.where(decoded_NB.all(1), self.limits.block_length, decoded_NB.argmin(1))
        end_N = np.minimum(self._block_start_M[slots_N] + prefix_N, self._limit_M[slots_N])
        start_N = self._emitted_end_M[slots_N]
        emitted = []
        for row in np.flatnonzero(end_N > start_N):
            slot, start, end = slots_N[row], int(start_N[row]), int(end_N[row])
            sequence = self._sequence(slot)
            first = int(self._block_start_M[slot])
            token_ids = self._token_ids_MB[slot, start - first : end - first].tolist()
            logprobs = None
            if sequence.params.logprobs is not None:
                values = self._logprobs_MB[slot, start - first : end - first].tolist()
                logprobs = [
                    TokenLogprob(token, value, sequence.top_logprobs.pop(start + i, ()))
                    for i, (token, value) in enumerate(zip(token_ids, values, strict=True))
                ]
            sequence.num_emitted += len(token_ids)
            self._emitted_end_M[slot] = end
            emitted.append(NewTokens(sequence, token_ids, logprobs))
        return emitted

    def _commit(self, slot: int) -> None:
        sequence = self._sequence(slot)
        sequence.commit(self._token_ids_MB[slot])
        self._block_start_M[slot] = sequence.num_committed
        self._step_M[slot] = 0
        self._token_ids_MB[slot] = self.limits.mask_token_id
        self._decoded_MB[slot] = False
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

    def _record(self, plan: StepPlan, result: StepResult, newly_NB: np.ndarray) -> None:
        """Keep alternatives and traces of the sequences that asked for them."""
        wants_top = self._wants_M[plan.decode_slots_N, 0] > 1
        interested = np.ones_like(wants_top) if self.limits.record_trace else wants_top
        for row in np.flatnonzero(interested & newly_NB.any(1)):
            slot = plan.decode_slots_N[row]
            sequence = self._sequence(slot)
            start = int(self._block_start_M[slot])
            offsets = np.flatnonzero(newly_NB[row])
            if wants_top[row]:
                assert result.top_ids_NBK is not None and result.top_logprobs_NBK is not None
                count = sequence.params.logprobs or 0
                for offset in offsets:
                    ids = result.top_ids_NBK[row, offset, :count].tolist()
                    values = result.top_logprobs_NBK[row, offset, :count].tolist()
                    sequence.top_logprobs[start + int(offset)] = tuple(
                        zip(ids, values, strict=True)
                    )
            if self.limits.record_trace:
                sequence.trace.append(
                    DenoisingStep(
                        block_start=start,
                        num_masked_before=int((~self._decoded_MB[slot]).sum()),
                        positions=tuple((start + offsets).tolist()),
                        token_ids=tuple(result.token_ids_NB[row, offsets].tolist()),
                        confidences=tuple(result.confidences_NB[row, offsets].tolist()),
                    )
                )

    def _sequence(self, slot: int) -> Sequence:
        sequence = self._running[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence

    def _settle_counts(self, sequence: Sequence) -> None:
        """Move a slot's counters into its sequence."""
        steps, processed, decoded, retained = self._denoised_M[sequence.slot].tolist()
        self._denoised_M[sequence.slot] = 0
        sequence.denoising_steps += steps
        sequence.processed_tokens += processed
        sequence.retained_tokens += retained
        sequence.decoded_tokens += decoded
