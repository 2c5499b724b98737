"""The facts of one forward pass that every layer reads.

Letters of tensor shapes: T tokens of the step, S rows of the page table (one per run of
consecutive tokens of one sequence), P pages per row, D hidden size, H query heads, K KV heads,
d head size, V vocabulary, R rows that need logits.
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

    Args:
        token_ids_T: int64.
        positions_T: int64, absolute positions.
        kv_limit_T: int32, at least ``position + 1``.
        slot_T: int64, where the token's K and V are written: ``page * page_size + offset``.
        page_table_SP: int32, page numbers of each row in order of position; entries past the
            row's last needed page hold any valid page number.
        row_offsets_S1: int32, ascending, first 0, last T.
        max_row_len: most tokens in one row, known to the host.
        max_kv_len: largest kv_limit, known to the host.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    kv_limit_T: Tensor
    slot_T: Tensor
    page_table_SP: Tensor
    row_offsets_S1: Tensor
    max_row_len: int
    max_kv_len: int
