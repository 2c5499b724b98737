"""Which tokens of a step may leave: contiguous decoded ones that stay and did not leave before."""

from __future__ import annotations

from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

from focus_ray.engine.outputs import TokenLogprob
from focus_ray.engine.request import Sequence
from focus_ray.engine.slots import WANTS_TOP, BlocksAfter, Slots


class NewTokens(NamedTuple):
    """Tokens of one sequence that became final and contiguous in a step."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None


def emit(slots: Slots, after: BlocksAfter) -> list[NewTokens]:
    """The decoded prefix of each block as far as it was not emitted yet; marks it as emitted.

    Nothing of the block behind a closed one is decoded yet, so one block is all there is to see.
    Where decoded tokens may still change, nothing leaves before the block has ended.
    """
    block_length = slots.block_length
    first_mask_M = after.decoded_MB.argmin(1)  # or a decoded token, where there is no mask
    is_whole_M = after.decoded_MB[np.arange(len(first_mask_M)), first_mask_M]
    prefix_M = np.where(is_whole_M, block_length, first_mask_M)
    prefix_M[slots.edits_M & ~after.ended_M] = 0
    end_M = np.minimum(slots.block_start_M + prefix_M, slots.limit_M)
    slots_N = np.flatnonzero(after.ours_M & (end_M > slots.emitted_end_M))
    first_N1 = (slots.emitted_end_M - slots.block_start_M)[slots_N, None]
    end_N1 = (end_M - slots.block_start_M)[slots_N, None]
    position_B = np.arange(block_length)
    chosen_NB = (position_B >= first_N1) & (position_B < end_N1)
    slots.emitted_end_M[slots_N] = end_M[slots_N]

    # one tuple of all tokens, cut up below: an array per sequence would cost several times as much
    token_ids = tuple(after.token_ids_MB[slots_N][chosen_NB].tolist())
    cuts = [0, *chosen_NB.sum(1).cumsum().tolist()]
    emitted = [
        NewTokens(sequence, token_ids[start:end], None)
        for sequence, (start, end) in zip(slots.sequences(slots_N), pairwise(cuts), strict=True)
    ]
    for row in np.flatnonzero(slots.wants_M4[slots_N, WANTS_TOP]).tolist():
        slot, new = slots_N[row], emitted[row]
        values = after.logprobs_MB[slot, chosen_NB[row]].tolist()
        positions = count(int(slots.block_start_M[slot] + first_N1[row, 0]))
        emitted[row] = new._replace(
            logprobs=tuple(
                TokenLogprob(token_id, value, new.sequence.top_logprobs.pop(position, ()))
                for token_id, value, position in zip(new.token_ids, values, positions, strict=False)
            )
        )
    return emitted
