from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.swiglu import swiglu

# One unit in the last place at values up to 64, which products of two reach.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-2, torch.float16: 2**-5}


def gate_and_up(num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    both_T2I = torch.randn(num_tokens, 2 * width, generator=generator) * 2
    return both_T2I[:, :width], both_T2I[:, width:]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["two tensors", "halves of one product"])
@pytest.mark.parametrize(
    ("num_tokens", "width"),
    [
        pytest.param(3, 6144, id="several tiles"),
        pytest.param(2, 4099, id="odd width past a tile"),
        pytest.param(1, 1, id="one value"),
        pytest.param(0, 64, id="no tokens"),
    ],
)
def test_equals_the_formula_in_float64(
    num_tokens: int, width: int, contiguous: bool, dtype: torch.dtype, device: torch.device
) -> None:
    gate_TI, up_TI = (half.to(device, dtype) for half in gate_and_up(num_tokens, width))
    if contiguous:
        gate_TI, up_TI = gate_TI.contiguous(), up_TI.contiguous()
    found = swiglu(gate_TI, up_TI)
    assert (found.shape, found.dtype) == ((num_tokens, width), dtype)
    wide = gate_TI.double()
    silu = (wide / (1 + (-wide).exp())).to(dtype).double()
    expected = (silu * up_TI.double()).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])
    if dtype != torch.float32 and found.numel() > 1000:
        # without the rounding in between, a quarter of the values would be others
        assert (found != expected).float().mean() < 0.01


# NumPy, which computes for Triton's interpreter, warns of exp(200); a GPU yields inf in silence.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_far_from_zero_the_gate_is_open_or_shut(device: torch.device) -> None:
    gate_TI = torch.tensor([[-200.0, 200.0, 0.0]], device=device)
    assert swiglu(gate_TI, torch.ones_like(gate_TI)).tolist() == [[0.0, 200.0, 0.0]]


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        pytest.param(torch.zeros(2, 4), torch.zeros(2, 3), "one shape", id="two widths"),
        pytest.param(torch.zeros(2, 4), torch.zeros(2, 4).half(), "dtype", id="two dtypes"),
        pytest.param(torch.zeros(4), torch.zeros(4), r"\[T, I\]", id="no tokens' dimension"),
        pytest.param(torch.zeros(4, 2).T, torch.zeros(2, 4), "unit stride", id="across the memory"),
    ],
)
def test_what_does_not_fit_is_refused(gate: Tensor, up: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)
