from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.linear import linear, linear_swiglu, partial_linear
from focus_ray.kernels.partial_sums import PartialSums

# Of sums near 1, in shares of the sum's size: float32 adds up thousands of products in any order;
# 16-bit results round once, the gated ones three times.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Large enough to be streamed on a GPU that streams; and small, or of odd sizes, which none does.
SIZES = [
    pytest.param(3, 4224, 1024, id="few tokens"),
    pytest.param(40, 4224, 1024, id="tokens that fill no tile"),
    pytest.param(130, 4224, 1024, id="many tokens"),
    pytest.param(1, 10, 7, id="odd sizes"),
    pytest.param(5, 2, 64, id="two columns"),
    pytest.param(0, 64, 64, id="no tokens"),
]


def draw(
    num_tokens: int, out_size: int, inner: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens as a view of something wider, and a weight that keeps their size."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, inner + 16, generator=generator).to(device, dtype)
    weight_OD = torch.randn(out_size, inner, generator=generator) * inner**-0.5
    return x_TD[:, :inner], weight_OD.to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "out_size", "inner"), SIZES)
def test_equals_the_product_in_float64(
    num_tokens: int, out_size: int, inner: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TD, weight_OD = draw(num_tokens, out_size, inner, dtype, device)
    found = linear(x_TD, weight_OD)
    assert (found.shape, found.dtype) == ((num_tokens, out_size), dtype)
    assert found.is_contiguous()
    expected = x_TD.double() @ weight_OD.double().T
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "out_size", "inner"), SIZES)
def test_gated_equals_the_formula_in_float64(
    num_tokens: int, out_size: int, inner: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TD, weight_2ID = draw(num_tokens, out_size, inner, dtype, device)
    found = linear_swiglu(x_TD, weight_2ID)
    assert (found.shape, found.dtype) == ((num_tokens, out_size // 2), dtype)
    assert found.is_contiguous()
    gate, up = (x_TD.double() @ weight_2ID.double().T).chunk(2, dim=1)
    expected = gate / (1 + (-gate).exp()) * up
    tolerance = 4 * TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "out_size", "inner"), SIZES)
def test_what_is_left_to_add_up_is_the_same_product(
    num_tokens: int, out_size: int, inner: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TD, weight_OD = draw(num_tokens, out_size, inner, dtype, device)
    found = partial_linear(x_TD, weight_OD)
    assert (found.shape, found.dtype) == ((num_tokens, out_size), dtype)
    total = found.total() if isinstance(found, PartialSums) else found
    assert torch.equal(total, linear(x_TD, weight_OD))


@pytest.mark.parametrize("multiply", [linear, linear_swiglu])
def test_a_token_does_not_feel_the_others(
    multiply: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> None:
    x_TD, weight_OD = draw(6, 4224, 1024, torch.bfloat16, device)
    others_TD = torch.full_like(x_TD, float("nan"))
    others_TD[2] = x_TD[2]
    assert torch.equal(multiply(others_TD, weight_OD)[2], multiply(x_TD, weight_OD)[2])


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        pytest.param((2, 4), (3, 5), "of one D", id="inner sizes"),
        pytest.param((4,), (3, 4), r"\[T, D\]", id="no tokens' dimension"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    x: tuple[int, ...], weight: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear(torch.zeros(x), torch.zeros(weight))


def test_other_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="one dtype"):
        linear(torch.zeros(2, 4), torch.zeros(3, 4).half())
    with pytest.raises(ValueError, match="unit stride"):
        linear(torch.zeros(4, 2).T, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="contiguous"):
        linear(torch.zeros(2, 4), torch.zeros(4, 3).T)
    with pytest.raises(ValueError, match="got 3 rows"):
        linear_swiglu(torch.zeros(2, 4), torch.zeros(3, 4))
