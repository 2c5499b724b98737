"""Rotary position embedding, half-split: dimension j turns together with dimension j + r/2.

T tokens, H heads, d head size, r <= d rotated dimensions, r2 = r / 2, P positions. The rotation
itself is the definition that ``norm_rotary`` follows; on a GPU it never runs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    num_positions: int,
    rotary_dim: int,
    theta: float,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Cosines, then sines, of the angles ``position * theta ** (-2j / rotary_dim)``.

    Angles, cosines and sines are float32 and rounded once. A table and not a function of the
    step's positions: vectorised cosines may differ in the last bit with a token's place in the
    batch, a table entry cannot.

    Returns:
        ``[num_positions, 2, rotary_dim / 2]`` of ``dtype``.

    Raises:
        ValueError: ``rotary_dim`` is odd or not positive.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and positive, got {rotary_dim}")
    if torch.device(device).type == "meta":  # arithmetic there loads torch's compiler: seconds
        return torch.empty(num_positions, 2, rotary_dim // 2, dtype=dtype, device=device)
    exponent_r2 = torch.arange(0, rotary_dim, 2, device=device).to(torch.float32) / rotary_dim
    frequency_r2 = 1.0 / theta**exponent_r2
    position_P = torch.arange(num_positions, device=device).to(torch.float32)
    angle_Pr2 = torch.outer(position_P, frequency_r2)
    return torch.stack((angle_Pr2.cos(), angle_Pr2.sin()), dim=1).to(dtype)


def rotate(x_THd: Tensor, cos_sin_T2r2: Tensor) -> Tensor:
    """Rotate the first r dimensions of every head by its token's angles; the rest stays.

    Args:
        x_THd: ``[T, H, d]``, any float dtype.
        cos_sin_T2r2: ``[T, 2, r / 2]``, rows of ``rotary_table``, same dtype.
    """
    half = cos_sin_T2r2.shape[2]
    cos_T1r2, sin_T1r2 = cos_sin_T2r2[:, None].unbind(2)
    first, second, rest = x_THd.split((half, half, x_THd.shape[2] - 2 * half), dim=2)
    return torch.cat(
        (
            first * cos_T1r2 - second * sin_T1r2,
            second * cos_T1r2 + first * sin_T1r2,
            rest,
        ),
        dim=2,
    )
