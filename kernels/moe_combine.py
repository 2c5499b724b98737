"""The sum over the experts of a token, back in the order of the tokens.

T tokens, k experts per token, E experts, D hidden size, S shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous
from focus_ray.kernels.partial_sums import PartialSums, Summand
from focus_ray.kernels.routing import Routing

# Eight 16-bit elements a thread of each expert: one load, and all experts' in flight at once.
ELEMENTS_PER_WARP = 256
MOST_WARPS = 16


def launch_combine(
    out_TkD: Tensor, routing: Routing, num_experts: int, added_TD: Summand | None
) -> Tensor:
    """``combine_reference``, except that what stands in rows of no expert is not read."""
    num_tokens, num_places, width = out_TkD.shape
    added_STD = added_TD.sums_STO if isinstance(added_TD, PartialSums) else added_TD
    if isinstance(added_TD, Tensor):
        added_STD = added_TD[None]
    total_TD = out_TkD.new_empty(num_tokens, width)
    block = triton.next_power_of_2(width)
    _combine_experts_kernel[(num_tokens,)](
        out_TkD,
        routing.expert_Tk,
        routing.weight_Tk,
        added_STD,
        total_TD,
        0 if added_STD is None else added_STD.stride(0),
        0 if added_STD is None else added_STD.stride(1),
        num_experts,
        width,
        PLACES=num_places,
        SHARES=0 if added_STD is None else len(added_STD),
        BLOCK_D=block,
        num_warps=min(MOST_WARPS, max(1, block // ELEMENTS_PER_WARP)),
        **overlap_options(out_TkD.device),
    )
    return total_TD


def combine_reference(
    out_TkD: Tensor, routing: Routing, num_experts: int, added_TD: Summand | None
) -> Tensor:
    """The definition: ``[T, D]``, the weighted sum in float32, in order and rounded once; and what
    is added. A place without an expert adds nothing, whatever stands there.
    """
    total_TD = torch.zeros_like(out_TkD[:, 0], dtype=torch.float32)
    is_real_Tk = routing.expert_Tk < num_experts
    for place in range(out_TkD.shape[1]):
        product_TD = routing.weight_Tk[:, place, None] * out_TkD[:, place]
        total_TD += product_TD.where(is_real_Tk[:, place, None], 0.0)
    summed_TD = total_TD.to(out_TkD.dtype)
    if added_TD is None:
        return summed_TD
    return summed_TD + (added_TD.total() if isinstance(added_TD, PartialSums) else added_TD)


@triton.jit
def _combine_experts_kernel(
    out_ptr,
    expert_ptr,
    weight_ptr,
    added_ptr,
    total_ptr,
    added_stride_s,
    added_stride_t,
    num_experts,
    width,
    PLACES: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    t = tl.program_id(0).to(tl.int64)  # one program per token
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    dtype = total_ptr.dtype.element_ty
    wait_for_previous(OVERLAP)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for place in tl.static_range(PLACES):
        pair = t * PLACES + place
        is_real = tl.load(expert_ptr + pair) < num_experts
        weight = tl.where(is_real, tl.load(weight_ptr + pair), 0.0)
        out = tl.load(out_ptr + pair * width + column, mask=inside & is_real, other=0.0)
        total += weight * out.to(tl.float32)
    total = total.to(dtype)
    if SHARES > 0:
        added = tl.zeros((BLOCK_D,), tl.float32)
        for share in tl.static_range(SHARES):
            added_ptrs = added_ptr + share * added_stride_s + t * added_stride_t + column
            added += tl.load(added_ptrs, mask=inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + added.to(dtype).to(tl.float32)).to(dtype)
    tl.store(total_ptr + t * width + column, total, mask=inside)
