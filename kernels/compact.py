"""Leave evicted tokens out of everything that later layers read, token by token.

T tokens of the step in S rows: N decoding blocks of B positions, then prefill, which is never
evicted. R retained tokens, Q retained masked tokens; D hidden size, H query heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.retain import Retained

# Elements of a token that a program copies at once: four accesses of 16 bytes per thread.
MAX_WIDTH_AT_ONCE = 4096


@dataclass(frozen=True)
class Compacted:
    """The step's tokens without the evicted ones, in the same order.

    Args:
        x_RD: residual stream.
        q_RHd: queries.
        positions_R: int64, absolute positions, which do not change.
        slot_R: int64.
        kv_limit_R: int32, up to what each token sees now.
        row_offsets_S1: int32, where the rows are now.
        masked_row_Q: int64, which of the R tokens are masked.
        masked_place_Q: int64, where these stand: ``n * B + position``.
    """

    x_RD: Tensor
    q_RHd: Tensor
    positions_R: Tensor
    slot_R: Tensor
    kv_limit_R: Tensor
    row_offsets_S1: Tensor
    masked_row_Q: Tensor
    masked_place_Q: Tensor


def compact(
    x_TD: Tensor,
    q_THd: Tensor,
    positions_T: Tensor,
    slot_T: Tensor,
    kv_limit_T: Tensor,
    row_offsets_S1: Tensor,
    processed_NB: Tensor,
    masked_NB: Tensor,
    retained: Retained,
    block_start_N: Tensor,
    *,
    num_evicted: int,
    num_masked: int,
) -> Compacted:
    """Gather the retained tokens.

    Args:
        x_TD: any float dtype, unit stride along D.
        q_THd: any float dtype, heads of a token side by side.
        positions_T: int64.
        slot_T: int64.
        kv_limit_T: int32; prefill tokens keep theirs.
        row_offsets_S1: int32, row ``s`` is tokens ``[offsets[s], offsets[s + 1])``, at most B.
        processed_NB: bool, the positions of the first N rows that are among the T tokens.
        masked_NB: bool.
        retained: of the same masks; decoding tokens see their block up to its limit.
        block_start_N: int64, absolute position of each block's first token.
        num_evicted: first of ``retained.counts_2``; ``R = T - num_evicted``.
        num_masked: second of it, Q.

    Raises:
        ValueError: shapes do not fit together, or x or q has gaps inside a token.
    """
    num_tokens, num_rows = len(positions_T), len(masked_NB)
    per_token = {"x_TD": x_TD, "q_THd": q_THd, "slot_T": slot_T, "kv_limit_T": kv_limit_T}
    for name, tensor in per_token.items():
        if len(tensor) != num_tokens:
            raise ValueError(f"{name} must be of {num_tokens} tokens, got {tuple(tensor.shape)}")
    if x_TD.ndim != 2 or x_TD.stride(1) != 1 or q_THd.ndim != 3 or not q_THd[:1].is_contiguous():
        raise ValueError(
            "x must be [T, D] and q [T, H, d] without gaps inside a token, got strides "
            f"{x_TD.stride()} and {q_THd.stride()}"
        )
    if not processed_NB.shape == masked_NB.shape == retained.kept_NB.shape or (
        len(block_start_N) != num_rows or len(row_offsets_S1) <= num_rows
    ):
        raise ValueError(
            f"processed {tuple(processed_NB.shape)}, masked {tuple(masked_NB.shape)}, kept "
            f"{tuple(retained.kept_NB.shape)}, {len(block_start_N)} block starts and "
            f"{len(row_offsets_S1)} row offsets are not of the same blocks"
        )
    if not row_offsets_S1.dtype == kv_limit_T.dtype == torch.int32:
        raise ValueError(
            "row offsets and KV limits must be int32, got "
            f"{row_offsets_S1.dtype} and {kv_limit_T.dtype}"
        )
    given = (x_TD, q_THd, positions_T, slot_T, kv_limit_T, row_offsets_S1, processed_NB, masked_NB)
    if not can_launch(*given, retained.kept_NB, block_start_N):
        return compact_reference(*given, retained, block_start_N)
    num_retained, block_length = num_tokens - num_evicted, masked_NB.shape[1]
    compacted = Compacted(
        x_RD=x_TD.new_empty(num_retained, *x_TD.shape[1:]),
        q_RHd=q_THd.new_empty(num_retained, *q_THd.shape[1:]),
        positions_R=positions_T.new_empty(num_retained),
        slot_R=slot_T.new_empty(num_retained),
        kv_limit_R=kv_limit_T.new_empty(num_retained),
        row_offsets_S1=row_offsets_S1.new_empty(len(row_offsets_S1)),
        masked_row_Q=positions_T.new_empty(num_masked),
        masked_place_Q=positions_T.new_empty(num_masked),
    )
    x_width, q_width = x_TD.shape[1], q_THd.shape[1] * q_THd.shape[2]
    # one row more than there are: its first program ends the row offsets
    _compact_kernel[(len(row_offsets_S1), block_length)](
        x_TD,
        q_THd,
        *(tensor.contiguous() for tensor in given[2:]),
        retained.kept_NB.contiguous(),
        retained.row_offsets_N1,
        retained.masked_offsets_N1,
        retained.limit_N,
        block_start_N.contiguous(),
        compacted.x_RD,
        compacted.q_RHd,
        compacted.positions_R,
        compacted.slot_R,
        compacted.kv_limit_R,
        compacted.row_offsets_S1,
        compacted.masked_row_Q,
        compacted.masked_place_Q,
        x_TD.stride(0),
        q_THd.stride(0),
        x_width,
        q_width,
        len(row_offsets_S1) - 1,
        num_rows,
        block_length,
        num_evicted,
        BLOCK=triton.next_power_of_2(block_length),
        WIDTH=min(triton.next_power_of_2(max(x_width, q_width)), MAX_WIDTH_AT_ONCE),
        num_warps=4,
    )
    return compacted


def compact_reference(
    x_TD: Tensor,
    q_THd: Tensor,
    positions_T: Tensor,
    slot_T: Tensor,
    kv_limit_T: Tensor,
    row_offsets_S1: Tensor,
    processed_NB: Tensor,
    masked_NB: Tensor,
    retained: Retained,
    block_start_N: Tensor,
) -> Compacted:
    """The definition, which counts the tokens itself."""
    num_rows, block_length = masked_NB.shape
    token_NB = row_offsets_S1[:num_rows, None] + processed_NB.cumsum(1) - 1
    retained_T = torch.ones_like(positions_T, dtype=torch.bool)
    retained_T[token_NB[processed_NB]] = retained.kept_NB[processed_NB]
    token_R = retained_T.nonzero()[:, 0]
    # the first of the R tokens are those of the blocks
    place_R = retained.kept_NB.flatten().nonzero()[:, 0]
    is_masked_R = masked_NB.flatten()[place_R]
    limit_N = (block_start_N + retained.limit_N).to(kv_limit_T.dtype)
    kv_limit_R = kv_limit_T[token_R]
    kv_limit_R[: len(place_R)] = limit_N[place_R // block_length]
    return Compacted(
        x_RD=x_TD[token_R],
        q_RHd=q_THd[token_R],
        positions_R=positions_T[token_R],
        slot_R=slot_T[token_R],
        kv_limit_R=kv_limit_R,
        row_offsets_S1=torch.cat(
            [
                retained.row_offsets_N1,
                row_offsets_S1[num_rows + 1 :] - (len(positions_T) - len(token_R)),
            ]
        ),
        masked_row_Q=is_masked_R.nonzero()[:, 0],
        masked_place_Q=place_R[is_masked_R],
    )


# Numbers and alignments that change from step to step must not make it compile anew.
@triton.jit(
    do_not_specialize=["num_rows", "num_blocks", "num_evicted"],
    do_not_specialize_on_alignment=["kept_offsets_ptr", "masked_offsets_ptr"],
)
def _compact_kernel(
    x_ptr,
    q_ptr,
    position_ptr,
    slot_ptr,
    kv_limit_ptr,
    row_offsets_ptr,
    processed_ptr,
    masked_ptr,
    kept_ptr,
    kept_offsets_ptr,
    masked_offsets_ptr,
    block_limit_ptr,
    block_start_ptr,
    x_out_ptr,
    q_out_ptr,
    position_out_ptr,
    slot_out_ptr,
    kv_limit_out_ptr,
    row_offsets_out_ptr,
    masked_row_ptr,
    masked_place_ptr,
    x_stride_t,
    q_stride_t,
    x_width,
    q_width,
    num_rows,
    num_blocks,
    block_length,
    num_evicted,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # One program owns one position of a block, or one token of a prefill row, if there is one.
    s = tl.program_id(0).to(tl.int64)
    here = tl.program_id(1)
    first = tl.load(row_offsets_ptr + s)
    if s < num_blocks:
        position = tl.arange(0, BLOCK)
        is_left = position < here
        place = s * block_length + position
        processed_left = tl.load(processed_ptr + place, mask=is_left, other=0).to(tl.int32)
        kept_left = tl.load(kept_ptr + place, mask=is_left, other=0).to(tl.int32)
        masked_left = tl.load(masked_ptr + place, mask=is_left, other=0).to(tl.int32)
        first_out = tl.load(kept_offsets_ptr + s)
        t = first + tl.sum(processed_left, 0)
        r = first_out + tl.sum(kept_left, 0)
        limit = (tl.load(block_start_ptr + s) + tl.load(block_limit_ptr + s)).to(tl.int32)
        goes_on = tl.load(kept_ptr + s * block_length + here) != 0
        if goes_on & (tl.load(masked_ptr + s * block_length + here) != 0):
            index = tl.load(masked_offsets_ptr + s) + tl.sum(kept_left * masked_left, 0)
            tl.store(masked_row_ptr + index, r.to(tl.int64))
            tl.store(masked_place_ptr + index, s * block_length + here)
    else:
        first_out = first - num_evicted
        t = first + here
        r = first_out + here
        goes_on = t < tl.load(row_offsets_ptr + tl.minimum(s + 1, num_rows))
        limit = tl.load(kv_limit_ptr + t, mask=goes_on, other=0)
    if here == 0:
        tl.store(row_offsets_out_ptr + s, first_out)
    if goes_on:
        tl.store(position_out_ptr + r, tl.load(position_ptr + t))
        tl.store(slot_out_ptr + r, tl.load(slot_ptr + t))
        tl.store(kv_limit_out_ptr + r, limit)
        _copy(x_ptr, x_out_ptr, t, r, x_stride_t, x_width, WIDTH)
        _copy(q_ptr, q_out_ptr, t, r, q_stride_t, q_width, WIDTH)


@triton.jit
def _copy(source_ptr, out_ptr, t, r, stride_t, width, WIDTH: tl.constexpr):
    """Token ``t`` of the source becomes row ``r`` of the result, which has no gaps."""
    source_ptr += t.to(tl.int64) * stride_t
    out_ptr += r.to(tl.int64) * width
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        tl.store(out_ptr + d, tl.load(source_ptr + d, mask=d < width), mask=d < width)
