from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.importance import importance
from focus_ray.models.eviction import Eviction
from focus_ray.models.step import StepTensors

B, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 8, 4, 2, 16, 24


def layer(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q_THd = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator)
    return q_THd, torch.randn(num_tokens, KV_HEADS, HEAD_DIM, generator=generator)


class Batch:
    """Three blocks, the second one in its last steps, and a prefill chunk behind them."""

    def __init__(self, device: torch.device) -> None:
        self.masked_NB = torch.tensor([[1] * B, [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
        self.masked_NB = self.masked_NB.bool().to(device)
        self.processed_NB = self.masked_NB.clone()
        self.processed_NB[1, 4] = self.processed_NB[2, 1] = True
        self.block_start_N = torch.tensor([40, 0, 16], device=device)
        row_lens = [*self.processed_NB.sum(1).tolist(), B]
        starts = [*self.block_start_N.tolist(), 0]
        places = [p.nonzero()[:, 0].tolist() for p in self.processed_NB] + [list(range(B))]
        positions = [s + p for s, place in zip(starts, places, strict=True) for p in place]
        limits = [s + max(p) + 1 for s, p in zip(starts, places, strict=True) for _ in p]
        num_tokens = len(positions)
        self.step = StepTensors(
            token_ids_T=torch.arange(num_tokens, device=device),
            positions_T=torch.tensor(positions, device=device),
            kv_limit_T=torch.tensor(limits, dtype=torch.int32, device=device),
            slot_T=torch.arange(num_tokens, device=device) + 1000,
            page_table_SP=torch.zeros(4, 1, dtype=torch.int32, device=device),
            row_offsets_S1=torch.tensor([0, *row_lens], device=device).cumsum(0).int(),
            max_row_len=B,
            max_kv_len=48,
        )
        self.x_TD = torch.arange(num_tokens * WIDTH, device=device).float().view(-1, WIDTH)
        self.layers = [tuple(t.to(device) for t in layer(num_tokens, seed)) for seed in (0, 1)]

    def evict(
        self,
        target: int,
        *,
        attend_cached: bool = False,
        importance_dtype: torch.dtype = torch.float32,
    ) -> tuple[Eviction, StepTensors]:
        """Run both layers; residual stream and queries are those of the retained tokens."""
        eviction = Eviction(
            self.processed_NB,
            self.masked_NB,
            torch.full_like(self.block_start_N, target),
            torch.full_like(self.block_start_N, B - 1),
            self.block_start_N,
            importance_dtype=importance_dtype,
            attend_cached=attend_cached,
        )
        (q0_THd, k0_TKd), (q1_THd, k1_TKd) = self.layers
        eviction.observe(q0_THd, k0_TKd, self.step)
        x_RD, q_RHd, step = eviction.retain(self.x_TD, q1_THd, k1_TKd, self.step)
        token_R = step.slot_T - 1000
        assert torch.equal(x_RD, self.x_TD[token_R])
        assert torch.equal(q_RHd, q1_THd[token_R])
        assert torch.equal(step.positions_T, self.step.positions_T[token_R])
        return eviction, step


def test_what_later_layers_see(device: torch.device) -> None:
    batch = Batch(device)
    eviction, step = batch.evict(target=1)
    kept_NB = eviction.kept_NB
    assert kept_NB[1].nonzero()[:, 0].tolist() == [3, 4]  # one mask is no choice
    assert kept_NB[2, 1]
    assert 0 < (kept_NB & batch.masked_NB).sum() < batch.masked_NB.sum()
    row_lens = step.row_offsets_S1.diff().tolist()
    assert row_lens == [*kept_NB.sum(1).tolist(), B]
    rightmost = [max(kept_B.nonzero()[:, 0].tolist()) for kept_B in kept_NB]
    for row, limits in enumerate(step.kv_limit_T.split(row_lens)[:3]):
        assert set(limits.tolist()) == {int(batch.block_start_N[row]) + rightmost[row] + 1}
    assert torch.equal(step.kv_limit_T[-B:], batch.step.kv_limit_T[-B:])
    place_Q = (kept_NB & batch.masked_NB).flatten().nonzero()[:, 0]
    assert torch.equal(eviction.masked_place_Q, place_Q)
    position_Q = batch.block_start_N[place_Q // B] + place_Q % B
    assert torch.equal(step.positions_T[eviction.masked_row_Q], position_Q)


def test_the_change_of_importance_decides(device: torch.device) -> None:
    batch = Batch(device)
    eviction, _ = batch.evict(target=1)
    masks = (batch.step.row_offsets_S1, batch.processed_NB, batch.masked_NB)
    first_NB, second_NB = (importance(*layer, *masks) for layer in batch.layers)
    assert torch.equal(eviction.delta_NB, second_NB - first_NB)
    best_N = torch.where(batch.masked_NB, eviction.delta_NB, -torch.inf).argmax(1)
    assert eviction.kept_NB.gather(1, best_N[:, None]).all()


def test_importances_are_rounded_before_they_are_compared(device: torch.device) -> None:
    batch = Batch(device)
    eviction, _ = batch.evict(target=1, importance_dtype=torch.bfloat16)
    masks = (batch.step.row_offsets_S1, batch.processed_NB, batch.masked_NB)
    first_NB, second_NB = (importance(*layer, *masks).bfloat16().float() for layer in batch.layers)
    assert torch.equal(eviction.delta_NB, second_NB - first_NB)


def test_a_target_that_evicts_nothing_changes_nothing(device: torch.device) -> None:
    batch = Batch(device)
    eviction, step = batch.evict(target=B)
    assert torch.equal(eviction.kept_NB, batch.processed_NB)
    for name in ("positions_T", "slot_T", "kv_limit_T", "row_offsets_S1"):
        assert torch.equal(getattr(step, name), getattr(batch.step, name))


def test_decoded_tokens_behind_the_retained_ones_can_be_seen(device: torch.device) -> None:
    batch = Batch(device)
    _, step = batch.evict(target=1, attend_cached=True)
    first, end = step.row_offsets_S1[1:3].tolist()
    assert step.kv_limit_T[first:end].tolist() == [B] * 2


def test_layer_0_comes_first(device: torch.device) -> None:
    batch = Batch(device)
    eviction = Eviction(
        batch.processed_NB,
        batch.masked_NB,
        torch.ones_like(batch.block_start_N),
        torch.ones_like(batch.block_start_N),
        batch.block_start_N,
        importance_dtype=torch.float32,
        attend_cached=False,
    )
    with pytest.raises(AssertionError, match="layer 0"):
        eviction.retain(batch.x_TD, *batch.layers[1], batch.step)
