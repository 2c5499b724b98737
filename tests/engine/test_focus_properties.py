"""What decisions keep to on every schedule: processing set, eviction, unmasking, commit.

No model: importances and confidences are drawn, everything that is decided from them is ours. N
sequences of a step, M slots, B block length, T processed and R retained tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_ray.engine.block_state import BlockState
from focus_ray.engine.decoding import choose_unmasked, quota
from focus_ray.engine.plan import BlockSnapshot, SlotStart
from focus_ray.engine.policy import DecodingPolicy, DelayedCache, RetainByDelta, RetainLeftmost
from focus_ray.kernels.retain import eviction_target, retain_reference
from focus_ray.models import eviction as eviction_module
from focus_ray.models.step import StepTensors
from focus_ray.sampling import SamplingParams, Unmasking

MASK_ID, NUM_BLOCKS = 99, 2
STRATEGIES: tuple[Unmasking, ...] = (
    "low_confidence_dynamic",
    "low_confidence_static",
    "sequential",
)


@dataclass(frozen=True)
class Member:
    """One sequence of a schedule.

    ``known`` positions of its first block are decoded when it starts: the leftmost ones, which the
    prompt ends in, or any, where a block in progress is taken up again after preemption.
    """

    known: int
    taken_up_again: bool
    unmasking: Unmasking
    threshold: float
    denoising_steps: int


@dataclass(frozen=True)
class Schedule:
    """What hypothesis chooses; bulk values follow from ``seed``.

    ``levels`` is the number of different importances (few: ties are common), ``unknown`` the share
    of blocks with a NaN among them, ``presence`` the share of sequences that take part in a step.
    """

    block_length: int
    members: tuple[Member, ...]
    policy: DecodingPolicy
    levels: int
    unknown: float
    presence: float
    seed: int


@st.composite
def policies(draw: st.DrawFn) -> DecodingPolicy:
    attend_cached = draw(st.booleans())
    alpha = draw(st.sampled_from([1.0, 1.2, 1.5, 3.0]))
    importance_dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    by_delta = RetainByDelta(attend_cached, alpha, importance_dtype)
    others = [DelayedCache(attend_cached), RetainLeftmost(attend_cached, alpha)]
    return draw(st.sampled_from([by_delta, by_delta, *others]))


@st.composite
def schedules(draw: st.DrawFn, taken_up_again: bool) -> Schedule:
    block_length = draw(st.integers(4, 64))
    member = st.builds(
        Member,
        known=st.integers(0, block_length - 1),
        taken_up_again=st.just(taken_up_again),
        unmasking=st.sampled_from(STRATEGIES),
        threshold=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        denoising_steps=st.integers(1, block_length),
    )
    return Schedule(
        block_length=block_length,
        members=tuple(draw(st.lists(member, min_size=1, max_size=4))),
        policy=draw(policies()),
        levels=draw(st.sampled_from([1, 2, 5, 10_000])),
        unknown=draw(st.sampled_from([0.0, 0.1])),
        presence=draw(st.sampled_from([0.5, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class Blocks:
    """Runs a schedule, and keeps beside the state what an observer of the KV would see.

    ``left``: tokens that left the processing set. ``settled``: tokens whose KV was written in a
    pass with them and their right neighbour decoded. ``computed``: tokens that went through all
    layers at least once. All of the current block.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.policy = schedule.policy
        self.rng = np.random.default_rng(schedule.seed)
        count, block_length = len(schedule.members), schedule.block_length
        self.state = BlockState(count, block_length, 1, MASK_ID, 0, torch.device("cpu"))
        self.state.start([self._start(slot) for slot in range(count)])
        self.left_MB = torch.zeros(count, block_length, dtype=torch.bool)
        self.settled_MB, self.computed_MB = self.left_MB.clone(), self.left_MB.clone()
        self.steps_M = torch.zeros(count, dtype=torch.int64)
        self.masks_M = (~self.state.decoded_MB).sum(1)
        self.blocks_M = torch.zeros(count, dtype=torch.int64)
        self.position_B = torch.arange(block_length)
        self.num_evicted = 0
        self.drawn: list[Tensor] = []

    def _start(self, slot: int) -> SlotStart:
        member, block_length = self.schedule.members[slot], self.schedule.block_length
        order_B = np.arange(block_length)
        if member.taken_up_again:
            self.rng.shuffle(order_B)
        decoded_B = order_B < member.known
        return SlotStart(
            slot=slot,
            block=BlockSnapshot(
                token_ids_B=np.where(decoded_B, 1, MASK_ID).astype(np.int32),
                decoded_B=decoded_B,
                logprobs_B=np.zeros(block_length, np.float32),
                denoising_step=0,
            ),
            block_start=0,
            prompt_len=member.known,
            params=SamplingParams(
                temperature=0.0,
                top_p=1.0,
                unmasking=member.unmasking,
                confidence_threshold=member.threshold,
                denoising_steps=member.denoising_steps,
            ),
            seed=0,
            stop_token_ids=(),
        )

    def run(self) -> None:
        """Every sequence through its blocks, some of them in each step."""
        while bool((self.blocks_M < NUM_BLOCKS).any()):
            open_M = self.blocks_M < NUM_BLOCKS
            present_M = open_M & self._uniform(len(open_M)).le(self.schedule.presence)
            if bool(present_M.any()):
                self.step(present_M.nonzero()[:, 0])

    def step(self, slots_N: Tensor) -> None:
        """One denoising step as the runner takes it, the model left out."""
        state = self.state
        decoded_NB = state.decoded_MB[slots_N]
        processed_NB = self.policy.processing_set(state, slots_N)
        assert processed_NB.any(1).all(), "an empty processing set"
        assert not (processed_NB & self.left_MB[slots_N]).any(), "KV that was final is written"
        kept_NB, limit_N = self._evict(slots_N, processed_NB)
        self._check_kept(slots_N, decoded_NB, processed_NB, kept_NB, limit_N)
        chosen_NB = choose_unmasked(
            self._uniform(len(slots_N), self.schedule.block_length),
            kept_NB & ~decoded_NB,
            strategy_N=state.strategy_M[slots_N],
            threshold_N=state.threshold_M[slots_N],
            quota_N=quota(
                self.schedule.block_length,
                state.denoising_steps_M[slots_N],
                state.denoising_step_M[slots_N],
            ),
        )
        assert not (chosen_NB & (decoded_NB | ~kept_NB)).any(), "unmasked what was not retained"
        assert chosen_NB.any(1).equal(~decoded_NB.all(1)), "every step decodes a token"
        counts_N = self._counts(slots_N)
        token_ids_NB = torch.where(chosen_NB, 7, state.token_ids_MB[slots_N])
        state.advance(slots_N, token_ids_NB, decoded_NB | chosen_NB, kept_NB)
        self._check_advanced(slots_N, decoded_NB, processed_NB, chosen_NB, counts_N)

    def _evict(self, slots_N: Tensor, processed_NB: Tensor) -> tuple[Tensor, Tensor]:
        """What goes past layer 1, and how many positions of its block each row then sees."""
        eviction = self.policy.eviction(self.state, slots_N, processed_NB)
        if eviction is None:
            seen_NB = processed_NB
            if self.policy.attend_cached:
                seen_NB = processed_NB | self.state.decoded_MB[slots_N]
            return processed_NB, torch.where(seen_NB, self.position_B + 1, 0).amax(1)
        row_T, position_T = processed_NB.nonzero().unbind(1)
        start_N = self.state.block_start_M[slots_N]
        step = StepTensors(
            token_ids_T=row_T,
            positions_T=start_N[row_T] + position_T,
            kv_limit_T=torch.zeros_like(row_T, dtype=torch.int32),
            slot_T=row_T,
            page_table_SP=torch.zeros(len(slots_N), 1, dtype=torch.int32),
            row_offsets_S1=torch.cat([row_T.new_zeros(1), processed_NB.sum(1).cumsum(0)]).int(),
            max_row_len=self.schedule.block_length,
            max_kv_len=1,
        )
        x_TD, q_THd = position_T[:, None].float(), position_T[:, None, None].float()
        self.drawn = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eviction_module, "importance", self._importance)
            eviction.observe(q_THd, q_THd, step)
            x_RD, _, step_R = eviction.retain(x_TD, q_THd, q_THd, step)
        kept_NB = eviction.kept_NB
        assert kept_NB.equal(self._chosen(slots_N, processed_NB)), "not what the rules choose"
        assert x_RD[:, 0].equal(kept_NB.nonzero()[:, 1].float()), "the wrong tokens went on"
        limit_N = torch.zeros_like(start_N)
        limit_N[kept_NB.nonzero()[:, 0]] = step_R.kv_limit_T.long()
        return kept_NB, limit_N - start_N

    def _chosen(self, slots_N: Tensor, processed_NB: Tensor) -> Tensor:
        """What ``retain`` chooses by the importances drawn last and by what was observed."""
        assert isinstance(self.policy, RetainByDelta)
        masked_NB = ~self.state.decoded_MB[slots_N]
        first_mask_N1 = masked_NB.int().argmax(1, keepdim=True)
        is_behind_NB = ~masked_NB & (self.position_B > first_mask_N1) & masked_NB.any(1)[:, None]
        computed_NB = self.computed_MB[slots_N]
        taken_up_again_N = ~computed_NB.any(1) & is_behind_NB.any(1)
        target_N = self._target(slots_N, masked_NB)
        chosen = retain_reference(
            *self.drawn,
            processed_NB,
            masked_NB,
            torch.where(taken_up_again_N, masked_NB.sum(1), target_N),
            torch.where(computed_NB, self.position_B, -1).amax(1),
            importance_dtype=self.policy.importance_dtype,
            attend_cached=self.policy.attend_cached,
        )
        return chosen.kept_NB

    def _check_kept(
        self,
        slots_N: Tensor,
        decoded_NB: Tensor,
        processed_NB: Tensor,
        kept_NB: Tensor,
        limit_N: Tensor,
    ) -> None:
        masked_NB = ~decoded_NB
        assert not (kept_NB & ~processed_NB).any(), "retained what was not processed"
        assert not (processed_NB & decoded_NB & ~kept_NB).any(), "a decoded token was evicted"
        if not isinstance(self.policy, RetainLeftmost):
            assert not (masked_NB & ~processed_NB).any(), "a masked token is not processed"
            assert processed_NB[self.steps_M[slots_N] == 0].all(), "the first step takes the block"
        target_N = self._target(slots_N, masked_NB)
        count_N = (kept_NB & masked_NB).sum(1)
        assert (count_N >= target_N).all(), "fewer than the target"
        assert (count_N[masked_NB.any(1)] >= 1).all(), "nothing could be decoded"
        evicts_N = masked_NB.sum(1) > target_N
        assert not (masked_NB & ~kept_NB)[~evicts_N].any(), "evicted without need"

        masked_kept_NB = kept_NB & masked_NB
        rightmost_N1 = torch.where(masked_kept_NB, self.position_B, -1).amax(1, keepdim=True)
        hole_NB = masked_NB & ~kept_NB & (self.position_B < rightmost_N1)
        progress_N1 = self.state.progress_M[slots_N][:, None]
        assert not (hole_NB & (self.position_B > progress_N1)).any(), "a hole right of the progress"
        self.computed_MB[slots_N] |= kept_NB
        seen_NB = self.position_B < limit_N[:, None]
        assert not (seen_NB & ~self.computed_MB[slots_N]).any(), "sees KV that nobody computed"
        assert not (kept_NB & ~seen_NB).any(), "a retained token does not see itself"
        if self.policy.attend_cached:
            assert not (decoded_NB & ~seen_NB).any(), "final KV is not seen"
        self.num_evicted += int((masked_NB & ~kept_NB).sum())

    def _check_advanced(
        self,
        slots_N: Tensor,
        decoded_NB: Tensor,
        processed_NB: Tensor,
        chosen_NB: Tensor,
        counts_N: tuple[Tensor, Tensor],
    ) -> None:
        """``decoded_NB`` is what was decoded on input of the step that has been stored now."""
        state = self.state
        neighbour_NB = torch.cat([decoded_NB[:, 1:], torch.ones_like(decoded_NB[:, :1])], dim=1)
        self.settled_MB[slots_N] |= processed_NB & decoded_NB & neighbour_NB
        self.steps_M[slots_N] += 1
        committed_N = decoded_NB.all(1)
        on_N, done_N = slots_N[~committed_N], slots_N[committed_N]

        left_MB = self.left_MB | ~state.uncached_MB
        assert not (left_MB & ~self.settled_MB)[on_N].any(), "left before its neighbour was decoded"
        self.left_MB[on_N] = left_MB[on_N]
        is_masked_MB = state.token_ids_MB == MASK_ID
        assert is_masked_MB[on_N].equal(~state.decoded_MB[on_N])
        sum_N, steps_N = (after[~committed_N] for after in self._counts(slots_N))
        num_chosen_N = chosen_NB[~committed_N].sum(1)
        assert sum_N.equal(counts_N[0][~committed_N] + num_chosen_N)
        assert steps_N.equal(counts_N[1][~committed_N] + (num_chosen_N > 0))

        assert self.settled_MB[done_N].all(), "committed KV that was not final"
        assert (self.steps_M[done_N] <= self.masks_M[done_N] + 1).all(), "idle steps"
        assert not state.decoded_MB[done_N].any() and is_masked_MB[done_N].all()
        assert state.uncached_MB[done_N].all() and state.warm_up_M[done_N].all()
        assert (state.progress_M[done_N] == -1).all() and not self._counts(done_N)[1].any()
        for array_MB in (self.left_MB, self.settled_MB, self.computed_MB):
            array_MB[done_N] = False
        self.blocks_M[done_N] += 1
        self.masks_M[done_N], self.steps_M[done_N] = self.schedule.block_length, 0
        assert state.block_start_M.equal(self.blocks_M * self.schedule.block_length)

    def _counts(self, slots_N: Tensor) -> tuple[Tensor, Tensor]:
        return self.state.decoded_sum_M[slots_N], self.state.productive_steps_M[slots_N]

    def _target(self, slots_N: Tensor, masked_NB: Tensor) -> Tensor:
        """Masked tokens that must go on at least."""
        if isinstance(self.policy, RetainByDelta | RetainLeftmost):
            sum_N, steps_N = self._counts(slots_N)
            mean_N = sum_N / steps_N.clamp_min(1)
            alpha_N = torch.full_like(mean_N, self.policy.alpha)
            return eviction_target(masked_NB.sum(1), mean_N, alpha_N)
        return masked_NB.sum(1)

    def _importance(self, *inputs: Tensor) -> Tensor:
        """In place of the kernel; its last argument is masked_NB."""
        num_rows, length = inputs[-1].shape
        levels = self.schedule.levels
        values_NB = self.rng.integers(levels, size=(num_rows, length)) * (8 / levels)
        unknown_N = np.flatnonzero(self.rng.random(num_rows) < self.schedule.unknown)
        values_NB[unknown_N, self.rng.integers(length, size=len(unknown_N))] = np.nan
        self.drawn.append(torch.from_numpy(values_NB.astype(np.float32)))
        return self.drawn[-1]

    def _uniform(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.random(shape, dtype=np.float32))


@settings(max_examples=80)
@given(schedules(taken_up_again=False))
def test_every_step_keeps_to_the_specification(schedule: Schedule) -> None:
    Blocks(schedule).run()


@settings(max_examples=30)
@given(schedules(taken_up_again=True))
def test_blocks_that_are_taken_up_again_do_so_too(schedule: Schedule) -> None:
    Blocks(schedule).run()


@pytest.mark.parametrize(
    "policy", [RetainByDelta(False, 1.5, torch.bfloat16), RetainLeftmost(False, 1.5)]
)
def test_schedules_do_evict(policy: DecodingPolicy) -> None:
    member = Member(3, False, "low_confidence_dynamic", threshold=0.9, denoising_steps=32)
    schedule = Schedule(
        block_length=32,
        members=(member,) * 4,
        policy=policy,
        levels=10_000,
        unknown=0.0,
        presence=0.5,
        seed=0,
    )
    blocks = Blocks(schedule)
    blocks.run()
    assert blocks.num_evicted > 100
