from __future__ import annotations

import math

import pytest
import torch

from focus_ray.kernels.rotary import rotary_table, rotate

POSITIONS = [0, 1, 5, 63]
THETA = 10000.0


def rotate_by_hand(x: list[float], position: int, rotary_dim: int) -> list[float]:
    out = list(x)
    half = rotary_dim // 2
    for j in range(half):
        angle = position * THETA ** (-2 * j / rotary_dim)
        out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
        out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
    return out


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [
        pytest.param(16, 16, id="whole head, as SDAR"),
        pytest.param(16, 8, id="half of the head, as LLaDA2"),
        pytest.param(7, 2, id="one pair of an odd head"),
    ],
)
def test_equals_rotation_by_hand(head_dim: int, rotary_dim: int, device: torch.device) -> None:
    x_THd = torch.randn(len(POSITIONS), 3, head_dim, generator=torch.Generator().manual_seed(0))
    table = rotary_table(64, rotary_dim, THETA, dtype=torch.float32, device=device)
    found = rotate(x_THd.to(device), table[POSITIONS])
    expected = [
        [rotate_by_hand(head.tolist(), position, rotary_dim) for head in token]
        for position, token in zip(POSITIONS, x_THd, strict=True)
    ]
    torch.testing.assert_close(found.cpu(), torch.tensor(expected), rtol=0, atol=2e-5)


def test_angles_of_far_positions_are_not_rounded_to_the_models_dtype() -> None:
    table = rotary_table(32768, 4, THETA, dtype=torch.bfloat16, device="cpu")
    assert table.dtype == torch.bfloat16
    assert table[32767, 0, 0].item() == pytest.approx(math.cos(32767), abs=2**-8)


@pytest.mark.parametrize("rotary_dim", [0, 7])
def test_dimensions_that_do_not_pair_are_refused(rotary_dim: int) -> None:
    with pytest.raises(ValueError, match="even and positive"):
        rotary_table(4, rotary_dim, THETA, dtype=torch.float32, device="cpu")
