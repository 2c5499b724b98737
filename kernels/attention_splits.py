"""Adding up what several programs found of one attention (Flash-Decoding).

Each leaves its part and its sum. T query tokens, H query heads, d head size, D = d padded to a
power of two, X splits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous


def add_splits(
    part_XTHd: Tensor, log_sum_XTH: Tensor, num_parts_TH: Tensor, end_1: Tensor, out_THd: Tensor
) -> None:
    """Write the sum of the parts to ``out_THd``.

    Args:
        part_XTHd: float32, each the attention over its own positions.
        log_sum_XTH: float32, logarithm to base 2 of the sum of its weights.
        num_parts_TH: int32, parts that there are, the first of X. Where it is 1, the result is in
            ``out_THd`` already.
        end_1: int, the tokens that matter are those before this one.
        out_THd: contiguous.
    """
    num_splits, num_tokens, num_heads, head_dim = part_XTHd.shape
    _add_splits_kernel[(num_tokens * num_heads,)](
        part_XTHd,
        log_sum_XTH,
        num_parts_TH,
        end_1,
        out_THd,
        num_tokens * num_heads,
        NUM_HEADS=num_heads,
        NUM_SPLITS=num_splits,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=2,
        **overlap_options(part_XTHd.device),
    )


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["end_ptr"])
def _add_splits_kernel(
    part_ptr,
    log_sum_ptr,
    num_parts_ptr,
    end_ptr,
    out_ptr,
    num_pairs,
    NUM_HEADS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # A program owns one query head of one token. There is nothing to add where one part is all,
    # or for tokens of no row.
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    pair = tl.program_id(0).to(tl.int64)
    num_parts = tl.load(num_parts_ptr + pair)
    if (pair // NUM_HEADS < tl.load(end_ptr)) & (num_parts > 1):
        column_D = tl.arange(0, BLOCK_D)
        split_X = tl.arange(0, NUM_SPLITS)
        place_X = split_X.to(tl.int64) * num_pairs + pair
        is_part_X = split_X < num_parts
        log_sum_X = tl.load(log_sum_ptr + place_X, mask=is_part_X, other=-float("inf"))
        weight_X = tl.exp2(log_sum_X - tl.max(log_sum_X, 0))
        part_XD = tl.load(
            part_ptr + place_X[:, None] * HEAD_DIM + column_D[None, :],
            mask=is_part_X[:, None] & (column_D < HEAD_DIM)[None, :],
            other=0.0,
        )
        out_D = tl.sum(part_XD * weight_X[:, None], 0) / tl.sum(weight_X, 0)
        tl.store(
            out_ptr + pair * HEAD_DIM + column_D,
            out_D.to(out_ptr.dtype.element_ty),
            mask=column_D < HEAD_DIM,
        )
