"""Leave evicted tokens out of everything that later layers read, token by token.

T tokens of the step in S rows: N decoding blocks of B positions, then prefill, which is never
evicted. R retained tokens, Q retained masked tokens; D hidden size, H query heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.kernels.retain import Retained


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
        row_offsets_S1: int32, row ``s`` is tokens ``[offsets[s], offsets[s + 1])``.
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
    return compact_reference(
        x_TD,
        q_THd,
        positions_T,
        slot_T,
        kv_limit_T,
        row_offsets_S1,
        processed_NB,
        masked_NB,
        retained,
        block_start_N,
    )


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
