"""A model under eviction: who goes past layer 1, and what is written for those who do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.compact import Compacted
from focus_ray.kernels.retain import Retained
from focus_ray.kernels.rows import Rows
from focus_ray.models.base import BlockDiffusionModel
from focus_ray.models.eviction import Eviction
from focus_ray.models.kv_cache import KVCache
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.step import StepTensors

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
B, NUM_ROWS, PADDING = 8, 3, 5
NUM_TOKENS = NUM_ROWS * B


@dataclass
class Pass:
    """One step of three first blocks, all masked but for two tokens of the last, and padding."""

    loaded: LoadedModel
    device: torch.device
    target: int

    def __post_init__(self) -> None:
        spec, device = self.loaded.spec, self.device
        num_kv_heads, head_dim = self.model.kv_shape
        self.cache = KVCache(
            num_layers=spec.num_layers,
            num_pages=NUM_ROWS,
            page_size=B,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=self.loaded.dtype,
            device=device,
        )
        rows = Rows.allocate(NUM_ROWS, B, NUM_ROWS, NUM_TOKENS + PADDING, device)
        rows.processed_SB.fill_(True)
        rows.masked_SB.fill_(True)
        rows.masked_SB[2, :2] = False
        rows.row_slot_S.copy_(torch.arange(NUM_ROWS))
        rows.row_offsets_S1.copy_(torch.arange(NUM_ROWS + 1) * B)
        rows.target_S.copy_(rows.masked_SB.sum(1).clamp(max=self.target))
        rows.progress_S.fill_(B - 1)
        rows.positions_C[:NUM_TOKENS] = torch.arange(NUM_TOKENS, device=device) % B
        rows.slot_C.fill_(self.cache.trash_slot)
        rows.slot_C[:NUM_TOKENS] = torch.arange(NUM_TOKENS, device=device)
        self.rows = rows
        token_ids = torch.arange(NUM_TOKENS + PADDING) * 7 % spec.vocab_size
        self.step = StepTensors(
            token_ids_T=token_ids.to(device),
            positions_T=rows.positions_C,
            kv_limit_T=torch.full_like(rows.kv_limit_C, B),
            slot_T=rows.slot_C,
            page_table_MP=torch.arange(NUM_ROWS, dtype=torch.int32, device=device)[:, None],
            row_table_S=rows.row_slot_S,
            row_offsets_S1=rows.row_offsets_S1,
            max_row_len=B,
            max_kv_len=B,
            busy_rows=NUM_ROWS,
        )
        self.retained = Retained.allocate(NUM_ROWS, B, device)

    @property
    def model(self) -> BlockDiffusionModel:
        return self.loaded.model

    @torch.inference_mode()
    def without_eviction(self) -> Tensor:
        """Hidden states of the tokens, padding left out."""
        x_TD, q_THd = self.model.begin(self.step, self.cache)
        return self.model.finish(x_TD, q_THd, self.step, self.cache)[:NUM_TOKENS]

    @torch.inference_mode()
    def with_eviction(self) -> Tensor:
        """Hidden states of the retained tokens."""
        compacted = Compacted.allocate(
            NUM_TOKENS + PADDING,
            NUM_ROWS,
            self.model.hidden_size,
            self.model.query_shape,
            self.model.dtype,
            self.device,
        )
        eviction = Eviction(
            self.rows,
            self.retained,
            compacted,
            trash_slot=self.cache.trash_slot,
            importance_dtype=torch.float32,
            attend_cached=False,
        )
        x_TD, q_THd = self.model.begin(self.step, self.cache, eviction)
        x_RD, q_RHd, step = eviction.compact(x_TD, q_THd, self.step)
        hidden_RD = self.model.finish(x_RD, q_RHd, step, self.cache)
        return hidden_RD[: int(self.retained.counts_2[0])]


@pytest.fixture(params=["sdar", "sdar_moe", "llada2"])
def loaded(request: pytest.FixtureRequest, device: torch.device) -> LoadedModel:
    return load_model(str(GOLDEN / request.param), device=device, dtype=torch.float32)


def test_nobody_evicted_is_as_without_eviction(loaded: LoadedModel, device: torch.device) -> None:
    expected_TD = Pass(loaded, device, target=B).without_eviction()
    found_RD = Pass(loaded, device, target=B).with_eviction()
    torch.testing.assert_close(found_RD, expected_TD)


def test_evicted_tokens_leave_keys_in_two_layers(loaded: LoadedModel, device: torch.device) -> None:
    step = Pass(loaded, device, target=1)
    hidden_RD = step.with_eviction()
    kept_T = step.retained.kept_NB.flatten()
    assert 0 < kept_T.sum() < NUM_TOKENS
    assert hidden_RD.shape == (int(kept_T.sum()), step.model.hidden_size)
    for pages in (step.cache.keys, step.cache.values):
        written_LT = pages[:, :NUM_ROWS].flatten(1, 2).any(-1).any(-1)
        assert written_LT[:2].all()
        assert torch.equal(written_LT[2:], kept_T.expand(len(written_LT) - 2, -1))
    assert step.retained.kept_NB[2, :2].all()  # decoded


def test_later_layers_see_a_block_up_to_its_rightmost_retained_token(
    loaded: LoadedModel, device: torch.device
) -> None:
    step = Pass(loaded, device, target=1)
    found_RD = step.with_eviction()
    again = Pass(loaded, device, target=1)
    again.cache.keys[2:, :NUM_ROWS] = 1.0  # what evicted tokens once left in deeper layers
    assert not torch.equal(again.with_eviction(), found_RD)
    limits = [row.nonzero().max() for row in step.retained.kept_NB]
    past = Pass(loaded, device, target=1)
    for row, last in enumerate(limits):
        past.cache.keys[2:, row, int(last) + 1 :] = torch.nan  # nobody looks there
    torch.testing.assert_close(past.with_eviction(), found_RD)
