"""Every way to cut a product, whatever a GPU would choose; the contract has its own tests."""

from __future__ import annotations

import pytest
import torch

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.linear_kernels import (
    LinearTile,
    launch_linear,
    launch_partial_linear,
)
from focus_ray.kernels.split_counters import finished_counters
from focus_ray.kernels.swiglu import swiglu_reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TILES = [
    pytest.param(LinearTile(64, 32, 1, 4, 3), id="whole"),
    pytest.param(LinearTile(64, 32, 2, 4, 3), id="two splits"),
    pytest.param(LinearTile(64, 32, 6, 4, 3), id="a split is one pass"),
    pytest.param(LinearTile(16, 64, 3, 4, 3), id="low"),
    pytest.param(LinearTile(128, 64, 1, 8, 3), id="high"),
    pytest.param(LinearTile(64, 32, 1, 4, 3, 2), id="whole, two passes held"),
    pytest.param(LinearTile(64, 32, 2, 4, 3, 1), id="two splits, a pass held"),
]
INNER = 192

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("num_tokens", "out_size", "gated"),
    [
        pytest.param(1, 128, False, id="one token"),
        pytest.param(17, 150, False, id="tiles not full"),
        pytest.param(33, 128, True, id="gated, tokens that fill no tile"),
    ],
)
def test_every_cut_gives_the_same(
    num_tokens: int,
    out_size: int,
    gated: bool,
    tile: LinearTile,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, INNER + 8, generator=generator).to(device, dtype)[:, :INNER]
    weight_OD = (torch.randn(out_size, INNER, generator=generator) * INNER**-0.5).to(device, dtype)
    if not can_launch(x_TD, weight_OD):
        pytest.skip("kernels run on CUDA, or with TRITON_INTERPRET=1 and not in bfloat16")
    found = launch_linear(x_TD, weight_OD, tile, gated=gated)
    expected = x_TD.double() @ weight_OD.double().T
    if gated:
        expected = swiglu_reference(*expected.chunk(2, dim=1))
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]
    assert torch.equal(launch_linear(x_TD, weight_OD, tile, gated=gated), found)
    assert not finished_counters(device).any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "tile",
    [
        pytest.param(LinearTile(64, 32, 2, 4, 3), id="two splits"),
        pytest.param(LinearTile(64, 32, 3, 4, 3, 1), id="three splits, a pass held"),
    ],
)
@pytest.mark.parametrize(
    ("num_tokens", "out_size"),
    [
        pytest.param(1, 64, id="one token"),
        pytest.param(17, 150, id="tiles not full"),
    ],
)
def test_shares_left_to_others_have_the_same_sum(
    num_tokens: int, out_size: int, tile: LinearTile, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, INNER, generator=generator).to(device, dtype)
    weight_OD = torch.randn(out_size, INNER, generator=generator).to(device, dtype)
    if not can_launch(x_TD, weight_OD):
        pytest.skip("kernels run on CUDA, or with TRITON_INTERPRET=1 and not in bfloat16")
    left = launch_partial_linear(x_TD, weight_OD, tile)
    assert left.sums_STO.shape == (tile.num_splits, num_tokens, out_size)
    assert left.shape == (num_tokens, out_size)
    assert torch.equal(left.total(), launch_linear(x_TD, weight_OD, tile))


def test_gated_rounds_as_the_operations_one_by_one(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(7, INNER, generator=generator).to(device, torch.float16)
    weight_OD = torch.randn(128, INNER, generator=generator).to(device, torch.float16)
    tile = LinearTile(64, 64, 3, 4, 3)
    both = launch_linear(x_TD, weight_OD, tile)
    gated = launch_linear(x_TD, weight_OD, tile, gated=True)
    ulps = (gated.double() - swiglu_reference(*both.chunk(2, dim=1)).double()).abs()
    # torch computes exp another way: where that falls on the other side of a rounding, one unit
    assert (ulps / gated.double().abs().clamp_min(1e-2)).max() < 2**-9
    assert (ulps > 0).double().mean() < 0.01
