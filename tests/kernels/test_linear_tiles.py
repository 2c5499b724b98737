from __future__ import annotations

import pytest
import torch

from focus_ray.kernels import linear_tiles
from focus_ray.kernels.linear_kernels import LinearTile
from focus_ray.kernels.linear_tiles import LEAST_PASSES, linear_tile, num_splits

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
def test_few_tokens_are_streamed_by_programs_that_fit(
    out_size: int, inner: int, gated: bool, num_tokens: int
) -> None:
    tile = choose(num_tokens, out_size, inner, gated)
    assert tile is not None
    assert inner % (tile.block_d * tile.num_splits) == 0
    assert -(-out_size // tile.block_o) * tile.num_splits > 0.7 * 132
    assert tile.num_held < LEAST_PASSES <= inner // (tile.block_d * tile.num_splits)
    block_t = max(16, 1 << (num_tokens - 1).bit_length())
    stage_bytes = (tile.block_o + block_t) * tile.block_d * 2
    assert stage_bytes * tile.num_stages <= 227 * 1024


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("num_tokens", "out_size", "inner", "dtype"),
    [
        pytest.param(65, 151936, 4096, torch.bfloat16, id="many tokens"),
        pytest.param(33, 4096, 4096, torch.bfloat16, id="more than a few, and few tiles"),
        pytest.param(8, 256, 1024, torch.bfloat16, id="a weight that stays in the cache"),
        pytest.param(8, 4096, 4104, torch.bfloat16, id="an inner size that fills no pass"),
        pytest.param(8, 65536, 256, torch.bfloat16, id="an inner size of few passes"),
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
    ("num_tokens", "out_size", "inner", "gated", "num_splits", "num_stages"),
    [
        pytest.param(16, 6144, 4096, False, 2, 3, id="qkv"),
        pytest.param(16, 4096, 4096, False, 4, 4, id="o"),
        pytest.param(16, 24576, 4096, True, 1, 3, id="gate_up"),
        pytest.param(16, 4096, 12288, False, 4, 4, id="down"),
        pytest.param(16, 151936, 4096, False, 1, 3, id="head"),
        pytest.param(32, 6144, 4096, False, 1, 5, id="qkv, 32 tokens"),
        pytest.param(32, 4096, 4096, False, 2, 5, id="o, 32 tokens"),
        pytest.param(32, 24576, 4096, True, 1, 3, id="gate_up, 32 tokens"),
        pytest.param(32, 4096, 12288, False, 2, 5, id="down, 32 tokens"),
        pytest.param(32, 151936, 4096, False, 1, 3, id="head, 32 tokens"),
    ],
)
def test_sdar_8b_is_cut_as_measured(
    num_tokens: int, out_size: int, inner: int, gated: bool, num_splits: int, num_stages: int
) -> None:
    expected = LinearTile(64, 128, num_splits, 4, num_stages, num_held=2)
    assert choose(num_tokens, out_size, inner, gated) == expected


@pytest.mark.usefixtures("hopper")
def test_products_of_many_tiles_are_streamed_longer_with_nothing_held() -> None:
    assert choose(64, 24576, 4096, True) == LinearTile(64, 128, 1, 4, 3, num_held=0)
    assert choose(64, 6144, 4096, False) is None


@pytest.mark.parametrize(
    ("num_tiles", "num_passes", "most_programs", "expected"),
    [
        pytest.param(64, 32, 264, 4, id="as many as fit"),
        pytest.param(96, 32, 132, 1, id="two would not fit"),
        pytest.param(40, 32, 132, 2, id="three would fit, and are not equal"),
        pytest.param(300, 32, 264, 1, id="not even one each"),
        pytest.param(16, 16, 264, 4, id="no shorter than worth it"),
        pytest.param(2, 19, 264, 1, id="no equal shares"),
    ],
)
def test_splits_fill_the_multiprocessors(
    num_tiles: int, num_passes: int, most_programs: int, expected: int
) -> None:
    assert num_splits(num_tiles, num_passes, most_programs) == expected
