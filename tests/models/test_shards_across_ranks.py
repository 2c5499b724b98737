"""A model on several ranks computes what it computes on one, and the same bits on all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_golden import forward
from ranks import Ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from focus_ray.kernels.compact import Compacted
from focus_ray.kernels.retain import Retained
from focus_ray.kernels.rows import Rows
from focus_ray.models.eviction import Eviction
from focus_ray.models.loading import load_model
from focus_ray.models.parallel import WHOLE, Shards
from focus_ray.models.step import StepTensors

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
SIZES = [2, 4]  # four ranks share the two KV heads of the golden checkpoints

pytestmark = pytest.mark.timeout(300)  # ranks start with the first test


def prompt_logits(shards: Shards, folder: str) -> tuple[Tensor, Tensor]:
    """Logits of a prompt over the whole vocabulary, and what goes into every layer."""
    loaded = load_model(folder, device="cpu", dtype=torch.float32, shards=shards)
    prompt_T = torch.arange(1, 500, 7) * 31 % loaded.spec.vocab_size
    with torch.inference_mode():
        logits_TV, streams = forward(loaded, prompt_T, block_length=8)
    parts_NTV = shards.gather(logits_TV.contiguous())
    return torch.cat([*parts_NTV], dim=1), torch.stack(streams)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2"])
def test_logits_of_every_family(ranks: Ranks, family: str, size: int) -> None:
    folder = str(GOLDEN / family)
    check_logits(ranks, folder, size)


@pytest.mark.parametrize("size", SIZES)
def test_a_tied_head_is_the_ranks_part_of_the_embedding(
    ranks: Ranks, size: int, tmp_path: Path
) -> None:
    weights = load_file(GOLDEN / "sdar" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    fields = json.loads((GOLDEN / "sdar" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    check_logits(ranks, str(tmp_path), size)


def check_logits(ranks: Ranks, folder: str, size: int) -> None:
    whole_TV, whole_streams = prompt_logits(WHOLE, folder)
    found = ranks.run(size, prompt_logits, folder)
    for logits_TV, streams in found:
        assert torch.equal(logits_TV, found[0][0])
        assert torch.equal(streams, found[0][1])
        # float32 sums in another order: of heads, of intermediate dimensions
        for part, expected in ((logits_TV, whole_TV), (streams, whole_streams)):
            assert ((part - expected).abs().max() / expected.abs().max()).item() <= 1e-4


B, NUM_ROWS, HEADS, KV_HEADS, HEAD_DIM, NUM_STEPS = 16, 4, 4, 2, 32, 50


def kept_of_random_steps(shards: Shards, importance_dtype: torch.dtype) -> Tensor:
    """What is retained in each of many steps, from this rank's heads of random ones."""
    heads, kv_heads = shards.part(HEADS), shards.part(KV_HEADS)
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(NUM_STEPS):
        rows = Rows.allocate(NUM_ROWS, B, NUM_ROWS, NUM_ROWS * B, "cpu")
        rows.processed_SB.fill_(True)
        rows.masked_SB.copy_(torch.rand(NUM_ROWS, B, generator=generator) < 0.8)
        target_S = torch.randint(1, B, (NUM_ROWS,), generator=generator)
        rows.target_S.copy_(torch.minimum(target_S, rows.masked_SB.sum(1)))
        rows.progress_S.copy_(torch.randint(-1, B, (NUM_ROWS,), generator=generator))
        rows.row_offsets_S1.copy_(torch.arange(NUM_ROWS + 1) * B)
        step = step_of(rows)
        retained = Retained.allocate(NUM_ROWS, B, "cpu")
        eviction = Eviction(
            rows,
            retained,
            Compacted.allocate(1, NUM_ROWS, 1, (1, 1), torch.float32, torch.device("cpu")),
            trash_slot=0,
            importance_dtype=importance_dtype,
            attend_cached=True,
            shards=shards,
        )
        for take in (eviction.observe, eviction.choose):
            q_THd = torch.randn(NUM_ROWS * B, HEADS, HEAD_DIM, generator=generator)
            k_TKd = torch.randn(NUM_ROWS * B, KV_HEADS, HEAD_DIM, generator=generator)
            own_q_THd = q_THd[:, heads.start : heads.stop]
            take(own_q_THd, k_TKd[:, kv_heads.start : kv_heads.stop], step)
        kept.append(retained.kept_NB)
    return torch.stack(kept)


def step_of(rows: Rows) -> StepTensors:
    """Of which eviction reads the rows alone."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return StepTensors(
        token_ids_T=nothing,
        positions_T=nothing,
        kv_limit_T=nothing,
        slot_T=nothing,
        page_table_MP=nothing,
        row_table_S=rows.row_slot_S,
        row_offsets_S1=rows.row_offsets_S1,
        max_row_len=B,
        max_kv_len=B,
        busy_rows=NUM_ROWS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_evict_what_one_evicts(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    expected = kept_of_random_steps(WHOLE, dtype)
    found = ranks.run(size, kept_of_random_steps, dtype)
    assert all(torch.equal(kept, found[0]) for kept in found)
    assert torch.equal(found[0], expected)
    assert 0.2 < expected.float().mean() < 0.9


def told(shards: Shards) -> tuple[int, int, list[int]]:
    """The exchanges that decide sizes, two of nothing, and a sum in half precision."""
    assert shards.gather(torch.zeros(3, 0)).shape == (shards.size, 3, 0)
    assert shards.add_up(torch.zeros(0, 3)).shape == (0, 3)
    assert shards.add_up(torch.ones(2, dtype=torch.bfloat16)).tolist() == [shards.size] * 2
    number = torch.tensor([shards.rank])
    return (
        shards.least(7 - shards.rank),
        shards.of_first(5 + shards.rank),
        [*shards.gather(number).flatten().tolist()],
    )


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_are_told_the_same(ranks: Ranks, size: int) -> None:
    assert ranks.run(size, told) == [(8 - size, 5, list(range(size)))] * size


def fail_on_the_last(shards: Shards) -> None:
    if shards.rank == shards.size - 1:
        raise ValueError("no such thing")


def test_what_a_rank_raises_is_told(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2.*ValueError: no such thing"):
        ranks.run(2, fail_on_the_last)
