from __future__ import annotations

import pytest
import torch

from focus_ray.kernels import linear_tiles
from focus_ray.kernels.linear_kernels import LinearTile
from focus_ray.kernels.linear_tiles import linear_tile, num_splits

SDAR_8B = [
    pytest.param(6144, 4096, False, id="qkv"),
    pytest.param(4096, 4096, False, id="o"),
    pytest.param(24576, 4096, True, id="gate_up"),
    pytest.param(4096, 12288, False, id="down"),
    pytest.param(151936, 4096, False, id="head"),
]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 132 multiprocessors, without the GPU."""
    monkeypatch.setattr(linear_tiles, "capability", lambda device: (9, 0))
    monkeypatch.setattr(linear_tiles, "num_multiprocessors", lambda device: 132)


def choose(
    num_tokens: int, out_size: int, inner: int, gated: bool, dtype: torch.dtype = torch.bfloat16
) -> LinearTile | None:
    x_TD = torch.empty(num_tokens, inner, dtype=dtype, device="meta")
    weight_OD = torch.empty(out_size, inner, dtype=dtype, device="meta")
    return linear_tile(x_TD, weight_OD, gated=gated)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 32])
@pytest.mark.parametrize(("out_size", "inner", "gated"), SDAR_8B)
def test_few_tokens_are_streamed_by_at_least_a_program_per_multiprocessor(
    out_size: int, inner: int, gated: bool, num_tokens: int
) -> None:
    tile = choose(num_tokens, out_size, inner, gated)
    assert tile is not None
    assert inner % (tile.block_d * tile.num_splits) == 0
    assert -(-out_size // tile.block_o) * tile.num_splits >= 132
    block_t = max(16, 1 << (num_tokens - 1).bit_length())
    stage_bytes = (tile.block_o + block_t) * tile.block_d * 2
    assert stage_bytes * tile.num_stages <= 227 * 1024


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("num_tokens", "out_size", "inner", "dtype"),
    [
        pytest.param(65, 151936, 4096, torch.bfloat16, id="many tokens"),
        pytest.param(33, 4096, 4096, torch.bfloat16, id="more than a few, and splits"),
        pytest.param(8, 256, 1024, torch.bfloat16, id="a weight that stays in the cache"),
        pytest.param(8, 4096, 4104, torch.bfloat16, id="an inner size that fills no pass"),
        pytest.param(8, 4096, 4096, torch.float32, id="float32"),
    ],
)
def test_the_rest_is_left_to_cublas(
    num_tokens: int, out_size: int, inner: int, dtype: torch.dtype
) -> None:
    assert choose(num_tokens, out_size, inner, False, dtype) is None


def test_other_gpus_are_left_to_cublas() -> None:
    assert choose(8, 4096, 4096, False) is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("out_size", "inner", "gated", "num_splits", "num_stages"),
    [
        pytest.param(6144, 4096, False, 2, 3, id="qkv"),
        pytest.param(4096, 4096, False, 4, 4, id="o"),
        pytest.param(24576, 4096, True, 1, 3, id="gate_up"),
        pytest.param(4096, 12288, False, 3, 3, id="down"),
        pytest.param(151936, 4096, False, 1, 3, id="head"),
    ],
)
def test_sdar_8b_is_cut_as_measured(
    out_size: int, inner: int, gated: bool, num_splits: int, num_stages: int
) -> None:
    expected = LinearTile(64, 128, num_splits, 4, num_stages)
    assert choose(16, out_size, inner, gated) == expected


@pytest.mark.usefixtures("hopper")
def test_products_without_splits_are_streamed_longer() -> None:
    assert choose(64, 24576, 4096, True) is not None
    assert choose(64, 6144, 4096, False) is None


@pytest.mark.parametrize(
    ("num_tiles", "num_passes", "expected"),
    [
        pytest.param(64, 32, 4, id="a divisor of the passes past what is wanted"),
        pytest.param(64, 96, 3, id="as many as wanted"),
        pytest.param(300, 32, 1, id="enough without"),
        pytest.param(4, 7, 7, id="a pass each"),
        pytest.param(2, 19, 1, id="no equal shares"),
    ],
)
def test_splits_give_multiprocessors_more_than_a_program(
    num_tiles: int, num_passes: int, expected: int
) -> None:
    assert num_splits(num_tiles, num_passes, 132) == expected
