"""What decisions keep to on every schedule: processing set, eviction, unmasking, closing.

No model: importances and confidences are drawn, everything that is decided from them is ours. M
slots, N of which take part in a step, B block length, S rows, T processed and R retained tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_schedules import Member, Schedule, evicting, schedules
from hypothesis import given, settings
from torch import Tensor

from focus_ray.engine.block_state import pack_starts
from focus_ray.engine.plan import BlockSnapshot, SlotStart
from focus_ray.kernels.advance_blocks import advance_blocks
from focus_ray.kernels.compact import Compacted
from focus_ray.kernels.plan_rows import plan_rows
from focus_ray.kernels.retain import Retained, eviction_target, retain_reference
from focus_ray.kernels.rows import Rows
from focus_ray.kernels.slot_words import SlotLayout, SlotWords
from focus_ray.models import eviction as eviction_module
from focus_ray.models.eviction import Eviction
from focus_ray.models.step import StepTensors
from focus_ray.sampling import SamplingParams

MASK_ID, NUM_BLOCKS = 99, 2


class Blocks:
    """Runs a schedule, and keeps beside the words what an observer of the KV would see.

    ``left``: tokens that left the processing set. ``settled``: tokens whose KV was written in a
    pass with them and their right neighbour decoded. ``computed``: tokens that went through all
    layers at least once. All of the current block.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.policy = schedule, schedule.policy
        self.rng = np.random.default_rng(schedule.seed)
        count, length = len(schedule.members), schedule.block_length
        layout = SlotLayout(length, 1)
        starts = [self._start(slot) for slot in range(count)]
        self.words = SlotWords(layout, torch.from_numpy(pack_starts(layout, starts, MASK_ID)))
        num_rows, num_tokens = 2 * count, 2 * count * length
        self.rows = Rows.allocate(count, length, num_rows, num_tokens, "cpu")
        self.retained = Retained.allocate(num_rows, length, "cpu")
        self.kept = Compacted.allocate(num_tokens, num_rows, 1, (1, 1), torch.float32, "cpu")
        self.page_table_MP = torch.arange(count * NUM_BLOCKS, dtype=torch.int32).view(count, -1)
        self.left_MB = torch.zeros(count, length, dtype=torch.bool)
        self.settled_MB, self.computed_MB = self.left_MB.clone(), self.left_MB.clone()
        self.steps_M = torch.zeros(count, dtype=torch.int64)
        self.masks_M = (self.words.array("decoded") == 0).sum(1)
        self.position_B = torch.arange(length)
        self.num_evicted = self.num_left_over = 0
        self.drawn: list[Tensor] = []

    def _start(self, slot: int) -> SlotStart:
        member, block_length = self.schedule.members[slot], self.schedule.block_length
        order_B = np.arange(block_length)
        if member.taken_up_again:
            self.rng.shuffle(order_B)
        decoded_B = order_B < member.known
        prompt_len = 0 if member.taken_up_again else member.known
        return SlotStart(
            slot=slot,
            block=BlockSnapshot(
                token_ids_B=np.where(decoded_B, 1, MASK_ID).astype(np.int32),
                decoded_B=decoded_B,
                logprobs_B=np.zeros(block_length, np.float32),
                denoising_step=0,
            ),
            block_start=0,
            prompt_len=prompt_len,
            params=SamplingParams(
                max_tokens=NUM_BLOCKS * block_length - prompt_len,
                temperature=0.0,
                top_p=1.0,
                unmasking=member.unmasking,
                confidence_threshold=member.threshold,
                denoising_steps=member.denoising_steps,
                editing_threshold=1.0,
                max_post_steps=1,
            ),
            seed=0,
            stop_token_ids=(),
        )

    def run(self) -> None:
        """Every sequence through its blocks, some of them in each step."""
        active_M = self.words.scalar("active")
        while bool(active_M.any()):
            absent_M = (active_M != 0) & self._uniform(len(active_M)).gt(self.schedule.presence)
            active_M[absent_M] = 0
            before = self.words.words_MW[absent_M]
            if bool(active_M.any()):
                self.step()
            assert self.words.words_MW[absent_M].equal(before), "changed who was not there"
            active_M[absent_M] = 1

    def step(self) -> None:
        """One denoising step as the runner takes it, the model left out."""
        words, rows = self.words, self.rows
        before = SlotWords(words.layout, words.words_MW.clone())
        none_F = torch.zeros(1, dtype=torch.int32)
        plan_rows(
            words,
            self.page_table_MP,
            none_F,
            none_F,
            none_F.expand(1, self.schedule.block_length).contiguous(),
            none_F,
            self.policy.rule,
            page_size=self.schedule.block_length,
            trash_slot=0,
            first_slot=0,
            out=rows,
        )
        slots_N = (before.scalar("active") != 0).nonzero()[:, 0]
        row_N = rows.row_of_slot_M[slots_N].long()
        assert (row_N >= 0).all(), "room for all"
        decoded_NB, processed_NB = before.array("decoded")[slots_N] != 0, rows.processed_SB[row_N]
        assert processed_NB.any(1).all(), "an empty processing set"
        assert not (processed_NB & self.left_MB[slots_N]).any(), "KV that was final is written"
        assert rows.masked_SB[row_N].equal(processed_NB & ~decoded_NB)
        self._check_leftover(before, slots_N, row_N)
        kept_SB, limit_S = self._evict(slots_N, row_N)
        kept_NB = kept_SB[row_N]
        limit_N = limit_S[row_N] - before.scalar("block_start")[slots_N]
        self._check_kept(before, slots_N, processed_NB, kept_NB, limit_N)
        shape = (words.num_slots, self.schedule.block_length)
        chosen_MB = torch.zeros(shape, dtype=torch.bool)
        advance_blocks(
            words,
            rows,
            kept_SB,
            torch.full(shape, 7),
            self._uniform(*shape),
            torch.zeros(shape),
            mask_token_id=MASK_ID,
            whole_blocks=False,
            chosen_MB=chosen_MB,
            decodable_MB=None,
        )
        chosen_NB = chosen_MB[slots_N]
        assert not (chosen_NB & (decoded_NB | ~kept_NB)).any(), "unmasked what was not retained"
        assert chosen_NB.any(1).all(), "every step decodes a token"
        self._check_advanced(before, slots_N, processed_NB, chosen_NB)

    def _check_leftover(self, before: SlotWords, slots_N: Tensor, row_N: Tensor) -> None:
        """What is left over of a closed block has a row of its own, before the block's."""
        rows = self.rows
        leftover_NB = before.array("leftover")[slots_N] != 0
        has_N = leftover_NB.any(1)
        extra = row_N[has_N] - 1
        assert int(rows.counts_4[2]) == len(slots_N) + len(extra)
        assert rows.processed_SB[extra].equal(leftover_NB[has_N])
        assert not rows.masked_SB[extra].any() and not rows.target_S[extra].any()
        end_N = before.scalar("block_start")[slots_N][has_N]
        assert rows.row_start_S[extra].equal(end_N.long() - self.schedule.block_length)
        assert (rows.kv_limit_C[rows.row_offsets_S1[extra].long()] <= end_N).all()
        self.num_left_over += int(leftover_NB.sum())

    def _evict(self, slots_N: Tensor, row_N: Tensor) -> tuple[Tensor, Tensor]:
        """What goes past layer 1, and how many KV positions each row then sees."""
        rows = self.rows
        first_S = rows.row_offsets_S1[:-1].long().clamp_max(len(rows.kv_limit_C) - 1)
        if not self.policy.by_importance:
            return rows.processed_SB, rows.kv_limit_C[first_S]
        num_tokens = int(rows.counts_4[0])
        step = StepTensors(
            token_ids_T=rows.token_ids_C[:num_tokens],
            positions_T=rows.positions_C[:num_tokens],
            kv_limit_T=rows.kv_limit_C[:num_tokens],
            slot_T=rows.slot_C[:num_tokens],
            page_table_MP=self.page_table_MP,
            row_table_S=rows.row_slot_S,
            row_offsets_S1=rows.row_offsets_S1,
            max_row_len=self.schedule.block_length,
            max_kv_len=NUM_BLOCKS * self.schedule.block_length,
            busy_rows=len(slots_N),
        )
        x_TD = step.positions_T[:, None].float()
        eviction = Eviction(
            rows,
            self.retained,
            self.kept,
            trash_slot=0,
            importance_dtype=self.policy.importance_dtype,
            attend_cached=self.policy.rule.attend_cached,
        )
        self.drawn = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eviction_module, "importance", self._importance)
            eviction.observe(x_TD[:, None], x_TD[:, None], step)
            eviction.choose(x_TD[:, None], x_TD[:, None], step)
        x_RD, _, step_R = eviction.compact(x_TD, x_TD[:, None].contiguous(), step)
        kept_SB, num_retained = self.retained.kept_NB, int(self.retained.counts_2[0])
        assert kept_SB[row_N].equal(self._chosen(slots_N, row_N)), "not what the rules choose"
        went_on = (rows.row_start_S[:, None] + self.position_B)[kept_SB]
        assert x_RD[:num_retained, 0].equal(went_on.float()), "the wrong tokens went on"
        first_S = step_R.row_offsets_S1[:-1].long().clamp_max(len(step_R.kv_limit_T) - 1)
        return kept_SB, step_R.kv_limit_T[first_S]

    def _chosen(self, slots_N: Tensor, row_N: Tensor) -> Tensor:
        """What ``retain`` chooses by the importances drawn last and by what was observed."""
        masked_NB = self.words.array("decoded")[slots_N] == 0
        first_mask_N1 = masked_NB.int().argmax(1, keepdim=True)
        is_behind_NB = ~masked_NB & (self.position_B > first_mask_N1) & masked_NB.any(1)[:, None]
        computed_NB = self.computed_MB[slots_N]
        taken_up_again_N = ~computed_NB.any(1) & is_behind_NB.any(1)
        target_N = self._target(self.words, slots_N)
        first_SB, second_SB = self.drawn
        chosen = retain_reference(
            first_SB[row_N],
            second_SB[row_N],
            self.rows.processed_SB[row_N],
            masked_NB,
            torch.where(taken_up_again_N, masked_NB.sum(1), target_N),
            torch.where(computed_NB, self.position_B, -1).amax(1),
            importance_dtype=self.policy.importance_dtype,
            attend_cached=self.policy.rule.attend_cached,
        )
        return chosen.kept_NB

    def _check_kept(
        self,
        before: SlotWords,
        slots_N: Tensor,
        processed_NB: Tensor,
        kept_NB: Tensor,
        limit_N: Tensor,
    ) -> None:
        masked_NB = before.array("decoded")[slots_N] == 0
        assert not (kept_NB & ~processed_NB).any(), "retained what was not processed"
        assert not (processed_NB & ~masked_NB & ~kept_NB).any(), "a decoded token was evicted"
        if not self.policy.rule.leftmost:
            assert not (masked_NB & ~processed_NB).any(), "a masked token is not processed"
            assert processed_NB[self.steps_M[slots_N] == 0].all(), "the first step takes the block"
        target_N = self._target(before, slots_N)
        count_N = (kept_NB & masked_NB).sum(1)
        assert (count_N >= target_N).all(), "fewer than the target"
        assert (count_N >= 1).all(), "nothing could be decoded"
        evicts_N = masked_NB.sum(1) > target_N
        assert not (masked_NB & ~kept_NB)[~evicts_N].any(), "evicted without need"

        masked_kept_NB = kept_NB & masked_NB
        rightmost_N1 = torch.where(masked_kept_NB, self.position_B, -1).amax(1, keepdim=True)
        hole_NB = masked_NB & ~kept_NB & (self.position_B < rightmost_N1)
        progress_N1 = before.scalar("progress")[slots_N][:, None]
        assert not (hole_NB & (self.position_B > progress_N1)).any(), "a hole right of the progress"
        self.computed_MB[slots_N] |= kept_NB
        seen_NB = self.position_B < limit_N[:, None]
        assert not (seen_NB & ~self.computed_MB[slots_N]).any(), "sees KV that nobody computed"
        assert not (kept_NB & ~seen_NB).any(), "a retained token does not see itself"
        if self.policy.rule.attend_cached:
            assert not (~masked_NB & ~seen_NB).any(), "final KV is not seen"
        self.num_evicted += int((masked_NB & ~kept_NB).sum())

    def _check_advanced(
        self, before: SlotWords, slots_N: Tensor, processed_NB: Tensor, chosen_NB: Tensor
    ) -> None:
        words, length = self.words, self.schedule.block_length
        decoded_NB = before.array("decoded")[slots_N] != 0
        neighbour_NB = torch.cat([decoded_NB[:, 1:], torch.ones_like(decoded_NB[:, :1])], dim=1)
        self.settled_MB[slots_N] |= processed_NB & decoded_NB & neighbour_NB
        self.steps_M[slots_N] += 1
        assert (self.steps_M <= self.masks_M).all(), "idle steps"
        moved_M = words.scalar("block_start") != before.scalar("block_start")
        is_whole_N = (decoded_NB | chosen_NB).all(1)
        ended_N = words.scalar("active")[slots_N] == 0
        assert (moved_M[slots_N] | ended_N).equal(is_whole_N)
        on_N, closed_N = slots_N[~is_whole_N], slots_N[moved_M[slots_N]]

        uncached_MB, decoded_MB = words.array("uncached") != 0, words.array("decoded") != 0
        left_MB = self.left_MB | ~uncached_MB
        assert not (left_MB & ~self.settled_MB)[on_N].any(), "left before its neighbour was decoded"
        self.left_MB[on_N] = left_MB[on_N]
        is_masked_MB = words.array("token_ids") == MASK_ID
        assert is_masked_MB[on_N].equal(~decoded_MB[on_N])
        num_chosen_N = chosen_NB[~is_whole_N].sum(1)
        for name, more_N in (("decoded_sum", num_chosen_N), ("productive_steps", num_chosen_N > 0)):
            assert words.scalar(name)[on_N].equal((before.scalar(name)[on_N] + more_N).int())

        leftover_MB = words.array("leftover") != 0
        assert not leftover_MB[on_N].any(), "left over twice"
        assert (self.settled_MB | leftover_MB)[closed_N].all(), "closed KV that is never final"
        assert not (self.left_MB & leftover_MB)[closed_N].any(), "final KV that is computed again"
        assert (words.array("closed_ids")[closed_N] != MASK_ID).all()
        assert not decoded_MB[closed_N].any() and is_masked_MB[closed_N].all()
        assert uncached_MB[closed_N].all() and words.scalar("warm_up")[closed_N].all()
        assert (words.scalar("progress")[closed_N] == -1).all()
        assert not words.scalar("productive_steps")[closed_N].any()
        for array_MB in (self.left_MB, self.settled_MB, self.computed_MB):
            array_MB[closed_N] = False
        self.masks_M[closed_N], self.steps_M[closed_N] = length, 0

    def _target(self, words: SlotWords, slots_N: Tensor) -> Tensor:
        """Masked tokens that must go on at least."""
        num_masked_N = (words.array("decoded")[slots_N] == 0).sum(1)
        alpha = self.policy.rule.alpha
        if alpha is None:
            return num_masked_N
        steps_N = words.scalar("productive_steps")[slots_N].clamp_min(1)
        mean_N = words.scalar("decoded_sum")[slots_N] / steps_N
        return eviction_target(num_masked_N, mean_N, torch.full_like(mean_N, alpha))

    def _importance(self, *inputs: Tensor) -> Tensor:
        """In place of the kernel; its last argument but one is masked_SB."""
        num_rows, length = inputs[-2].shape
        levels = self.schedule.levels
        values_NB = self.rng.integers(levels, size=(num_rows, length)) * (8 / levels)
        unknown_N = np.flatnonzero(self.rng.random(num_rows) < self.schedule.unknown)
        values_NB[unknown_N, self.rng.integers(length, size=len(unknown_N))] = np.nan
        self.drawn.append(torch.from_numpy(values_NB.astype(np.float32)))
        return self.drawn[-1]

    def _uniform(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.random(shape, dtype=np.float32))


@settings(max_examples=16)
@given(schedules(taken_up_again=False))
def test_every_step_keeps_to_the_specification(schedule: Schedule) -> None:
    Blocks(schedule).run()


@settings(max_examples=8)
@given(schedules(taken_up_again=True))
def test_blocks_that_are_taken_up_again_do_so_too(schedule: Schedule) -> None:
    Blocks(schedule).run()


@pytest.mark.parametrize("leftmost", [False, True])
def test_schedules_do_evict_and_leave_over(leftmost: bool) -> None:
    member = Member(3, False, "low_confidence_dynamic", threshold=0.9, denoising_steps=32)
    schedule = Schedule(
        block_length=32,
        members=(member,) * 4,
        policy=evicting(leftmost=leftmost),
        levels=10_000,
        unknown=0.0,
        presence=0.5,
        seed=0,
    )
    blocks = Blocks(schedule)
    blocks.run()
    assert blocks.num_evicted > 100
    assert blocks.num_left_over >= 4
