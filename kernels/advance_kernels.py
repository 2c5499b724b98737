"""The Triton kernel of ``advance_blocks``.

B block length, K stop ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

from focus_ray.kernels.slot_columns import (
    ACTIVE,
    BLOCK_START,
    CLOSED_IDS,
    CLOSED_LOGPROBS,
    DECODABLE_TOKENS,
    DECODED,
    DECODED_SUM,
    DECODED_TOKENS,
    DENOISING_STEP,
    DENOISING_STEPS,
    EDITED_TOKENS,
    EDITING_THRESHOLD,
    EVICTED_TOKENS,
    FORCED_IDS,
    JOINT,
    LEFTOVER,
    LIMIT,
    LOGPROBS,
    MAX_POST_STEPS,
    NUM_STEPS,
    POST_STEPS,
    PROCESSED_TOKENS,
    PRODUCTIVE_STEPS,
    PROGRESS,
    PROMPT_LEN,
    RECALLED_TOKENS,
    RETAINED_TOKENS,
    SEQUENTIAL,
    STATIC,
    STRATEGY,
    THRESHOLD,
    TOKEN_IDS,
    UNCACHED,
    WARM_UP,
    add_to,
    array_at,
    scalar_at,
    stop_ids_at,
)

STOP_IDS_AT_ONCE = tl.constexpr(16)


@triton.jit
def advance_blocks_kernel(
    words_ptr,
    row_of_slot_ptr,
    processed_ptr,
    kept_ptr,
    token_ptr,
    confidence_ptr,
    logprob_ptr,
    chosen_ptr,
    decodable_ptr,
    words_stride_m,
    num_stop_ids,
    mask_token_id,
    BLOCK_LENGTH: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns one slot.
    m = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCK)
    inside = b < BLOCK_LENGTH
    place = m * BLOCK_LENGTH + b
    row = tl.load(row_of_slot_ptr + m)
    if row < 0:
        tl.store(chosen_ptr + place, tl.zeros([BLOCK], tl.int1), mask=inside)
        return

    words_ptr += m * words_stride_m
    scalars_ptr = words_ptr + scalar_at(0, BLOCK_LENGTH)
    row_place = row.to(tl.int64) * BLOCK_LENGTH + b
    processed = tl.load(processed_ptr + row_place, mask=inside, other=0).to(tl.int32)
    kept = tl.load(kept_ptr + row_place, mask=inside, other=0) != 0
    decoded_ptr = words_ptr + array_at(DECODED, BLOCK_LENGTH)
    before = tl.load(decoded_ptr + b, mask=inside, other=1) != 0

    # what is decoded, and what is edited
    confidence = tl.load(confidence_ptr + place, mask=inside, other=0.0)
    step = tl.load(scalars_ptr + DENOISING_STEP)
    num_steps = tl.load(scalars_ptr + NUM_STEPS)
    least = BLOCK_LENGTH // num_steps + (step < BLOCK_LENGTH % num_steps).to(tl.int32)
    strategy = tl.load(scalars_ptr + STRATEGY)
    chosen = _choose(
        confidence,
        kept & ~before,
        b,
        strategy,
        tl.load(scalars_ptr + THRESHOLD).to(tl.float32, bitcast=True),
        tl.maximum(least, 1),
        BLOCK,
    )
    tl.store(chosen_ptr + place, chosen, mask=inside)
    token_ids_ptr = words_ptr + array_at(TOKEN_IDS, BLOCK_LENGTH)
    logprobs_ptr = words_ptr + array_at(LOGPROBS, BLOCK_LENGTH)
    proposed = tl.load(token_ptr + place, mask=kept, other=0).to(tl.int32)
    forced_ids_ptr = words_ptr + array_at(FORCED_IDS, BLOCK_LENGTH)
    forced = tl.load(forced_ids_ptr + b, mask=inside, other=mask_token_id)
    proposed = tl.where(forced == mask_token_id, proposed, forced)
    token = tl.load(token_ids_ptr + b, mask=inside, other=0)
    start = tl.load(scalars_ptr + BLOCK_START)
    is_answer = start + b >= tl.load(scalars_ptr + PROMPT_LEN)
    written = chosen
    if WHOLE_BLOCKS:
        is_joint = strategy == JOINT
        surest = tl.load(scalars_ptr + EDITING_THRESHOLD).to(tl.float32, bitcast=True)
        edited = kept & before & is_joint & is_answer & (confidence > surest) & (proposed != token)
        written = chosen | edited
        num_edited = tl.sum(edited.to(tl.int32), 0)
    token = tl.where(written, proposed, token)
    logprob = tl.load(logprob_ptr + place, mask=written, other=0.0).to(tl.int32, bitcast=True)
    logprob = tl.where(written, logprob, tl.load(logprobs_ptr + b, mask=inside, other=0))
    decoded = before | chosen

    # what the next steps need to know of the block
    leftover_ptr = words_ptr + array_at(LEFTOVER, BLOCK_LENGTH)
    num_leftover = tl.sum(tl.load(leftover_ptr + b, mask=inside, other=0), 0)
    right_ptr = decoded_ptr + b + 1
    right_before = tl.load(right_ptr, mask=b + 1 < BLOCK_LENGTH, other=1) != 0
    uncached_ptr = words_ptr + array_at(UNCACHED, BLOCK_LENGTH)
    uncached = tl.load(uncached_ptr + b, mask=inside, other=0) != 0
    uncached = uncached & ~(before & right_before)
    rightmost = tl.max(tl.where(kept, b, -1), 0)
    progress = tl.maximum(tl.load(scalars_ptr + PROGRESS), rightmost)
    num_chosen = tl.sum(chosen.to(tl.int32), 0)
    decoded_sum = tl.load(scalars_ptr + DECODED_SUM) + num_chosen
    productive_steps = tl.load(scalars_ptr + PRODUCTIVE_STEPS) + (num_chosen > 0).to(tl.int32)

    # what it was worth
    num_kept = tl.sum(kept.to(tl.int32), 0)
    add_to(scalars_ptr + DENOISING_STEPS, 1)
    add_to(scalars_ptr + PROCESSED_TOKENS, tl.sum(processed, 0) + num_leftover)
    add_to(scalars_ptr + RETAINED_TOKENS, num_kept + num_leftover)
    add_to(scalars_ptr + EVICTED_TOKENS, tl.sum((inside & ~before & ~kept).to(tl.int32), 0))
    add_to(scalars_ptr + DECODED_TOKENS, num_chosen)
    if WHOLE_BLOCKS:
        add_to(scalars_ptr + EDITED_TOKENS, num_edited)
    if decodable_ptr is not None:
        decodable = tl.load(decodable_ptr + place, mask=inside, other=0) != 0
        add_to(scalars_ptr + DECODABLE_TOKENS, tl.sum(decodable.to(tl.int32), 0))
        add_to(scalars_ptr + RECALLED_TOKENS, tl.sum((decodable & kept).to(tl.int32), 0))

    # the end of the text, or of the block
    prefix = tl.min(tl.where(decoded & inside, BLOCK_LENGTH, b), 0)
    is_new = (b < prefix) & is_answer
    is_stop = _is_stop(
        token, words_ptr + stop_ids_at(BLOCK_LENGTH), num_stop_ids, mask_token_id, BLOCK
    )
    is_final = (tl.sum((is_new & is_stop).to(tl.int32), 0) > 0) | (
        start + prefix >= tl.load(scalars_ptr + LIMIT)
    )
    closes = prefix == BLOCK_LENGTH
    leftover = uncached
    post_steps = tl.load(scalars_ptr + POST_STEPS)
    if WHOLE_BLOCKS:
        is_post_step = is_joint & (tl.sum((inside & ~before).to(tl.int32), 0) == 0)
        post_steps += is_post_step.to(tl.int32)
        is_last = (num_edited == 0) | (post_steps >= tl.load(scalars_ptr + MAX_POST_STEPS))
        has_settled = ~is_joint | (is_post_step & is_last)
        is_final = is_final & has_settled
        closes = closes & has_settled
        leftover = inside & ~(is_joint & (num_edited == 0))
    closes = closes & ~is_final

    # threads read words that others write: from here on nothing is read that is written below
    tl.debug_barrier()
    if closes:
        closed_ids_ptr = words_ptr + array_at(CLOSED_IDS, BLOCK_LENGTH)
        closed_logprobs_ptr = words_ptr + array_at(CLOSED_LOGPROBS, BLOCK_LENGTH)
        tl.store(closed_ids_ptr + b, token, mask=inside)
        tl.store(closed_logprobs_ptr + b, logprob, mask=inside)
        tl.store(forced_ids_ptr + b, mask_token_id, mask=inside)
    # values of the next block, if the step closes this one
    tl.store(leftover_ptr + b, (leftover & closes).to(tl.int32), mask=inside)
    tl.store(token_ids_ptr + b, tl.where(closes, mask_token_id, token), mask=inside)
    tl.store(logprobs_ptr + b, tl.where(closes, 0, logprob), mask=inside)
    tl.store(decoded_ptr + b, (decoded & ~closes).to(tl.int32), mask=inside)
    tl.store(uncached_ptr + b, (uncached | closes).to(tl.int32), mask=inside)
    tl.store(scalars_ptr + ACTIVE, (~is_final).to(tl.int32))
    tl.store(scalars_ptr + BLOCK_START, start + tl.where(closes, BLOCK_LENGTH, 0))
    tl.store(scalars_ptr + DENOISING_STEP, tl.where(closes, 0, step + 1))
    tl.store(scalars_ptr + WARM_UP, closes.to(tl.int32))
    tl.store(scalars_ptr + PROGRESS, tl.where(closes, -1, progress))
    tl.store(scalars_ptr + DECODED_SUM, tl.where(closes, 0, decoded_sum))
    tl.store(scalars_ptr + PRODUCTIVE_STEPS, tl.where(closes, 0, productive_steps))
    tl.store(scalars_ptr + POST_STEPS, tl.where(closes, 0, post_steps))


@triton.jit
def _choose(confidence, masked, b, strategy, threshold, least, BLOCK: tl.constexpr):
    """``choose_unmasked`` of one block."""
    ranked = tl.where(masked, confidence, -1.0)
    first = tl.min(tl.where(masked, b, BLOCK), 0)
    above = masked & (confidence > threshold)
    is_enough = tl.sum(above.to(tl.int32), 0) >= least
    other, i = ranked[None, :], ranked[:, None]
    is_ahead = (other > i) | ((other == i) & (b[None, :] < b[:, None]))
    best = masked & (tl.sum(is_ahead.to(tl.int32), 1) < least)
    window = masked & (b < first + least)
    dynamic = (is_enough & above) | (~is_enough & best)
    is_static, is_sequential = strategy == STATIC, strategy == SEQUENTIAL
    chosen = (is_static & best) | (~is_static & dynamic)
    return (is_sequential & window) | (~is_sequential & chosen)


@triton.jit
def _is_stop(token, stop_ids_ptr, num_stop_ids, mask_token_id, BLOCK: tl.constexpr):
    """Which tokens are stop ids; the mask id, with which these are padded, is none."""
    is_stop = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_stop_ids, STOP_IDS_AT_ONCE):
        k = first + tl.arange(0, STOP_IDS_AT_ONCE)
        stop_id = tl.load(stop_ids_ptr + k, mask=k < num_stop_ids, other=mask_token_id)
        is_stop += tl.sum((token[:, None] == stop_id[None, :]).to(tl.int32), 1)
    return (is_stop > 0) & (token != mask_token_id)
