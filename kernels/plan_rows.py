"""Which tokens a step takes up: rows of blocks, planned from the slots where they lie.

M slots, B block length, P pages per slot, F prefill rows at most, S rows, C tokens; N slots that
take part, R rows, T tokens.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from focus_ray.kernels.delayed_cache import processing_set
from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.plan_kernels import place_rows_kernel, write_rows_kernel
from focus_ray.kernels.retain import eviction_target
from focus_ray.kernels.rows import RowRule, Rows
from focus_ray.kernels.slot_words import SlotWords
from focus_ray.kernels.unmasking import may_be_edited

MAX_WORDS_AT_ONCE = 4096
"""Of each of the arrays that the one program reads which counts everybody's tokens."""


def plan_rows(
    words: SlotWords,
    page_table_MP: Tensor,
    prefill_slot_F: Tensor,
    prefill_start_F: Tensor,
    prefill_ids_FB: Tensor,
    num_prefill_1: Tensor,
    rule: RowRule,
    *,
    page_size: int,
    trash_slot: int,
    first_slot: int,
    out: Rows,
) -> None:
    """Write the rows of the next step into ``out``.

    A slot that takes part has a row of what is left over from its closed block, if anything is, and
    a row of its current block. The tokens of the latter, unless whole blocks are asked for: all
    where the block had no step yet or where nothing is uncached; otherwise the uncached ones; of
    the masked among them, if ``rule.leftmost``, the target's leftmost.

    The target is all masked tokens in the first step of a block which is taken up again after
    preemption: its decoded tokens are known, but the keys and values of none of its tokens are,
    masked ones between decoded ones included, and later layers would read what is not there.

    Beside masked tokens, decoded ones that ``may_be_edited`` are open, if ``rule.whole_blocks``.

    A token sees its sequence up to the rightmost token of its row or, if ``rule.attend_cached``, up
    to the block's rightmost decoded one where that is further.

    When not all active slots fit into the C tokens and S rows, the first ones in cyclic order from
    ``first_slot`` on take part that do, and the first that does not ends the choice.

    Args:
        words: masked tokens are uncached, as ``advance_blocks`` leaves them.
        page_table_MP: int32, page numbers of each slot in order of position.
        prefill_slot_F: int32.
        prefill_start_F: int32, absolute positions of the blocks' first tokens.
        prefill_ids_FB: int32.
        num_prefill_1: int32, how many of the F rows count. They must fit into S rows and C tokens.
        page_size: tokens, a multiple of the block length.
        trash_slot: place in the pages that nobody reads.
        first_slot: 0 to M - 1.

    Raises:
        ValueError: a shape, dtype or number differs from the above.
    """
    _check(words, page_table_MP, prefill_slot_F, prefill_start_F, prefill_ids_FB, num_prefill_1)
    block_length = words.layout.block_length
    if page_size % block_length:
        raise ValueError(
            f"page_size must be a multiple of the block length {block_length}, got {page_size}"
        )
    if not 0 <= first_slot < words.num_slots:
        raise ValueError(f"first_slot must be 0 to {words.num_slots - 1}, got {first_slot}")
    if out.processed_SB.shape[1] != block_length or len(out.row_of_slot_M) != words.num_slots:
        raise ValueError(
            f"out must be for {words.num_slots} slots and blocks of {block_length}, not "
            f"{len(out.row_of_slot_M)} and {out.processed_SB.shape[1]}"
        )
    if not can_launch(words.words_MW, page_table_MP, num_prefill_1, out.counts_4):
        plan_rows_reference(
            words,
            page_table_MP,
            prefill_slot_F,
            prefill_start_F,
            prefill_ids_FB,
            num_prefill_1,
            rule,
            page_size=page_size,
            trash_slot=trash_slot,
            first_slot=first_slot,
            out=out,
        )
        return
    num_rows, num_tokens = len(out.row_slot_S), len(out.token_ids_C)
    slots_at_once = triton.next_power_of_2(words.num_slots)
    block = triton.next_power_of_2(block_length)
    num_warps = max(1, min(slots_at_once // 32, 32))
    place_rows_kernel[(1,)](
        words.words_MW,
        prefill_slot_F,
        prefill_start_F,
        num_prefill_1,
        out.row_slot_S,
        out.row_start_S,
        out.row_offsets_S1,
        out.open_offsets_S1,
        out.target_S,
        out.progress_S,
        out.row_of_slot_M,
        out.counts_4,
        words.words_MW.stride(0),
        words.num_slots,
        num_rows,
        num_tokens,
        first_slot,
        1.0 if rule.alpha is None else rule.alpha,
        BLOCK_LENGTH=block_length,
        WHOLE_BLOCKS=rule.whole_blocks,
        LEFTMOST=rule.leftmost and rule.alpha is not None,
        HAS_ALPHA=rule.alpha is not None,
        SLOTS=slots_at_once,
        CHUNK=max(1, min(block, MAX_WORDS_AT_ONCE // slots_at_once)),
        ROWS=256 * num_warps,
        num_warps=num_warps,
    )
    write_rows_kernel[(num_rows,)](
        words.words_MW,
        page_table_MP,
        prefill_ids_FB,
        num_prefill_1,
        out.row_slot_S,
        out.row_start_S,
        out.row_offsets_S1,
        out.open_offsets_S1,
        out.target_S,
        out.row_of_slot_M,
        out.counts_4,
        out.processed_SB,
        out.masked_SB,
        out.token_ids_C,
        out.positions_C,
        out.slot_C,
        out.kv_limit_C,
        out.open_token_C,
        out.open_place_C,
        words.words_MW.stride(0),
        page_table_MP.stride(0),
        num_tokens,
        page_size,
        trash_slot,
        words.num_slots * block_length,
        BLOCK_LENGTH=block_length,
        WHOLE_BLOCKS=rule.whole_blocks,
        LEFTMOST=rule.leftmost and rule.alpha is not None,
        ATTEND_CACHED=rule.attend_cached,
        BLOCK=block,
        SHARE=triton.next_power_of_2(triton.cdiv(num_tokens, num_rows)),
        num_warps=1,
    )


def _check(
    words: SlotWords,
    page_table_MP: Tensor,
    prefill_slot_F: Tensor,
    prefill_start_F: Tensor,
    prefill_ids_FB: Tensor,
    num_prefill_1: Tensor,
) -> None:
    num_prefill = len(prefill_slot_F)
    for name, tensor, shape in (
        ("page_table_MP", page_table_MP, (words.num_slots, page_table_MP.shape[-1])),
        ("prefill_slot_F", prefill_slot_F, (num_prefill,)),
        ("prefill_start_F", prefill_start_F, (num_prefill,)),
        ("prefill_ids_FB", prefill_ids_FB, (num_prefill, words.layout.block_length)),
        ("num_prefill_1", num_prefill_1, (1,)),
    ):
        if tensor.shape != shape or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous int32 {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )


def plan_rows_reference(
    words: SlotWords,
    page_table_MP: Tensor,
    prefill_slot_F: Tensor,
    prefill_start_F: Tensor,
    prefill_ids_FB: Tensor,
    num_prefill_1: Tensor,
    rule: RowRule,
    *,
    page_size: int,
    trash_slot: int,
    first_slot: int,
    out: Rows,
) -> None:
    """The definition."""
    device, block_length = words.words_MW.device, words.layout.block_length
    num_prefill = int(num_prefill_1)
    slots_N = words.scalar("active").nonzero()[:, 0]
    state = SlotWords(words.layout, words.words_MW[slots_N])
    decoded_NB = state.array("decoded") != 0
    leftover_NB = state.array("leftover") != 0
    processed_NB, target_N = _current_rows(state, decoded_NB, rule)

    # who fits, in cyclic order; what does not fit keeps what is behind it from fitting, too
    cyclic_N = ((slots_N - first_slot) % words.num_slots).argsort()
    num_tokens_N = processed_NB.sum(1) + leftover_NB.sum(1)
    num_rows_N = 1 + leftover_NB.any(1).int()
    max_tokens = len(out.token_ids_C) - num_prefill * block_length
    max_rows = len(out.row_slot_S) - num_prefill
    fits_N = torch.empty_like(slots_N, dtype=torch.bool)
    fits_N[cyclic_N] = (num_tokens_N[cyclic_N].cumsum(0) <= max_tokens) & (
        num_rows_N[cyclic_N].cumsum(0) <= max_rows
    )

    # two candidates each, of which those with tokens become rows: leftover, then current
    processed_N2B = torch.stack([leftover_NB, processed_NB], 1) & fits_N[:, None, None]
    source_R = processed_N2B.any(2).flatten().nonzero()[:, 0]
    n_R, is_current_R = source_R // 2, source_R % 2 == 1
    is_current_R1 = is_current_R[:, None]
    processed_RB = processed_N2B.flatten(0, 1)[source_R]
    decoded_RB = decoded_NB[n_R] | ~is_current_R1
    start_R = state.scalar("block_start")[n_R].long() - block_length * ~is_current_R
    ids_RB = torch.where(
        is_current_R1, state.array("token_ids")[n_R], state.array("closed_ids")[n_R]
    )
    seen_RB = processed_RB | decoded_RB if rule.attend_cached else processed_RB

    num_decoding = len(source_R)
    num_rows = num_decoding + num_prefill
    _fill(out.row_slot_S, 0, slots_N[n_R], prefill_slot_F[:num_prefill])
    _fill(out.row_start_S, 0, start_R, prefill_start_F[:num_prefill])
    whole_FB = torch.ones(num_prefill, block_length, dtype=torch.bool, device=device)
    _fill(out.processed_SB, False, processed_RB, whole_FB)
    _fill(out.masked_SB, False, processed_RB & ~decoded_RB)
    open_SB = out.masked_SB.clone()
    if rule.whole_blocks:
        first_position_N = state.scalar("prompt_len") - state.scalar("block_start")
        editable_NB = may_be_edited(state.scalar("strategy"), first_position_N, decoded_NB)
        open_SB[:num_decoding] |= is_current_R1 & editable_NB[n_R]
    _fill(out.target_S, 0, torch.where(is_current_R, target_N[n_R], 0))
    _fill(out.progress_S, -1, torch.where(is_current_R, state.scalar("progress")[n_R], -1))
    for offsets_S1, among_SB in (
        (out.row_offsets_S1, out.processed_SB),
        (out.open_offsets_S1, open_SB),
    ):
        offsets_S1[0] = 0
        offsets_S1[1:] = among_SB.sum(1).cumsum(0)
    current_R = is_current_R.nonzero()[:, 0]
    out.row_of_slot_M.fill_(-1)
    out.row_of_slot_M[slots_N[n_R[current_R]]] = current_R.int()

    place_T = out.processed_SB.flatten().nonzero()[:, 0]
    row_T, position_T = place_T // block_length, place_T % block_length
    slot_S, start_S = out.row_slot_S[:num_rows].long(), out.row_start_S[:num_rows]
    page_S = page_table_MP[slot_S, start_S // page_size].long()
    first_S = page_S * page_size + start_S % page_size
    offset_B = torch.arange(1, block_length + 1, device=device)
    limit_S = start_S + block_length
    limit_S[:num_decoding] = start_R + torch.where(seen_RB, offset_B, 0).amax(1)
    ids_SB = torch.cat([ids_RB, prefill_ids_FB[:num_prefill]])
    _fill(out.token_ids_C, 0, ids_SB.flatten()[place_T])
    _fill(out.positions_C, 0, start_S[row_T] + position_T)
    _fill(out.slot_C, trash_slot, first_S[row_T] + position_T)
    _fill(out.kv_limit_C, 1, limit_S[row_T])
    open_token_Q = open_SB.flatten()[place_T].nonzero()[:, 0]
    _fill(out.open_token_C, 0, open_token_Q)
    place_of_token_T = slot_S[row_T] * block_length + position_T
    _fill(out.open_place_C, words.num_slots * block_length, place_of_token_T[open_token_Q])
    counts = [len(place_T), len(open_token_Q), num_rows, len(current_R)]
    out.counts_4.copy_(torch.tensor(counts))


def _current_rows(state: SlotWords, decoded_NB: Tensor, rule: RowRule) -> tuple[Tensor, Tensor]:
    """What is processed of the current blocks, ``[N, B]`` bool, and the targets, ``[N]`` int64."""
    warm_up_N = state.scalar("warm_up") != 0
    if rule.whole_blocks:
        processed_NB = torch.ones_like(decoded_NB)
    else:
        processed_NB = processing_set(state.array("uncached") != 0, warm_up_N)
    masked_NB = ~decoded_NB
    target_N = masked_NB.sum(1)
    if rule.alpha is None:
        return processed_NB, target_N
    mean_N = state.scalar("decoded_sum") / state.scalar("productive_steps").clamp_min(1)
    wanted_N = eviction_target(target_N, mean_N, torch.full_like(mean_N, rule.alpha))
    rank_NB = masked_NB.cumsum(1)
    taken_up_again_N = warm_up_N & (decoded_NB & (rank_NB > 0)).any(1)
    target_N = torch.where(taken_up_again_N, target_N, wanted_N)
    if rule.leftmost:
        processed_NB = processed_NB & ~(masked_NB & (rank_NB > target_N[:, None]))
    return processed_NB, target_N


def _fill(buffer: Tensor, padding: float, *parts: Tensor) -> None:
    """Write ``parts`` one behind the other into a buffer, and ``padding`` into the rest of it."""
    end = 0
    for part in parts:
        start, end = end, end + len(part)
        buffer[start:end] = part
    buffer[end:] = padding
