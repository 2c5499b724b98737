from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.compact import Compacted
from focus_ray.kernels.importance import importance
from focus_ray.kernels.retain import Retained
from focus_ray.kernels.rows import Rows
from focus_ray.models.eviction import Eviction
from focus_ray.models.step import StepTensors

B, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 8, 4, 2, 16, 24
TRASH_SLOT, NUM_SLOTS = 9000, 6
# Blocks of slots 3, 5 and 0 decode, the second one in its last steps; the last row is a prompt's
# block of slot 4. Room for more rows and tokens than there are.
MASKED = [[1] * B, [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1], [0] * B]
DECODED = [[0] * B, [0, 0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [1] * B]
SLOTS, STARTS = [3, 5, 0, 4], [40, 0, 16, 0]


def layer(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q_THd = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator)
    return q_THd, torch.randn(num_tokens, KV_HEADS, HEAD_DIM, generator=generator)


class Batch:
    """A step of four rows; ``padding`` tokens and two empty rows stand behind."""

    def __init__(self, device: torch.device, target: int, padding: int = 0) -> None:
        num_rows = len(SLOTS)
        processed_SB = torch.tensor(MASKED).bool() | torch.tensor(DECODED).bool()
        row_lens = processed_SB.sum(1)
        self.num_tokens = int(row_lens.sum())
        self.num_padded = self.num_tokens + padding
        rows = Rows.allocate(NUM_SLOTS, B, num_rows + 2, 60, "cpu")
        rows.processed_SB[:num_rows] = processed_SB
        rows.masked_SB[:num_rows] = torch.tensor(MASKED).bool()
        rows.row_slot_S[:num_rows] = torch.tensor(SLOTS)
        rows.row_start_S[:num_rows] = torch.tensor(STARTS)
        rows.row_offsets_S1[1 : num_rows + 1] = row_lens.cumsum(0)
        rows.row_offsets_S1[num_rows + 1 :] = self.num_tokens
        rows.target_S[:num_rows] = rows.masked_SB[:num_rows].sum(1).clamp(max=target)
        rows.progress_S[:num_rows] = torch.tensor([B - 1] * 3 + [-1])
        rows.slot_C[:] = TRASH_SLOT
        rows.slot_C[: self.num_tokens] = torch.arange(self.num_tokens) + 1000
        position_SB = torch.tensor(STARTS)[:, None] + torch.arange(B)
        rows.positions_C[: self.num_tokens] = position_SB[processed_SB]
        self.rows = Rows(**{name: tensor.to(device) for name, tensor in vars(rows).items()})
        self.masked_SB = self.rows.masked_SB
        self.step = StepTensors(
            token_ids_T=torch.arange(self.num_padded, device=device),
            positions_T=self.rows.positions_C[: self.num_padded],
            kv_limit_T=torch.ones(self.num_padded, dtype=torch.int32, device=device),
            slot_T=self.rows.slot_C[: self.num_padded],
            page_table_MP=torch.zeros(NUM_SLOTS, 1, dtype=torch.int32, device=device),
            row_table_S=self.rows.row_slot_S,
            row_offsets_S1=self.rows.row_offsets_S1,
            max_row_len=B,
            max_kv_len=48,
            busy_rows=num_rows,
        )
        self.x_TD = torch.arange(self.num_padded * WIDTH, device=device).float().view(-1, WIDTH)
        self.layers = [tuple(t.to(device) for t in layer(self.num_padded, seed)) for seed in (0, 1)]
        self.retained = Retained.allocate(num_rows + 5, B, device)
        self.compacted = Compacted.allocate(
            70, num_rows + 5, WIDTH, (HEADS, HEAD_DIM), torch.float32, device
        )

    def eviction(
        self, attend_cached: bool = False, importance_dtype: torch.dtype = torch.float32
    ) -> Eviction:
        return Eviction(
            self.rows,
            self.retained,
            self.compacted,
            trash_slot=TRASH_SLOT,
            importance_dtype=importance_dtype,
            attend_cached=attend_cached,
        )

    def evict(
        self, attend_cached: bool = False, importance_dtype: torch.dtype = torch.float32
    ) -> StepTensors:
        """Run both layers; what stands before the padding belongs to the retained tokens."""
        eviction = self.eviction(attend_cached, importance_dtype)
        (q0_THd, k0_TKd), (q1_THd, k1_TKd) = self.layers
        eviction.observe(q0_THd, k0_TKd, self.step)
        eviction.choose(q1_THd, k1_TKd, self.step)
        x_RD, q_RHd, step = eviction.compact(self.x_TD, q1_THd, self.step)
        assert len(x_RD) == len(q_RHd) == len(step.positions_T) == self.num_padded
        num_retained = int(self.retained.counts_2[0])
        token_R = step.slot_T[:num_retained] - 1000
        assert torch.equal(x_RD[:num_retained], self.x_TD[token_R])
        assert torch.equal(q_RHd[:num_retained], q1_THd[token_R])
        assert torch.equal(step.positions_T[:num_retained], self.step.positions_T[token_R])
        assert (step.slot_T[num_retained:] == TRASH_SLOT).all()
        return step

    def importances(self) -> tuple[Tensor, ...]:
        """Of both layers, of rows that can evict."""
        masks = (self.rows.row_offsets_S1, self.rows.processed_SB, self.masked_SB)
        return tuple(importance(*layer, *masks, self.rows.target_S) for layer in self.layers)


@pytest.mark.parametrize("padding", [0, 5])
def test_what_later_layers_see(padding: int, device: torch.device) -> None:
    batch = Batch(device, target=1, padding=padding)
    step = batch.evict()
    kept_SB = batch.retained.kept_NB[: len(batch.masked_SB)]
    num_retained, num_masked = batch.retained.counts_2.tolist()
    assert kept_SB[1].nonzero()[:, 0].tolist() == [3, 4]  # one mask is no choice
    assert kept_SB[2, 1]
    assert kept_SB[3].all()
    assert 0 < (kept_SB & batch.masked_SB).sum() < batch.masked_SB.sum()
    row_lens = step.row_offsets_S1.diff().tolist()
    assert row_lens == kept_SB.sum(1).tolist() == [*row_lens[:4], 0, 0]
    rightmost = [max(kept_B.nonzero()[:, 0].tolist()) for kept_B in kept_SB[:4]]
    limits = step.kv_limit_T[:num_retained].split(row_lens)
    for row, limit_L in enumerate(limits[:4]):
        assert set(limit_L.tolist()) == {STARTS[row] + rightmost[row] + 1}
    place_Q = batch.compacted.open_place_Q[:num_masked].cpu()
    row_Q, position_Q = (kept_SB & batch.masked_SB).cpu().nonzero().unbind(1)
    assert torch.equal(place_Q, torch.tensor(SLOTS)[row_Q] * B + position_Q)
    token_Q = batch.compacted.open_row_Q[:num_masked]
    absolute_Q = torch.tensor(STARTS)[row_Q] + position_Q
    assert torch.equal(step.positions_T[token_Q].cpu(), absolute_Q)
    padding_places = batch.compacted.open_place_Q[num_masked : batch.num_padded]
    assert (padding_places == NUM_SLOTS * B).all()


def test_the_change_of_importance_decides(device: torch.device) -> None:
    batch = Batch(device, target=1)
    batch.evict()
    first_SB, second_SB = batch.importances()
    delta_SB = batch.retained.delta_NB[: len(first_SB)]
    assert torch.equal(delta_SB, second_SB - first_SB)
    best_S = torch.where(batch.masked_SB, delta_SB, -torch.inf).argmax(1)
    kept_SB = batch.retained.kept_NB[: len(first_SB)]
    assert kept_SB.gather(1, best_S[:, None])[:3].all()


def test_importances_are_rounded_before_they_are_compared(device: torch.device) -> None:
    batch = Batch(device, target=1)
    batch.evict(importance_dtype=torch.bfloat16)
    first_SB, second_SB = (layer.bfloat16().float() for layer in batch.importances())
    assert torch.equal(batch.retained.delta_NB[: len(first_SB)], second_SB - first_SB)


def test_a_target_that_evicts_nothing_changes_nothing(device: torch.device) -> None:
    batch = Batch(device, target=B)
    step = batch.evict()
    assert torch.equal(batch.retained.kept_NB[:6], batch.rows.processed_SB)
    for name in ("positions_T", "slot_T", "row_offsets_S1"):
        assert torch.equal(getattr(step, name), getattr(batch.step, name))


def test_decoded_tokens_behind_the_retained_ones_can_be_seen(device: torch.device) -> None:
    step = Batch(device, target=1).evict(attend_cached=True)
    first, end = step.row_offsets_S1[1:3].tolist()
    assert step.kv_limit_T[first:end].tolist() == [B] * 2


def test_steps_of_few_rows_leave_the_buffers_of_others_alone(device: torch.device) -> None:
    batch = Batch(device, target=1)
    batch.retained.kept_NB[2:].fill_(True)
    first_two = int(batch.rows.row_offsets_S1[2])
    batch.step = replace(
        batch.step,
        row_table_S=batch.step.row_table_S[:2],
        row_offsets_S1=batch.step.row_offsets_S1[:3],
    )
    step = batch.evict()
    assert batch.retained.kept_NB[2:].all()
    assert int(batch.retained.counts_2[0]) == int(step.row_offsets_S1[2]) < first_two
    assert len(step.row_offsets_S1) == 3


def test_layer_0_comes_first(device: torch.device) -> None:
    batch = Batch(device, target=1)
    eviction = batch.eviction()
    eviction.observe(*batch.layers[0], batch.step)
    eviction.choose(*batch.layers[1], batch.step)
    with pytest.raises(AssertionError, match="layer 0"):
        eviction.choose(*batch.layers[1], batch.step)
