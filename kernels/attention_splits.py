"""What programs that share the KV positions of a tile leave to one another (Flash-Decoding).

Each leaves its part of the attention, and the last of a tile to finish adds the parts up, in their
order: no bit depends on who that is. An integer per tile and KV head counts who has finished.

K KV heads, G query heads of each, d head size, D = d padded to a power of two; of one tile M
(token, head) pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Parts on their way at once while they are added up. With four, registers are spilled.
PARTS_AT_ONCE = tl.constexpr(2)


@triton.jit
def add_to_others(
    out_MD, log_sum_M, split, num_parts, part_stride, place_M, is_pair_M,
    out_ptr, part_ptr, log_sum_ptr, finished_ptr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Leave the part of one split of ``num_parts``; the last one writes the sum of all.

    Args:
        out_MD: the attention over the split's own positions.
        log_sum_M: logarithm to base 2 of the sum of its weights; -inf where a pair sees none of
            these positions, which is never so in the first split.
        split: which one.
        num_parts: how many, at least 2.
        part_stride: pairs from one split's part to the next split's.
        place_M: the place of each pair in the output, in units of d elements.
        is_pair_M: what is not padding.
        out_ptr: where the sum goes.
        part_ptr: float32, the tile's pairs one after the other, d elements each, in split 0.
        log_sum_ptr: float32, as ``part_ptr``, one element each.
        finished_ptr: the count of this tile and KV head: 0 before, and 0 again afterwards.
    """
    own_M = tl.arange(0, BLOCK_M)
    column_D = tl.arange(0, BLOCK_D)
    own_MD = own_M[:, None] * HEAD_DIM + column_D[None, :]
    is_element_MD = is_pair_M[:, None] & (column_D < HEAD_DIM)[None, :]
    skipped = tl.cast(split, tl.int64) * part_stride
    tl.store(part_ptr + skipped * HEAD_DIM + own_MD, out_MD, mask=is_element_MD)
    tl.store(log_sum_ptr + skipped + own_M, log_sum_M, mask=is_pair_M)
    tl.debug_barrier()  # all threads have stored before one of them counts the program
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == num_parts - 1:
        tl.store(finished_ptr, 0)
        highest_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
        weight_M = tl.zeros([BLOCK_M], tl.float32)
        sum_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # Past the cache of one multiprocessor, which may hold what stood there before.
        for _ in tl.range(num_parts, loop_unroll_factor=PARTS_AT_ONCE):
            log_M = tl.load(log_sum_ptr + own_M, mask=is_pair_M, other=0.0, cache_modifier=".cg")
            part_MD = tl.load(
                part_ptr + own_MD, mask=is_element_MD, other=0.0, cache_modifier=".cg"
            )
            new_highest_M = tl.maximum(highest_M, log_M)
            shrink_M = tl.exp2(highest_M - new_highest_M)
            added_M = tl.exp2(log_M - new_highest_M)
            highest_M = new_highest_M
            weight_M = weight_M * shrink_M + added_M
            sum_MD = sum_MD * shrink_M[:, None] + part_MD * added_M[:, None]
            part_ptr += tl.cast(part_stride, tl.int64) * HEAD_DIM
            log_sum_ptr += part_stride
        sum_MD = sum_MD / weight_M[:, None]
        out_ptrs = out_ptr + place_M[:, None] * HEAD_DIM + column_D[None, :]
        tl.store(out_ptrs, sum_MD.to(out_ptr.dtype.element_ty), mask=is_element_MD)
