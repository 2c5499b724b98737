"""The rows of one step: which tokens it takes up, of which blocks, and where they stand.

M slots, B block length, S rows, C tokens, T <= C of which are used. A row is one block of one
sequence, or the part of it that the step processes. All buffers are made once and written anew by
every step, so that recorded launches find them where they were.

A token is open if the step may change it: a masked one, which it may decode, and, under
``joint_threshold``, a decoded one of the current block, which it may edit. Only open tokens need
logits. Where masked tokens can be left out, nothing else is open.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowRule:
    """How much of each block a step takes up.

    Args:
        whole_blocks: every step processes the whole block, and once more after it is closed;
            otherwise decoded tokens leave once their keys and values are final.
        leftmost: of the masked tokens, take up only the leftmost ones, as many as the target.
        attend_cached: tokens see their block up to its rightmost decoded token, even if that is to
            the right of everything processed.
        alpha: a row's target is ``eviction_target`` of it; None: all masked tokens.
    """

    whole_blocks: bool
    leftmost: bool
    attend_cached: bool
    alpha: float | None

    def __post_init__(self) -> None:
        if self.whole_blocks and self.leftmost:
            raise ValueError("leftmost takes up a part of each block, whole_blocks all: choose one")


@dataclass(frozen=True)
class Rows:
    """What ``plan_rows`` writes.

    Rows stand in order of slots, the tokens left over from a closed block before those of the
    current one; behind them the blocks that are prefilled; behind them empty rows.

    Args:
        row_slot_S: int32, whose block it is; 0 for empty rows.
        row_start_S: int64, absolute position of the block's first token; 0 for empty rows.
        row_offsets_S1: int32, the row's tokens are ``[row_offsets[s], row_offsets[s + 1])``.
        open_offsets_S1: int32, the same for the open tokens among them.
        processed_SB: bool, positions of the block that are the row's tokens, in this order.
        masked_SB: bool, those of them that are masked; none but in rows of current blocks.
        target_S: int64, masked tokens to retain; 0 in all other rows.
        progress_S: int64, rightmost position ever computed past layer 1; -1 in all other rows.
        token_ids_C: int64; 0 from entry T on.
        positions_C: int64, absolute; 0 from entry T on.
        slot_C: int64, place in the KV pages; the trash slot from entry T on.
        kv_limit_C: int32, KV positions that the token sees; 1 from entry T on.
        open_token_C: int64, which of the T tokens are open; 0 behind the last one.
        open_place_C: int64, ``slot * B + position`` of these; ``M * B``, a place of nobody,
            behind the last one.
        row_of_slot_M: int32, row of the slot's current block; -1: takes no part in this step.
        counts_4: int32: tokens T, open tokens, rows, slots that take part.
    """

    row_slot_S: Tensor
    row_start_S: Tensor
    row_offsets_S1: Tensor
    open_offsets_S1: Tensor
    processed_SB: Tensor
    masked_SB: Tensor
    target_S: Tensor
    progress_S: Tensor
    token_ids_C: Tensor
    positions_C: Tensor
    slot_C: Tensor
    kv_limit_C: Tensor
    open_token_C: Tensor
    open_place_C: Tensor
    row_of_slot_M: Tensor
    counts_4: Tensor

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        block_length: int,
        num_rows: int,
        num_tokens: int,
        device: torch.device | str,
    ) -> Rows:
        """Buffers for M slots, S rows and C tokens, all zero."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            row_slot_S=zeros(num_rows, dtype=torch.int32),
            row_start_S=zeros(num_rows, dtype=torch.int64),
            row_offsets_S1=zeros(num_rows + 1, dtype=torch.int32),
            open_offsets_S1=zeros(num_rows + 1, dtype=torch.int32),
            processed_SB=zeros(num_rows, block_length, dtype=torch.bool),
            masked_SB=zeros(num_rows, block_length, dtype=torch.bool),
            target_S=zeros(num_rows, dtype=torch.int64),
            progress_S=zeros(num_rows, dtype=torch.int64),
            token_ids_C=zeros(num_tokens, dtype=torch.int64),
            positions_C=zeros(num_tokens, dtype=torch.int64),
            slot_C=zeros(num_tokens, dtype=torch.int64),
            kv_limit_C=zeros(num_tokens, dtype=torch.int32),
            open_token_C=zeros(num_tokens, dtype=torch.int64),
            open_place_C=zeros(num_tokens, dtype=torch.int64),
            row_of_slot_M=zeros(num_slots, dtype=torch.int32),
            counts_4=zeros(4, dtype=torch.int32),
        )
