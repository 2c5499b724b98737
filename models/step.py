"""The facts of one forward pass that every layer reads.

Letters of tensor shapes: T tokens of the step, S rows (runs of consecutive tokens of one sequence),
M page tables, P pages per table, D hidden size, H query heads, K KV heads, d head size, V
vocabulary, R rows that need logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepTensors:
    """What one forward pass knows about its T tokens.

    The tokens of row ``s`` are ``[row_offsets_S1[s], row_offsets_S1[s + 1])``; a row is a block, or
    part of one, so a prefill chunk is several rows with the same pages. A token sees exactly the
    KV positions ``[0, kv_limit)`` of its own sequence; keys and values of all T tokens are written
    to their slots before any of them is read, layer by layer.

    A step may be padded, so that steps of a few sizes can be recorded: rows at the end may be
    empty, and tokens behind the last row's belong to nobody. These are computed like any other;
    their KV goes to a slot that nobody reads, and what comes out for them means nothing.

    Args:
        token_ids_T: int64.
        positions_T: int64, absolute positions.
        kv_limit_T: int32, at least ``position + 1``.
        slot_T: int64, where the token's K and V are written: ``page * page_size + offset``.
        page_table_MP: int32, page numbers of each sequence in order of position; entries past the
            last needed page hold any valid page number.
        row_table_S: int32, which page table each row reads.
        row_offsets_S1: int32, ascending, first 0, last at most T.
        max_row_len: most tokens in one row, known to the host.
        max_kv_len: a bound on every kv_limit, known to the host.
        busy_rows: about how many rows have tokens, 1 to S; a guess of the host, by which attention
            chooses tiles and splits. No result depends on it beyond rounding.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    kv_limit_T: Tensor
    slot_T: Tensor
    page_table_MP: Tensor
    row_table_S: Tensor
    row_offsets_S1: Tensor
    max_row_len: int
    max_kv_len: int
    busy_rows: int

    @property
    def num_tokens_1(self) -> Tensor:
        """``[1]`` int32, how many of the T tokens belong to somebody."""
        return self.row_offsets_S1[-1:]
