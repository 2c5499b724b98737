"""Leave evicted tokens out of everything that later layers read, token by token.

T tokens of the step in S rows, each of one block of B positions. R retained tokens, Q of them open
(see ``rows``); the results have room for C >= R tokens. D hidden size, H query heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.retain import Retained

# Elements of a token that a program copies at once: four accesses of 16 bytes per thread.
MAX_WIDTH_AT_ONCE = 4096
# Row ends that a program looks at together: one wait for all of them, if there are no more.
ROWS_AT_ONCE = (512, 2048)


@dataclass(frozen=True)
class Compacted:
    """The step's tokens without the evicted ones, in the same order, and padding behind them.

    Who knows R and Q cuts the tensors; until then the padding is harmless.

    Args:
        x_RD: residual stream; padding is left as it was.
        q_RHd: queries; padding is left as it was.
        positions_R: int64, absolute positions, which do not change; padding is 0.
        slot_R: int64; padding is a slot that nobody reads.
        kv_limit_R: int32, up to what each token sees now; padding is 1.
        row_offsets_S1: int32, where the rows are now.
        open_row_Q: int64, which of the R tokens are open, in order; padding is 0. Where tokens are
            evicted, these are the masked ones.
        open_place_Q: int64, where these stand: ``slot * B + position``, slot that of a sequence;
            padding is a place of nobody.
    """

    x_RD: Tensor
    q_RHd: Tensor
    positions_R: Tensor
    slot_R: Tensor
    kv_limit_R: Tensor
    row_offsets_S1: Tensor
    open_row_Q: Tensor
    open_place_Q: Tensor

    @classmethod
    def allocate(
        cls,
        num_tokens: int,
        num_rows: int,
        hidden_size: int,
        query_shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Compacted:
        """Room for C tokens in S rows; ``query_shape`` is ``(H, d)``."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            x_RD=zeros(num_tokens, hidden_size, dtype=dtype),
            q_RHd=zeros(num_tokens, *query_shape, dtype=dtype),
            positions_R=zeros(num_tokens, dtype=torch.int64),
            slot_R=zeros(num_tokens, dtype=torch.int64),
            kv_limit_R=zeros(num_tokens, dtype=torch.int32),
            row_offsets_S1=zeros(num_rows + 1, dtype=torch.int32),
            open_row_Q=zeros(num_tokens, dtype=torch.int64),
            open_place_Q=zeros(num_tokens, dtype=torch.int64),
        )

    def first(self, num_tokens: int, num_rows: int) -> Compacted:
        """Views of so many tokens, retained or padding, and of so many rows."""
        tokens = {
            name: tensor[:num_tokens]
            for name, tensor in vars(self).items()
            if name != "row_offsets_S1"
        }
        return replace(self, **tokens, row_offsets_S1=self.row_offsets_S1[: num_rows + 1])


def compact(
    x_TD: Tensor,
    q_THd: Tensor,
    positions_T: Tensor,
    slot_T: Tensor,
    row_offsets_S1: Tensor,
    row_slot_S: Tensor,
    row_start_S: Tensor,
    processed_SB: Tensor,
    masked_SB: Tensor,
    retained: Retained,
    *,
    trash_slot: int,
    trash_place: int,
    out: Compacted,
) -> None:
    """Gather the retained tokens of all rows, however many they are.

    Args:
        x_TD: any float dtype, unit stride along D.
        q_THd: any float dtype, heads of a token side by side.
        positions_T: int64.
        slot_T: int64.
        row_offsets_S1: int32, row ``s`` is tokens ``[offsets[s], offsets[s + 1])``; tokens behind
            the last row belong to nobody.
        row_slot_S: int32, slot of the sequence of each row.
        row_start_S: int64, absolute position of the first token of the row's block.
        processed_SB: bool, the positions of each row's block that are among its tokens.
        masked_SB: bool.
        retained: of the same rows; tokens see their block up to its limit.
        trash_slot: KV slot of padding.
        trash_place: place of padding.
        out: contiguous, of S rows and C >= R tokens; all its C tokens are written.

    Raises:
        ValueError: shapes do not fit together, or x or q has gaps inside a token.
    """
    num_tokens, num_rows = len(positions_T), len(masked_SB)
    if not len(x_TD) == len(q_THd) == len(slot_T) == num_tokens:
        raise ValueError(
            f"x {tuple(x_TD.shape)}, q {tuple(q_THd.shape)}, {len(slot_T)} slots and {num_tokens} "
            "positions are not of the same tokens"
        )
    if x_TD.ndim != 2 or x_TD.stride(1) != 1 or q_THd.ndim != 3 or not q_THd[:1].is_contiguous():
        raise ValueError(
            "x must be [T, D] and q [T, H, d] without gaps inside a token, got strides "
            f"{x_TD.stride()} and {q_THd.stride()}"
        )
    if (
        not processed_SB.shape == masked_SB.shape == retained.kept_NB.shape
        or not len(row_start_S) == len(row_slot_S) == num_rows
        or not len(row_offsets_S1) == len(out.row_offsets_S1) == num_rows + 1
    ):
        raise ValueError(
            f"processed {tuple(processed_SB.shape)}, masked {tuple(masked_SB.shape)}, kept "
            f"{tuple(retained.kept_NB.shape)}, {len(row_start_S)} starts, {len(row_slot_S)} slots, "
            f"{len(row_offsets_S1)} and {len(out.row_offsets_S1)} row offsets are not of one "
            "number of rows"
        )
    if x_TD.shape[1:] != out.x_RD.shape[1:] or q_THd.shape[1:] != out.q_RHd.shape[1:]:
        raise ValueError(
            f"out has x {tuple(out.x_RD.shape)} and q {tuple(out.q_RHd.shape)}, which do not hold "
            f"tokens of x {tuple(x_TD.shape)} and q {tuple(q_THd.shape)}"
        )
    if not row_offsets_S1.dtype == row_slot_S.dtype == torch.int32:
        raise ValueError(
            f"row offsets and slots must be int32, got {row_offsets_S1.dtype}, {row_slot_S.dtype}"
        )
    given = (x_TD, q_THd, positions_T, slot_T, row_offsets_S1, row_slot_S, row_start_S)
    if not can_launch(*given, processed_SB, masked_SB, retained.kept_NB):
        compact_reference(
            *given,
            processed_SB,
            masked_SB,
            retained,
            trash_slot=trash_slot,
            trash_place=trash_place,
            out=out,
        )
        return
    x_width, q_width = x_TD.shape[1], q_THd.shape[1] * q_THd.shape[2]
    _compact_kernel[(max(1, len(out.positions_R)),)](
        x_TD,
        q_THd,
        *(tensor.contiguous() for tensor in (*given[2:], processed_SB, masked_SB)),
        retained.kept_NB,
        retained.row_offsets_N1,
        retained.masked_offsets_N1,
        retained.limit_N,
        out.x_RD,
        out.q_RHd,
        out.positions_R,
        out.slot_R,
        out.kv_limit_R,
        out.row_offsets_S1,
        out.open_row_Q,
        out.open_place_Q,
        x_TD.stride(0),
        q_THd.stride(0),
        x_width,
        q_width,
        len(out.positions_R),
        num_rows,
        masked_SB.shape[1],
        trash_slot,
        trash_place,
        BLOCK=triton.next_power_of_2(masked_SB.shape[1]),
        BLOCK_S=next((b for b in ROWS_AT_ONCE if b >= num_rows), ROWS_AT_ONCE[-1]),
        WIDTH=min(triton.next_power_of_2(max(x_width, q_width)), MAX_WIDTH_AT_ONCE),
        num_warps=4,
    )


def compact_reference(
    x_TD: Tensor,
    q_THd: Tensor,
    positions_T: Tensor,
    slot_T: Tensor,
    row_offsets_S1: Tensor,
    row_slot_S: Tensor,
    row_start_S: Tensor,
    processed_SB: Tensor,
    masked_SB: Tensor,
    retained: Retained,
    *,
    trash_slot: int,
    trash_place: int,
    out: Compacted,
) -> None:
    """The definition, which counts the tokens itself."""
    block_length = masked_SB.shape[1]
    place_R = retained.kept_NB.flatten().nonzero()[:, 0]
    row_R, position_R = place_R // block_length, place_R % block_length
    token_SB = row_offsets_S1[:-1, None] + processed_SB.cumsum(1) - 1
    token_R = token_SB.flatten()[place_R]
    open_row_Q = masked_SB.flatten()[place_R].nonzero()[:, 0]
    place_of_slot_R = row_slot_S[row_R] * block_length + position_R
    limit_S = row_start_S + retained.limit_N

    out.x_RD[: len(token_R)] = x_TD[token_R]
    out.q_RHd[: len(token_R)] = q_THd[token_R]
    out.row_offsets_S1.copy_(retained.row_offsets_N1)
    for padded, values, padding in (
        (out.positions_R, positions_T[token_R], 0),
        (out.slot_R, slot_T[token_R], trash_slot),
        (out.kv_limit_R, limit_S[row_R], 1),
        (out.open_row_Q, open_row_Q, 0),
        (out.open_place_Q, place_of_slot_R[open_row_Q], trash_place),
    ):
        padded[: len(values)] = values
        padded[len(values) :] = padding


# Numbers and alignments that change from step to step must not make it compile anew.
@triton.jit(
    do_not_specialize=["num_out", "num_rows", "trash_slot", "trash_place"],
    do_not_specialize_on_alignment=["masked_offsets_ptr", "limit_ptr"],
)
def _compact_kernel(
    x_ptr,
    q_ptr,
    position_ptr,
    slot_ptr,
    row_offsets_ptr,
    row_slot_ptr,
    row_start_ptr,
    processed_ptr,
    masked_ptr,
    kept_ptr,
    kept_offsets_ptr,
    masked_offsets_ptr,
    limit_ptr,
    x_out_ptr,
    q_out_ptr,
    position_out_ptr,
    slot_out_ptr,
    kv_limit_out_ptr,
    row_offsets_out_ptr,
    open_row_ptr,
    open_place_ptr,
    x_stride_t,
    q_stride_t,
    x_width,
    q_width,
    num_out,
    num_rows,
    block_length,
    trash_slot,
    trash_place,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # One program owns one token of the result, retained or padding, and one entry of the lists of
    # masked tokens if that is padding. The first one also owns the row offsets.
    r = tl.program_id(0).to(tl.int64)
    num_ended = tl.zeros((), tl.int64)
    for first_row in range(0, num_rows, BLOCK_S):
        row_S = first_row + tl.arange(0, BLOCK_S)
        is_row_S = row_S < num_rows
        end_S = tl.load(kept_offsets_ptr + 1 + row_S, mask=is_row_S, other=0)
        num_ended += tl.sum((is_row_S & (end_S <= r)).to(tl.int32), 0)
        tl.store(row_offsets_out_ptr + 1 + row_S, end_S, mask=is_row_S & (r == 0))
    if r == 0:
        tl.store(row_offsets_out_ptr, 0)
    num_retained = tl.load(kept_offsets_ptr + num_rows)
    num_masked = tl.load(masked_offsets_ptr + num_rows)
    is_entry = r < num_out

    if is_entry & (r >= num_masked):
        tl.store(open_row_ptr + r, 0)
        tl.store(open_place_ptr + r, trash_place)
    if is_entry & (r >= num_retained):
        tl.store(position_out_ptr + r, 0)
        tl.store(slot_out_ptr + r, trash_slot)
        tl.store(kv_limit_out_ptr + r, 1)
    if is_entry & (r < num_retained):
        s = num_ended  # the first row that ends behind the token
        position = tl.arange(0, BLOCK)
        inside = position < block_length
        flag = s * block_length + position
        kept = tl.load(kept_ptr + flag, mask=inside, other=0).to(tl.int32)
        masked = tl.load(masked_ptr + flag, mask=inside, other=0).to(tl.int32)
        processed = tl.load(processed_ptr + flag, mask=inside, other=0).to(tl.int32)
        index = r.to(tl.int32) - tl.load(kept_offsets_ptr + s)
        is_here = (kept != 0) & (tl.cumsum(kept, 0) == index + 1)
        here = tl.sum(tl.where(is_here, position, 0), 0)
        is_left = position < here
        t = tl.load(row_offsets_ptr + s) + tl.sum(tl.where(is_left, processed, 0), 0)
        limit = tl.load(row_start_ptr + s) + tl.load(limit_ptr + s)
        tl.store(position_out_ptr + r, tl.load(position_ptr + t))
        tl.store(slot_out_ptr + r, tl.load(slot_ptr + t))
        tl.store(kv_limit_out_ptr + r, limit.to(tl.int32))
        if tl.sum(tl.where(is_here, masked, 0), 0) != 0:
            num_left = tl.sum(tl.where(is_left, kept * masked, 0), 0)
            number = tl.load(masked_offsets_ptr + s) + num_left
            place = tl.load(row_slot_ptr + s).to(tl.int64) * block_length + here
            tl.store(open_row_ptr + number, r)
            tl.store(open_place_ptr + number, place)
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
