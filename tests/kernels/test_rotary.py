from __future__ import annotations

import math

import pytest
import torch

from focus_ray.kernels.rotary import apply_rotary, rotary_table

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
    generator = torch.Generator().manual_seed(0)
    q_THd = torch.randn(len(POSITIONS), 3, head_dim, generator=generator)
    k_TKd = torch.randn(len(POSITIONS), 1, head_dim, generator=generator)
    table = rotary_table(64, rotary_dim, THETA, dtype=torch.float32, device=device)
    found = apply_rotary(q_THd.to(device), k_TKd.to(device), table[POSITIONS])
    for x, rotated in zip((q_THd, k_TKd), found, strict=True):
        expected = [
            [rotate_by_hand(head.tolist(), position, rotary_dim) for head in token]
            for position, token in zip(POSITIONS, x, strict=True)
        ]
        torch.testing.assert_close(rotated.cpu(), torch.tensor(expected), rtol=0, atol=2e-5)


def test_angles_of_far_positions_are_not_rounded_to_the_models_dtype() -> None:
    table = rotary_table(32768, 4, THETA, dtype=torch.bfloat16, device="cpu")
    assert table.dtype == torch.bfloat16
    assert table[32767, 0, 0].item() == pytest.approx(math.cos(32767), abs=2**-8)


def test_no_tokens_give_no_tokens() -> None:
    table = rotary_table(4, 8, THETA, dtype=torch.float32, device="cpu")
    q_THd, k_TKd = apply_rotary(torch.zeros(0, 4, 8), torch.zeros(0, 2, 8), table[:0])
    assert (q_THd.shape, k_TKd.shape) == ((0, 4, 8), (0, 2, 8))


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "angles_shape", "message"),
    [
        pytest.param((2, 4, 8), (3, 2, 8), (2, 2, 4), "same tokens", id="keys of other tokens"),
        pytest.param((2, 4, 8), (2, 2, 8), (3, 2, 4), "same tokens", id="angles of other tokens"),
        pytest.param((2, 4, 8), (2, 2, 8), (2, 2, 5), "at least 10", id="heads too small"),
        pytest.param((2, 4, 8), (2, 2, 6), (2, 2, 3), "one size", id="two head sizes"),
    ],
)
def test_what_does_not_fit_is_refused(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], angles_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apply_rotary(torch.zeros(q_shape), torch.zeros(k_shape), torch.zeros(angles_shape))


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="one dtype"):
        apply_rotary(torch.zeros(2, 4, 8).half(), torch.zeros(2, 2, 8), torch.zeros(2, 2, 4))


@pytest.mark.parametrize("rotary_dim", [0, 7])
def test_dimensions_that_do_not_pair_are_refused(rotary_dim: int) -> None:
    with pytest.raises(ValueError, match="even and positive"):
        rotary_table(4, rotary_dim, THETA, dtype=torch.float32, device="cpu")
