from __future__ import annotations

import pytest
import torch

from focus_ray.kernels.rms_norm import rms_norm

# One rounding of the result: half a unit in the last place, at values up to about 8.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, 64), id="rows of the stream"),
        pytest.param((3, 4, 41), id="heads of an odd size"),
        pytest.param((1, 1), id="one value"),
        pytest.param((0, 8), id="no rows"),
    ],
)
def test_equals_the_formula_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    weight = (1 + torch.randn(shape[-1], generator=generator) / 4).to(device, dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_rounds_once_after_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=generator).bfloat16()
    weight = torch.randn(64, generator=generator).bfloat16()
    expected = rms_norm(x.float(), weight.float(), 1e-6).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), expected)


def test_eps_keeps_zeros_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6), torch.zeros(2, 4))


def test_a_weight_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        rms_norm(torch.zeros(2, 8), torch.ones(4), 1e-6)
