"""The gate of a feed-forward layer. T tokens, I intermediate size."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch

BLOCK_I = 2048
NUM_WARPS = 4


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """``silu(gate) * up``; both the silu and the product are rounded to the dtype.

    Args:
        gate_TI: ``[T, I]``, any float dtype, unit stride along I (halves of one product may pass).
        up_TI: as ``gate_TI``.

    Returns:
        ``[T, I]``, dtype and device of ``gate_TI``; contiguous.

    Raises:
        ValueError: the two differ in shape or dtype, or I is strided.
    """
    if gate_TI.ndim != 2 or gate_TI.shape != up_TI.shape or gate_TI.dtype != up_TI.dtype:
        raise ValueError(
            f"gate and up must be [T, I] of one shape and dtype, got {tuple(gate_TI.shape)} "
            f"{gate_TI.dtype} and {tuple(up_TI.shape)} {up_TI.dtype}"
        )
    if gate_TI.shape[1] > 1 and not gate_TI.stride(1) == up_TI.stride(1) == 1:
        raise ValueError(
            f"gate and up must have unit stride along I, got {gate_TI.stride(1)} and "
            f"{up_TI.stride(1)}; make them contiguous"
        )
    if not can_launch(gate_TI, up_TI):
        return swiglu_reference(gate_TI, up_TI)
    num_tokens, width = gate_TI.shape
    out_TI = gate_TI.new_empty(gate_TI.shape)
    if out_TI.numel():
        _swiglu_kernel[(num_tokens, triton.cdiv(width, BLOCK_I))](
            gate_TI,
            up_TI,
            out_TI,
            gate_TI.stride(0),
            up_TI.stride(0),
            width,
            BLOCK_I=BLOCK_I,
            num_warps=NUM_WARPS,
        )
    return out_TI


def swiglu_reference(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """The definition."""
    return F.silu(gate_TI) * up_TI


@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride_t, up_stride_t, width, BLOCK_I: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)  # one program per token and BLOCK_I columns
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < width
    gate = tl.load(gate_ptr + t * gate_stride_t + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + t * up_stride_t + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + t * width + column, product, mask=inside)
