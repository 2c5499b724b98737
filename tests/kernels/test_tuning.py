from __future__ import annotations

import pytest
import torch

from focus_ray.kernels import tuning
from focus_ray.kernels.tuning import HOPPER_TILES, AttentionPlan, attention_plan, num_splits

SDAR_8B = {"num_kv_heads": 8, "group": 4, "head_dim": 128}
HOPPER = torch.device("cuda", 0)


@pytest.fixture
def plan_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 132 multiprocessors, without the GPU."""
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning, "num_multiprocessors", lambda device: 132)


def plan(dtype: torch.dtype = torch.bfloat16, **sizes: int) -> AttentionPlan:
    return attention_plan(HOPPER, dtype, **{**SDAR_8B, **sizes})


@pytest.mark.usefixtures("plan_on_hopper")
@pytest.mark.parametrize(
    ("tokens_per_row", "expected"),
    [
        pytest.param(1, 16, id="a token per row"),
        pytest.param(4, 32, id="short rows, although a long one is among them"),
        pytest.param(11, 64, id="rows of a third of a block"),
        pytest.param(21, 64, id="rows of two thirds of a block"),
        pytest.param(32, 128, id="full rows, one tile each"),
    ],
)
def test_tiles_grow_with_the_mean_row(tokens_per_row: int, expected: int) -> None:
    found = plan(num_tokens=256 * tokens_per_row, busy_rows=256, max_row_len=32, max_kv_len=2048)
    assert (found.tile.block_m, found.num_splits) == (expected, 1)


@pytest.mark.usefixtures("plan_on_hopper")
def test_no_tile_is_taller_than_the_longest_row() -> None:
    found = plan(num_tokens=256 * 4, busy_rows=256, max_row_len=4, max_kv_len=2048)
    assert found.tile.block_m == 16


@pytest.mark.usefixtures("plan_on_hopper")
def test_one_long_sequence_is_spread_over_the_gpu() -> None:
    found = plan(num_tokens=32, busy_rows=1, max_row_len=32, max_kv_len=2048)
    num_tiles = 32 * SDAR_8B["group"] // found.tile.block_m
    assert num_tiles * found.num_splits * SDAR_8B["num_kv_heads"] >= 132, "a program for each SM"
    assert found.tile == HOPPER_TILES.few[0][1]


@pytest.mark.usefixtures("plan_on_hopper")
def test_a_few_sequences_take_higher_tiles_than_one() -> None:
    """Enough programs without the lowest ones, which read the pages of a row more than once."""
    found = plan(num_tokens=96, busy_rows=12, max_row_len=32, max_kv_len=2048)
    assert found.num_splits == 2
    assert found.tile == HOPPER_TILES.few[1][1]


@pytest.mark.usefixtures("plan_on_hopper")
@pytest.mark.parametrize("busy_rows", [1, 3, 500])
def test_float32_takes_the_same_plan_for_every_batch(busy_rows: int) -> None:
    found = plan(torch.float32, num_tokens=8, busy_rows=busy_rows, max_row_len=8, max_kv_len=9000)
    assert found == AttentionPlan(tuning.FLOAT32_TILE, 1, 132)


@pytest.mark.usefixtures("plan_on_hopper")
@pytest.mark.parametrize("head_dim", [192, 256, 512])
def test_large_heads_take_no_more_memory(head_dim: int) -> None:
    sizes = {"num_tokens": 640, "busy_rows": 20, "max_row_len": 32, "max_kv_len": 100}
    found = plan(**{**sizes, "head_dim": head_dim}).tile
    padded = 1 << (head_dim - 1).bit_length()
    assert found.block_n * padded <= max(tile.block_n for _, tile in HOPPER_TILES.by_row) * 128
    assert found.block_m * padded <= 128 * 128
    assert found.block_n >= 16 <= found.block_m


@pytest.mark.parametrize(
    ("num_programs", "max_kv_len", "expected"),
    [
        pytest.param(8, 2048, 16, id="as many as 128 positions each allow"),
        pytest.param(8, 100_000, 32, id="as many as fit at once"),
        pytest.param(1, 100_000, 32, id="never more than the sum of splits is worth"),
        pytest.param(100, 2048, 2, id="a power of two"),
        pytest.param(133, 2048, 1, id="a second share would have to wait"),
        pytest.param(5000, 2048, 1, id="more programs than places"),
        pytest.param(8, 90, 1, id="nothing to share"),
    ],
)
def test_splits_fill_the_gpu_once(num_programs: int, max_kv_len: int, expected: int) -> None:
    assert num_splits(num_programs, places=264, max_kv_len=max_kv_len) == expected


def test_a_cpu_takes_tiles_that_any_gpu_could() -> None:
    cpu = torch.device("cpu")
    sizes = {"num_tokens": 8, "busy_rows": 2, "max_row_len": 4, "max_kv_len": 100}
    found = attention_plan(cpu, torch.float16, **SDAR_8B, **sizes)
    assert found.tile in [tile for _, tile in tuning.SMALL_TILES.by_row]
