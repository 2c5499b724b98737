"""Root-mean-square normalisation over the last dimension, alone or after an addition.

T tokens, D hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous
from focus_ray.kernels.partial_sums import PartialSums, Summand
from focus_ray.kernels.tuning import num_multiprocessors


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square, multiply by ``weight``: ``x / sqrt(mean(x^2) + eps) * w``.

    All arithmetic, the multiplication by the weight included, is float32 and rounds once at the
    end, as the fused kernel of SDAR's authors does (their Python fallback rounds before the
    multiplication; equal in float32, a last bit apart in bfloat16). A row's result does not depend
    on the other rows, but how many there are may decide the order in which it is summed.

    Args:
        x: ``[..., D]``, any float dtype, unit stride along D.
        weight: ``[D]``, any float dtype.
        eps: added to the mean square.

    Returns:
        Shape, dtype and device of ``x``; contiguous.

    Raises:
        ValueError: ``weight`` is not as long as a row of ``x``, or D is strided.
    """
    _check_rows("x", x, weight)
    if not can_launch(x, weight):
        return rms_norm_reference(x, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        width = x.shape[-1]
        rows_RD = x.reshape(-1, width)
        block, num_warps = _row_tile(len(rows_RD), width, x.device)
        _rms_norm_kernel[(len(rows_RD),)](
            rows_RD,
            weight,
            out,
            rows_RD.stride(0),
            width,
            eps,
            BLOCK_D=block,
            num_warps=num_warps,
            **overlap_options(x.device),
        )
    return out


def add_rms_norm(
    x_TD: Tensor, residual_TD: Summand, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of a sum, and the sum: ``rms_norm(x + residual, weight, eps), x + residual``.

    The sum is rounded to the dtype, and the norm is that of the rounded sum.

    Args:
        x_TD: ``[T, D]``, any float dtype, unit stride along D.
        residual_TD: as ``x_TD``; or partial sums, of which the total is added.
        weight: ``[D]``, any float dtype.
        eps: added to the mean square.

    Returns:
        Two new tensors, shape, dtype and device of ``x_TD``; contiguous.

    Raises:
        ValueError: the summands differ in shape or dtype, ``weight`` is not as long as their rows,
            or D is strided.
    """
    if x_TD.ndim != 2 or x_TD.shape != residual_TD.shape or x_TD.dtype != residual_TD.dtype:
        raise ValueError(
            f"x and residual must be [T, D] of one shape and dtype, got {tuple(x_TD.shape)} "
            f"{x_TD.dtype} and {tuple(residual_TD.shape)} {residual_TD.dtype}"
        )
    _check_rows("x", x_TD, weight)
    if isinstance(residual_TD, PartialSums):
        residual_STD = residual_TD.sums_STO
    else:
        _check_rows("residual", residual_TD, weight)
        residual_STD = residual_TD[None]
    if not can_launch(x_TD, residual_STD, weight):
        return add_rms_norm_reference(x_TD, residual_TD, weight, eps)
    num_tokens, width = x_TD.shape
    normed_TD, sum_TD = x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)
    if num_tokens:
        block, num_warps = _row_tile(num_tokens, width, x_TD.device)
        _add_rms_norm_kernel[(num_tokens,)](
            x_TD,
            residual_STD,
            weight,
            normed_TD,
            sum_TD,
            x_TD.stride(0),
            residual_STD.stride(0),
            residual_STD.stride(1),
            width,
            eps,
            SHARES=len(residual_STD),
            BLOCK_D=block,
            num_warps=num_warps,
            **overlap_options(x_TD.device),
        )
    return normed_TD, sum_TD


def _check_rows(name: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be [{x.shape[-1]}] for this {name}, got {tuple(weight.shape)}"
        )
    if x.shape[-1] > 1 and (x.stride(-1) != 1 or weight.stride(0) != 1):
        raise ValueError(
            f"{name} and weight must have unit stride along D, got {x.stride(-1)} and "
            f"{weight.stride(0)}; make them contiguous"
        )


def _row_tile(num_rows: int, width: int, device: torch.device) -> tuple[int, int]:
    """Elements and warps of a program that owns a whole row.

    A row that has its multiprocessor to itself takes 8 elements a thread, one load each; where
    rows come to several a multiprocessor, 32.
    """
    block = triton.next_power_of_2(width)
    alone = num_rows <= num_multiprocessors(device)
    return block, min(16, max(1, block // (256 if alone else 1024)))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    wide = x.to(torch.float32)
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight.to(torch.float32)).to(x.dtype)


def add_rms_norm_reference(
    x_TD: Tensor, residual_TD: Summand, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition."""
    sum_TD = x_TD + (residual_TD.total() if isinstance(residual_TD, PartialSums) else residual_TD)
    return rms_norm_reference(sum_TD, weight, eps), sum_TD


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride_r,
    width,
    eps,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    r = tl.program_id(0).to(tl.int64)  # one program per row
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + r * x_stride_r + column, mask=inside, other=0.0)
    tl.store(out_ptr + r * width + column, _normed(x, weight, width, eps), mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    sum_ptr,
    x_stride_t,
    residual_stride_s,
    residual_stride_t,
    width,
    eps,
    SHARES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    t = tl.program_id(0).to(tl.int64)  # one program per token
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + t * x_stride_t + column, mask=inside, other=0.0)
    residual_ptrs = residual_ptr + t * residual_stride_t + column
    residual = tl.zeros((BLOCK_D,), tl.float32)
    for share in tl.static_range(SHARES):
        part = tl.load(residual_ptrs + share * residual_stride_s, mask=inside, other=0.0)
        residual += part.to(tl.float32)
    total = (x.to(tl.float32) + residual.to(x.dtype).to(tl.float32)).to(x.dtype)
    tl.store(sum_ptr + t * width + column, total, mask=inside)
    tl.store(normed_ptr + t * width + column, _normed(total, weight, width, eps), mask=inside)


@triton.jit
def _normed(x, weight, width, eps):
    """One row's norm; ``x`` is 0 past the row's end."""
    wide = x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    return (wide * inverse_rms * weight.to(tl.float32)).to(x.dtype)
