"""Every way to cut the products, whatever a GPU would choose; the contract has its own tests."""

from __future__ import annotations

import pytest
import torch

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.moe_placement import place
from focus_ray.kernels.moe_products import ProductTile, expert_product
from focus_ray.kernels.swiglu import swiglu_reference

# Of the norm of all results: float32 sums of some hundred products; 16-bit results round once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EXPERTS, PLACES = 3, 2

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tile", "block_t"),
    [
        pytest.param(ProductTile(32, 32, 4, 1), 16, id="low"),
        pytest.param(ProductTile(64, 64, 4, 3), 16, id="sixty-four rows"),
        pytest.param(ProductTile(128, 64, 4, 3), 64, id="high"),
        pytest.param(ProductTile(128, 32, 8, 3), 128, id="wide"),
    ],
)
@pytest.mark.parametrize(
    ("num_tokens", "out_size", "inner", "gated"),
    [
        pytest.param(1, 64, 64, False, id="one token"),
        pytest.param(40, 128, 64, False, id="more tokens than a low tile holds"),
        pytest.param(5, 74, 71, False, id="sizes that no block divides"),
        pytest.param(1, 128, 64, True, id="one token, gated"),
        pytest.param(40, 256, 64, True, id="more tokens than a low tile holds, gated"),
        pytest.param(5, 74, 71, True, id="sizes that no block divides, gated"),
    ],
)
def test_every_cut_gives_the_product(
    num_tokens: int,
    out_size: int,
    inner: int,
    gated: bool,
    tile: ProductTile,
    block_t: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, inner + 8, generator=generator).to(device, dtype)[:, :inner]
    weight_EOD = torch.randn(EXPERTS, out_size, inner, generator=generator) * inner**-0.5
    weight_EOD = weight_EOD.to(device, dtype)
    expert_Tk = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(1)[:, :PLACES]
    if not can_launch(x_TD, weight_EOD):
        pytest.skip("kernels run on CUDA, or with TRITON_INTERPRET=1 and not in bfloat16")
    placement = place(expert_Tk.int().contiguous().to(device), EXPERTS, block_t)
    found = expert_product(x_TD, weight_EOD, placement, tile, pairs_per_row=PLACES, gated=gated)
    expected = torch.einsum(
        "pd,pod->po",
        x_TD.double().repeat_interleave(PLACES, 0),
        weight_EOD.double()[expert_Tk.flatten().to(device)],
    )
    if gated:
        expected = swiglu_reference(*expected.chunk(2, dim=1))
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


@pytest.mark.gpu
def test_weights_beyond_two_to_the_31_are_found() -> None:
    """As of LLaDA2.0-flash: the last expert of more weights than 32 bits count."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.is_available() is false here")
    experts, out_size, inner = 260, 2048, 4096
    weight_EOD = torch.zeros(experts, out_size, inner, dtype=torch.bfloat16, device="cuda")
    weight_EOD[-1] = 1
    x_TD = torch.ones(2, inner, dtype=torch.bfloat16, device="cuda")
    expert_T1 = torch.tensor([[0], [experts - 1]], dtype=torch.int32, device="cuda")
    placement = place(expert_T1, experts, 16)
    tile = ProductTile(64, 128, 4, 3)
    found = expert_product(x_TD, weight_EOD, placement, tile, pairs_per_row=1)
    assert (found[0] == 0).all() and (found[1] == inner).all()
