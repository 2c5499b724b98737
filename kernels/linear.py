"""Products with a weight, and the gated one of feed-forward layers.

At few tokens such a product costs what reading the weight costs, and kernels of our own stream it;
beyond, arithmetic counts, and cuBLAS has the better kernels.

T tokens, D inner size, O output size, I intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.linear_kernels import launch_linear, launch_partial_linear
from focus_ray.kernels.linear_tiles import linear_tile
from focus_ray.kernels.partial_sums import Summand
from focus_ray.kernels.swiglu import swiglu


def linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """``x @ weight.T``, summed in float32 and rounded once.

    The same call gives the same bits. A token's result does not depend on the other tokens, but
    how many there are may decide the order in which it is summed.

    Args:
        x_TD: ``[T, D]``, any float dtype, unit stride along D.
        weight_OD: ``[O, D]``, same dtype, contiguous.

    Returns:
        ``[T, O]``, dtype and device of ``x_TD``; contiguous.

    Raises:
        ValueError: a shape, dtype or layout differs from the above.
    """
    _check(x_TD, weight_OD)
    if x_TD.numel() and can_launch(x_TD, weight_OD):
        tile = linear_tile(x_TD, weight_OD, gated=False)
        if tile is not None:
            return launch_linear(x_TD, weight_OD, tile)
    return linear_reference(x_TD, weight_OD)


def partial_linear(x_TD: Tensor, weight_OD: Tensor) -> Summand:
    """``linear``, except that shares of its sums may be left for ``add_rms_norm`` to add up.

    Args:
        x_TD, weight_OD: as in ``linear``.

    Returns:
        What ``linear`` returns, or partial sums whose total that is, bit for bit.

    Raises:
        ValueError: a shape, dtype or layout differs from the above.
    """
    _check(x_TD, weight_OD)
    if x_TD.numel() and can_launch(x_TD, weight_OD):
        tile = linear_tile(x_TD, weight_OD, gated=False)
        if tile is not None and tile.num_splits > 1:
            return launch_partial_linear(x_TD, weight_OD, tile)
    return linear(x_TD, weight_OD)


def linear_float32(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """``linear`` of inputs and weights taken as float32, and not rounded after it.

    Products of half-precision numbers are exact in float32, so tensor cores that sum them there
    compute it, whatever the dtype.

    Args:
        x_TD, weight_OD: as in ``linear``.

    Returns:
        ``[T, O]`` float32, device of ``x_TD``; contiguous.

    Raises:
        ValueError: a shape, dtype or layout differs from the above.
    """
    _check(x_TD, weight_OD)
    if x_TD.is_cuda and x_TD.dtype != torch.float32:
        return torch.mm(x_TD, weight_OD.T, out_dtype=torch.float32)
    return F.linear(x_TD.float(), weight_OD.float())


def linear_swiglu(x_TD: Tensor, weight_2ID: Tensor) -> Tensor:
    """``swiglu`` of the two halves of ``linear``, the gate's rows first; rounded as one by one.

    Args:
        x_TD: as in ``linear``.
        weight_2ID: ``[2 I, D]``, the gate above the up projection; else as in ``linear``.

    Returns:
        ``[T, I]``, dtype and device of ``x_TD``; contiguous.

    Raises:
        ValueError: a shape, dtype or layout differs from the above.
    """
    _check(x_TD, weight_2ID)
    if weight_2ID.shape[0] % 2:
        raise ValueError(
            f"the weight holds a gate and an up projection of one size, got {len(weight_2ID)} rows"
        )
    if x_TD.numel() and can_launch(x_TD, weight_2ID):
        tile = linear_tile(x_TD, weight_2ID, gated=True)
        if tile is not None:
            return launch_linear(x_TD, weight_2ID, tile, gated=True)
    gate_TI, up_TI = linear(x_TD, weight_2ID).chunk(2, dim=1)
    return swiglu(gate_TI, up_TI)


def _check(x_TD: Tensor, weight_OD: Tensor) -> None:
    if x_TD.ndim != 2 or weight_OD.ndim != 2 or x_TD.shape[1] != weight_OD.shape[1]:
        raise ValueError(
            f"x must be [T, D] and weight [O, D] of one D, got {tuple(x_TD.shape)} and "
            f"{tuple(weight_OD.shape)}"
        )
    if x_TD.dtype != weight_OD.dtype:
        raise ValueError(f"x and weight must be one dtype, got {x_TD.dtype} and {weight_OD.dtype}")
    if x_TD.stride(1) != 1 or not weight_OD.is_contiguous():
        raise ValueError(
            "x needs unit stride along D and the weight to be contiguous, got strides "
            f"{x_TD.stride()} and {weight_OD.stride()}"
        )


def linear_reference(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """The definition."""
    return F.linear(x_TD, weight_OD)
