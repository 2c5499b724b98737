from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.partial_sums import PartialSums
from focus_ray.kernels.rms_norm import add_rms_norm, rms_norm

# One rounding of the result: half a unit in the last place, at values up to about 8.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
EPS = 1e-6


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """The formula in float64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 4096), id="rows of the stream of SDAR-8B"),
        pytest.param((3, 2560), id="a width that is no power of two"),
        pytest.param((3, 4, 41), id="heads of an odd size"),
        pytest.param((1, 1), id="one value"),
        pytest.param((0, 8), id="no rows"),
    ],
)
def test_equals_the_formula_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x = random(*shape).to(device, dtype)
    weight = (1 + random(shape[-1], seed=1) / 4).to(device, dtype)
    found = rms_norm(x, weight, EPS)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), normed(x, weight), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "width"),
    [
        pytest.param(3, 4096, id="SDAR-8B"),
        pytest.param(5, 41, id="an odd width"),
        pytest.param(1, 1, id="one value"),
        pytest.param(0, 8, id="no tokens"),
    ],
)
def test_the_norm_of_a_sum_is_that_of_the_rounded_sum(
    num_tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TD = random(num_tokens, width).to(device, dtype)
    residual_TD = random(num_tokens, width, seed=1).to(device, dtype)
    weight = (1 + random(width, seed=2) / 4).to(device, dtype)
    before = x_TD.clone(), residual_TD.clone()
    found_TD, sum_TD = add_rms_norm(x_TD, residual_TD, weight, EPS)
    assert torch.equal(sum_TD, x_TD + residual_TD)
    assert torch.equal(found_TD, rms_norm(x_TD + residual_TD, weight, EPS))
    torch.testing.assert_close(
        found_TD.double(), normed(sum_TD, weight), rtol=0, atol=TOLERANCE[dtype]
    )
    assert torch.equal(x_TD, before[0])
    assert torch.equal(residual_TD, before[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_shares", "num_tokens", "width"),
    [
        pytest.param(4, 3, 4096, id="SDAR-8B"),
        pytest.param(2, 5, 41, id="an odd width"),
        pytest.param(1, 1, 1, id="one value"),
        pytest.param(2, 0, 8, id="no tokens"),
    ],
)
def test_partial_sums_are_added_as_their_rounded_total(
    num_shares: int, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TD = random(num_tokens, width).to(device, dtype)
    sums_STD = random(num_shares, num_tokens, width, seed=1).to(device) / num_shares
    weight = (1 + random(width, seed=2) / 4).to(device, dtype)
    left = PartialSums(sums_STD, dtype)
    exact = sums_STD.double().sum(dim=0)
    torch.testing.assert_close(left.total().double(), exact, rtol=0, atol=TOLERANCE[dtype])
    found = add_rms_norm(x_TD, left, weight, EPS)
    for found_TD, expected_TD in zip(
        found, add_rms_norm(x_TD, left.total(), weight, EPS), strict=True
    ):
        assert torch.equal(found_TD, expected_TD)


def test_rows_may_lie_apart(device: torch.device) -> None:
    wide = random(6, 100).to(device)
    weight = random(33, seed=1).to(device)
    x_TD, residual_TD = wide[::2, 1:34], random(3, 50, seed=2).to(device)[:, 9:42]
    assert torch.equal(rms_norm(x_TD, weight, EPS), rms_norm(x_TD.contiguous(), weight, EPS))
    apart = add_rms_norm(x_TD, residual_TD, weight, EPS)
    together = add_rms_norm(x_TD.contiguous(), residual_TD.contiguous(), weight, EPS)
    for found, expected in zip(apart, together, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_once_after_the_weight(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(64, 64).to(device, dtype), random(64, seed=1).to(device, dtype)
    expected = rms_norm(x.float(), weight.float(), EPS).to(dtype)
    assert torch.equal(rms_norm(x, weight, EPS), expected)


def test_eps_keeps_zeros_finite(device: torch.device) -> None:
    zeros, ones = torch.zeros(2, 4, device=device), torch.ones(4, device=device)
    assert torch.equal(rms_norm(zeros, ones, EPS), zeros)


@pytest.mark.parametrize(
    ("x", "residual", "weight", "message"),
    [
        pytest.param((2, 8), (2, 8), torch.ones(4), r"weight must be \[8\]", id="short weight"),
        pytest.param((2, 8), (3, 8), torch.ones(8), "one shape", id="other tokens"),
        pytest.param((2, 1, 8), (2, 1, 8), torch.ones(8), r"\[T, D\]", id="three dimensions"),
        pytest.param((2, 8), (2, 8), torch.ones(16)[::2], "unit stride", id="weight with gaps"),
    ],
)
def test_what_does_not_fit_is_refused(
    x: tuple[int, ...], residual: tuple[int, ...], weight: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_rms_norm(torch.zeros(x), torch.zeros(residual), weight, EPS)


def test_a_strided_row_is_refused() -> None:
    with pytest.raises(ValueError, match="unit stride"):
        rms_norm(torch.zeros(8, 2).T, torch.ones(8), EPS)
