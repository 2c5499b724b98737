"""Mirrors of what the device keeps per running sequence, as NumPy arrays over slots.

M slots, B block length, C counts in the order of the fields of ``DecodingCounts``. A slot's row
means something while a sequence sits in it. The mirrors are as old as the last step whose result
was taken up; the device may be a step or two ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focus_ray.engine.outputs import COUNT_NAMES
from focus_ray.engine.plan import BlockSnapshot, SlotStart, StepResult
from focus_ray.engine.request import Sequence, SequenceState

NOBODY = -1
"""In place of the admission number of an empty slot."""

WANTS_TOP, WANTS_SAMPLED, WANTS_FILTERED, WANTS_SUPPRESSED = range(4)
"""Columns of ``wants_M4``; the first holds the alternatives asked for plus one, 0 for none."""


@dataclass(frozen=True)
class BlocksAfter:
    """What a step made of the blocks that the mirrors still show as they were before it.

    Args:
        ours_M: bool, slots in which the same sequence decodes as when the step was launched; the
            other rows mean nothing.
        took_part_M: bool, of these, those whose block the step processed.
        closed_M: bool, blocks that are wholly decoded now, and make place for the next.
        ended_M: bool, these, and the last blocks of texts.
        token_ids_MB, decoded_MB, logprobs_MB: of these blocks, closed or not.
        counted_MC: int64, what the step did for each sequence; 0 where not ours.
    """

    ours_M: NDArray[np.bool_]
    took_part_M: NDArray[np.bool_]
    closed_M: NDArray[np.bool_]
    ended_M: NDArray[np.bool_]
    token_ids_MB: NDArray[np.int32]
    decoded_MB: NDArray[np.bool_]
    logprobs_MB: NDArray[np.float32]
    counted_MC: NDArray[np.int64]


class Slots:
    """Who sits where, and the state of each one's block.

    ``admitted_M`` numbers admissions, so that a later occupant of a slot is never taken for an
    earlier one. ``active_M`` is what the device last said; ``edits_M`` are sequences whose decoded
    tokens may change until their block ends; ``capacity_M`` and ``canvas_end_M`` are tokens that
    the pages hold and that the sequence can ever have; ``registered_end_M`` is the position up to
    which its pages are findable;
    ``to_prefill_M`` are tokens whose prefill is not planned yet.
    """

    def __init__(self, max_num_seqs: int, block_length: int, mask_token_id: int) -> None:
        m, b = max_num_seqs, block_length
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        self._sequences: list[Sequence | None] = [None] * m
        self._free = list(range(m - 1, -1, -1))
        self._admissions = 0
        self.admitted_M = np.full(m, NOBODY, np.int64)
        self.decoding_M = np.zeros(m, np.bool_)
        self.prefilling_M = np.zeros(m, np.bool_)
        self.active_M = np.zeros(m, np.bool_)
        self.edits_M = np.zeros(m, np.bool_)
        self.block_start_M = np.zeros(m, np.int64)
        self.capacity_M = np.zeros(m, np.int64)
        self.canvas_end_M = np.zeros(m, np.int64)
        self.registered_end_M = np.zeros(m, np.int64)
        self.to_prefill_M = np.zeros(m, np.int64)
        self.emitted_end_M = np.zeros(m, np.int64)
        self.limit_M = np.zeros(m, np.int64)
        self.step_M = np.zeros(m, np.int64)
        self.post_steps_M = np.zeros(m, np.int64)
        self.counts_MC = np.zeros((m, len(COUNT_NAMES)), np.int64)
        self.wants_M4 = np.zeros((m, 4), np.int64)
        self.token_ids_MB = np.zeros((m, b), np.int32)
        self.decoded_MB = np.zeros((m, b), np.bool_)
        self.logprobs_MB = np.zeros((m, b), np.float32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def taken_M(self) -> NDArray[np.bool_]:
        """``[M]`` bool: somebody sits there."""
        taken_M: NDArray[np.bool_] = self.admitted_M != NOBODY
        return taken_M

    @property
    def num_taken(self) -> int:
        return len(self._sequences) - len(self._free)

    def reserve(self) -> int:
        """A free slot, which ``occupy`` is to fill next."""
        return self._free.pop()

    def is_taken(self, slot: int) -> bool:
        return self._sequences[slot] is not None

    def sequence(self, slot: int) -> Sequence:
        """Who sits in a taken slot."""
        sequence = self._sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence

    def sequences(self, slots_N: NDArray[np.int64]) -> list[Sequence]:
        """Who sits in taken slots."""
        return [self.sequence(slot) for slot in slots_N.tolist()]

    def youngest(self) -> int:
        """The slot of the sequence that was admitted last."""
        return int(self.admitted_M.argmax())

    def in_order_of_admission(self, chosen_M: NDArray[np.bool_]) -> list[int]:
        """The chosen slots, oldest occupant first."""
        slots: list[int] = np.flatnonzero(chosen_M).tolist()
        return sorted(slots, key=self.admitted_M.__getitem__)

    def may_write_to(self) -> NDArray[np.int64]:
        """``[M]``: end of the positions that a decoding sequence may write in the next step.

        The step before it is still unknown and may close the block that the mirrors show.
        """
        return np.minimum(self.block_start_M + 2 * self.block_length, self.canvas_end_M)

    def occupy(self, sequence: Sequence, capacity: int) -> None:
        """A sequence takes the slot it was admitted to; it is prefilled before it decodes.

        Args:
            capacity: tokens that its pages hold.
        """
        slot, params = sequence.slot, sequence.params
        self._sequences[slot] = sequence
        self.admitted_M[slot] = self._admissions
        self._admissions += 1
        self.decoding_M[slot], self.prefilling_M[slot] = False, True
        self.block_start_M[slot] = sequence.num_committed
        self.capacity_M[slot] = capacity
        self.canvas_end_M[slot] = len(sequence.canvas)
        self.emitted_end_M[slot] = sequence.prompt_len + sequence.num_emitted
        self.to_prefill_M[slot] = sequence.remaining_prefill
        self.limit_M[slot] = sequence.limit
        self.edits_M[slot] = params.unmasking == "joint_threshold"
        self.counts_MC[slot] = 0
        filtered = (params.top_p or 1.0) < 1.0 or (params.top_k or 0) > 0 or params.min_p > 0.0
        self.wants_M4[slot, WANTS_TOP] = 0 if params.logprobs is None else params.logprobs + 1
        self.wants_M4[slot, WANTS_SAMPLED] = bool(params.temperature)
        self.wants_M4[slot, WANTS_FILTERED] = bool(params.temperature) and filtered
        self.wants_M4[slot, WANTS_SUPPRESSED] = params.min_tokens > 0
        block = sequence.saved_block or sequence.new_block(self.mask_token_id)
        sequence.saved_block = None
        self.step_M[slot] = block.denoising_step
        self.post_steps_M[slot] = block.post_steps
        self.token_ids_MB[slot] = block.token_ids_B
        self.decoded_MB[slot] = block.decoded_B
        self.logprobs_MB[slot] = block.logprobs_B

    def start(self, slot: int) -> SlotStart:
        """Its prefill is planned to the end: the sequence decodes; what the device must know."""
        sequence = self.sequence(slot)
        assert sequence.state is SequenceState.DECODING
        self.decoding_M[slot], self.prefilling_M[slot] = True, False
        self.active_M[slot] = True
        return SlotStart(
            slot=slot,
            block=self.snapshot(slot),
            block_start=sequence.num_committed,
            prompt_len=sequence.prompt_len,
            params=sequence.params,
            seed=sequence.seed,
            stop_token_ids=tuple(sequence.stop_token_ids),
            forced_ids_B=sequence.forced_ids(self.mask_token_id),
        )

    def vacate(self, slot: int) -> None:
        """Move what was counted into the sequence and free its slot."""
        sequence = self.sequence(slot)
        sequence.num_emitted = int(self.emitted_end_M[slot]) - sequence.prompt_len
        sequence.count_C = sequence.count_C + self.counts_MC[slot]
        self._sequences[slot] = None
        self.admitted_M[slot], self.to_prefill_M[slot] = NOBODY, 0
        self.decoding_M[slot] = self.prefilling_M[slot] = self.active_M[slot] = False
        self._free.append(slot)

    def compare(self, result: StepResult, launched_M: NDArray[np.int64]) -> BlocksAfter:
        """What a step did to the blocks that the mirrors show; changes nothing.

        Args:
            launched_M: admission numbers of those who decoded when the step was launched.
        """
        ours_M = (launched_M != NOBODY) & (launched_M == self.admitted_M)
        closed_M = ours_M & (result.block_start_M != self.block_start_M)
        counted_MC = (result.counts_MC - self.counts_MC) * ours_M[:, None]
        token_ids_MB, decoded_MB = result.token_ids_MB.copy(), result.decoded_MB.copy()
        logprobs_MB = result.logprobs_MB.copy()
        closed = np.flatnonzero(closed_M)  # a few: the rest is copied whole, which is cheap
        token_ids_MB[closed] = result.closed_ids_MB[closed]
        decoded_MB[closed] = True
        logprobs_MB[closed] = result.closed_logprobs_MB[closed]
        return BlocksAfter(
            ours_M=ours_M,
            took_part_M=counted_MC[:, 0] > 0,  # denoising steps
            closed_M=closed_M,
            ended_M=closed_M | (ours_M & ~result.active_M),
            token_ids_MB=token_ids_MB,
            decoded_MB=decoded_MB,
            logprobs_MB=logprobs_MB,
            counted_MC=counted_MC,
        )

    def newly_decoded(self, after: BlocksAfter) -> NDArray[np.bool_]:
        """``[M, B]`` bool: what a step decoded; before ``take``."""
        return after.decoded_MB & ~self.decoded_MB & after.ours_M[:, None]

    def edited(self, after: BlocksAfter) -> NDArray[np.bool_]:
        """``[M, B]`` bool: decoded tokens that a step replaced; before ``take``."""
        was_decoded_MB = self.decoded_MB & after.ours_M[:, None]
        edited_MB: NDArray[np.bool_] = was_decoded_MB & (after.token_ids_MB != self.token_ids_MB)
        return edited_MB

    def take(self, result: StepResult, after: BlocksAfter) -> None:
        """Bring the mirrors up to the step."""
        others = np.flatnonzero(~after.ours_M)

        def updated(mirror: NDArray[Any], news: NDArray[Any]) -> NDArray[Any]:
            found = news.astype(mirror.dtype)
            found[others] = mirror[others]
            return found

        self.active_M = updated(self.active_M, result.active_M)
        self.block_start_M = updated(self.block_start_M, result.block_start_M)
        self.step_M = updated(self.step_M, result.denoising_step_M)
        self.post_steps_M = updated(self.post_steps_M, result.post_steps_M)
        self.token_ids_MB = updated(self.token_ids_MB, result.token_ids_MB)
        self.decoded_MB = updated(self.decoded_MB, result.decoded_MB)
        self.logprobs_MB = updated(self.logprobs_MB, result.logprobs_MB)
        self.counts_MC += after.counted_MC

    def snapshot(self, slot: int) -> BlockSnapshot:
        """The block of a slot as it stands."""
        return BlockSnapshot(
            self.token_ids_MB[slot].copy(),
            self.decoded_MB[slot].copy(),
            self.logprobs_MB[slot].copy(),
            int(self.step_M[slot]),
            int(self.post_steps_M[slot]),
        )
