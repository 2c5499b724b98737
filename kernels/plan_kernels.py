"""The Triton kernels of ``plan_rows``: first how many tokens everyone has, then the tokens.

M slots, B block length, S rows, C tokens, T of them used. A kernel of many programs cannot know
where a row's tokens go before all rows are counted; one program counts them in a few microseconds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from focus_ray.kernels.slot_columns import (
    ACTIVE,
    BLOCK_START,
    CLOSED_IDS,
    DECODED,
    DECODED_SUM,
    JOINT,
    LEFTOVER,
    PRODUCTIVE_STEPS,
    PROGRESS,
    PROMPT_LEN,
    STRATEGY,
    TOKEN_IDS,
    UNCACHED,
    WARM_UP,
    array_at,
    scalar_at,
)


@triton.jit(
    do_not_specialize=["words_stride_m", "num_slots", "num_rows", "num_tokens", "first_slot"]
)
def place_rows_kernel(
    words_ptr,
    prefill_slot_ptr,
    prefill_start_ptr,
    num_prefill_ptr,
    row_slot_ptr,
    row_start_ptr,
    row_offsets_ptr,
    open_offsets_ptr,
    target_ptr,
    progress_ptr,
    row_of_slot_ptr,
    counts_ptr,
    words_stride_m,
    num_slots,
    num_rows,
    num_tokens,
    first_slot,
    alpha,
    BLOCK_LENGTH: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    LEFTMOST: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # One program owns everything: the table of rows, and who takes part.
    m = tl.arange(0, SLOTS)
    exists = m < num_slots
    slot_ptrs = words_ptr + m.to(tl.int64) * words_stride_m
    scalar_ptrs = slot_ptrs + scalar_at(0, BLOCK_LENGTH)
    block_start = tl.load(scalar_ptrs + BLOCK_START, mask=exists, other=0)
    num_masked = tl.zeros([SLOTS], tl.int32)
    num_editable = tl.zeros([SLOTS], tl.int32)
    num_uncached = tl.zeros([SLOTS], tl.int32)
    num_leftover = tl.zeros([SLOTS], tl.int32)
    first_masked = tl.full([SLOTS], BLOCK_LENGTH, tl.int32)
    last_decoded = tl.full([SLOTS], -1, tl.int32)
    if WHOLE_BLOCKS:
        strategy = tl.load(scalar_ptrs + STRATEGY, mask=exists, other=0)
        prompt_len = tl.load(scalar_ptrs + PROMPT_LEN, mask=exists, other=0)
        first_editable = tl.where(strategy == JOINT, prompt_len - block_start, BLOCK_LENGTH)
    for start in range(0, BLOCK_LENGTH, CHUNK):
        b = (start + tl.arange(0, CHUNK))[None, :]
        inside = exists[:, None] & (b < BLOCK_LENGTH)
        ptrs = slot_ptrs[:, None] + b
        decoded = tl.load(ptrs + array_at(DECODED, BLOCK_LENGTH), mask=inside, other=0)
        uncached = tl.load(ptrs + array_at(UNCACHED, BLOCK_LENGTH), mask=inside, other=0)
        leftover = tl.load(ptrs + array_at(LEFTOVER, BLOCK_LENGTH), mask=inside, other=0)
        masked = inside & (decoded == 0)
        num_masked += tl.sum(masked.to(tl.int32), 1)
        if WHOLE_BLOCKS:
            is_editable = inside & (decoded != 0) & (b >= first_editable[:, None])
            num_editable += tl.sum(is_editable.to(tl.int32), 1)
        num_uncached += tl.sum(uncached, 1)
        num_leftover += tl.sum(leftover, 1)
        first_masked = tl.minimum(first_masked, tl.min(tl.where(masked, b, BLOCK_LENGTH), 1))
        last_decoded = tl.maximum(last_decoded, tl.max(tl.where(decoded != 0, b, -1), 1))

    active = tl.load(scalar_ptrs + ACTIVE, mask=exists, other=0) != 0
    warm_up = tl.load(scalar_ptrs + WARM_UP, mask=exists, other=0) != 0
    target = num_masked
    if HAS_ALPHA:
        decoded_sum = tl.load(scalar_ptrs + DECODED_SUM, mask=exists, other=0)
        num_steps = tl.load(scalar_ptrs + PRODUCTIVE_STEPS, mask=exists, other=0)
        # rounded as the definition does it: an approximate quotient could change the target
        mean = tl.div_rn(decoded_sum.to(tl.float32), tl.maximum(num_steps, 1).to(tl.float32))
        wanted = tl.maximum(tl.ceil(tl.maximum(mean, 1.0) * alpha).to(tl.int32), 1)
        taken_up_again = warm_up & (last_decoded > first_masked)
        target = tl.where(taken_up_again, num_masked, tl.minimum(num_masked, wanted))
    if WHOLE_BLOCKS:
        current_len = tl.full([SLOTS], BLOCK_LENGTH, tl.int32)
    else:
        is_whole = warm_up | (num_uncached == 0)
        current_len = tl.where(is_whole, BLOCK_LENGTH, num_uncached)
    open_len = num_masked + num_editable
    if LEFTMOST:
        current_len -= num_masked - target
        open_len = target

    # who fits, in cyclic order from the first slot on
    num_prefill = tl.load(num_prefill_ptr)
    has_leftover = active & (num_leftover > 0)
    tokens = tl.where(active, current_len + num_leftover, 0)
    rows = active.to(tl.int32) + has_leftover.to(tl.int32)
    takes_part = (
        active
        & (_cyclic_sums(tokens, m, first_slot) <= num_tokens - num_prefill * BLOCK_LENGTH)
        & (_cyclic_sums(rows, m, first_slot) <= num_rows - num_prefill)
    )
    tokens = tl.where(takes_part, tokens, 0)
    rows = tl.where(takes_part, rows, 0)
    open_len = tl.where(takes_part, open_len, 0)
    first_token = tl.cumsum(tokens, 0) - tokens
    first_row = tl.cumsum(rows, 0) - rows
    first_open = tl.cumsum(open_len, 0) - open_len

    block_start = block_start.to(tl.int64)
    is_left = takes_part & has_leftover
    tl.store(row_slot_ptr + first_row, m, mask=is_left)
    tl.store(row_start_ptr + first_row, block_start - BLOCK_LENGTH, mask=is_left)
    tl.store(row_offsets_ptr + first_row, first_token, mask=is_left)
    tl.store(open_offsets_ptr + first_row, first_open, mask=is_left)
    tl.store(target_ptr + first_row, tl.zeros([SLOTS], tl.int64), mask=is_left)
    tl.store(progress_ptr + first_row, tl.full([SLOTS], -1, tl.int64), mask=is_left)

    row = first_row + has_leftover.to(tl.int32)
    progress = tl.load(scalar_ptrs + PROGRESS, mask=exists, other=0)
    tl.store(row_slot_ptr + row, m, mask=takes_part)
    tl.store(row_start_ptr + row, block_start, mask=takes_part)
    tl.store(row_offsets_ptr + row, first_token + num_leftover, mask=takes_part)
    tl.store(open_offsets_ptr + row, first_open, mask=takes_part)
    tl.store(target_ptr + row, target.to(tl.int64), mask=takes_part)
    tl.store(progress_ptr + row, progress.to(tl.int64), mask=takes_part)
    tl.store(row_of_slot_ptr + m, tl.where(takes_part, row, -1), mask=exists)

    # behind them the rows of prefill, and rows of nobody
    num_decoding = tl.sum(rows, 0)
    num_decoding_tokens = tl.sum(tokens, 0)
    num_open_tokens = tl.sum(open_len, 0)
    for start in range(0, num_rows + 1, ROWS):
        s = start + tl.arange(0, ROWS)
        f = s - num_decoding
        is_prefill = (f >= 0) & (f < num_prefill)
        is_behind = (f >= 0) & (s < num_rows)
        prefill_slot = tl.load(prefill_slot_ptr + f, mask=is_prefill, other=0)
        prefill_start = tl.load(prefill_start_ptr + f, mask=is_prefill, other=0)
        offset = num_decoding_tokens + tl.minimum(f, num_prefill) * BLOCK_LENGTH
        tl.store(row_slot_ptr + s, prefill_slot, mask=is_behind)
        tl.store(row_start_ptr + s, prefill_start.to(tl.int64), mask=is_behind)
        tl.store(row_offsets_ptr + s, offset, mask=(f >= 0) & (s <= num_rows))
        tl.store(open_offsets_ptr + s, num_open_tokens, mask=(f >= 0) & (s <= num_rows))
        tl.store(target_ptr + s, tl.zeros([ROWS], tl.int64), mask=is_behind)
        tl.store(progress_ptr + s, tl.full([ROWS], -1, tl.int64), mask=is_behind)
    tl.store(counts_ptr, num_decoding_tokens + num_prefill * BLOCK_LENGTH)
    tl.store(counts_ptr + 1, num_open_tokens)
    tl.store(counts_ptr + 2, num_decoding + num_prefill)
    tl.store(counts_ptr + 3, tl.sum(takes_part.to(tl.int32), 0))


@triton.jit
def _cyclic_sums(values, m, first_slot):
    """Inclusive prefix sums in the order ``first_slot, first_slot + 1, ..., first_slot - 1``."""
    before = tl.sum(tl.where(m < first_slot, values, 0), 0)
    around = tl.sum(values, 0) - before
    return tl.cumsum(values, 0) + tl.where(m < first_slot, around, -before)


@triton.jit(
    do_not_specialize=[
        "words_stride_m",
        "page_table_stride_m",
        "num_tokens",
        "trash_slot",
        "trash_place",
    ]
)
def write_rows_kernel(
    words_ptr,
    page_table_ptr,
    prefill_ids_ptr,
    num_prefill_ptr,
    row_slot_ptr,
    row_start_ptr,
    row_offsets_ptr,
    open_offsets_ptr,
    target_ptr,
    row_of_slot_ptr,
    counts_ptr,
    processed_ptr,
    masked_ptr,
    token_ids_ptr,
    positions_ptr,
    slot_ptr,
    kv_limit_ptr,
    open_token_ptr,
    open_place_ptr,
    words_stride_m,
    page_table_stride_m,
    num_tokens,
    page_size,
    trash_slot,
    trash_place,
    BLOCK_LENGTH: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    LEFTMOST: tl.constexpr,
    ATTEND_CACHED: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
):
    # One program owns one row, its tokens, and SHARE entries of what may be padding behind T.
    s = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCK)
    inside = b < BLOCK_LENGTH
    num_used = tl.load(counts_ptr)
    num_open = tl.load(counts_ptr + 1)
    num_rows = tl.load(counts_ptr + 2)
    first_prefill = num_rows - tl.load(num_prefill_ptr)

    m = tl.load(row_slot_ptr + s).to(tl.int64)
    words_ptr += m * words_stride_m
    is_current = tl.load(row_of_slot_ptr + m) == s
    decoded = tl.load(words_ptr + array_at(DECODED, BLOCK_LENGTH) + b, mask=inside, other=1) != 0
    is_masked = is_current & ~decoded
    if is_current:
        ids_ptr = words_ptr + array_at(TOKEN_IDS, BLOCK_LENGTH)
        processed = inside
        if not WHOLE_BLOCKS:
            uncached_ptr = words_ptr + array_at(UNCACHED, BLOCK_LENGTH)
            uncached = tl.load(uncached_ptr + b, mask=inside, other=0)
            warm_up = tl.load(words_ptr + scalar_at(WARM_UP, BLOCK_LENGTH))
            is_whole = (warm_up != 0) | (tl.sum(uncached, 0) == 0)
            processed = inside & (is_whole | (uncached != 0))
        if LEFTMOST:
            rank = tl.cumsum(is_masked.to(tl.int32), 0)
            processed = processed & ~(is_masked & (rank > tl.load(target_ptr + s)))
    elif s < first_prefill:
        ids_ptr = words_ptr + array_at(CLOSED_IDS, BLOCK_LENGTH)
        leftover_ptr = words_ptr + array_at(LEFTOVER, BLOCK_LENGTH)
        processed = tl.load(leftover_ptr + b, mask=inside, other=0) != 0
    else:
        ids_ptr = prefill_ids_ptr + (s - first_prefill) * BLOCK_LENGTH
        processed = inside & (s < num_rows)
    is_masked = is_masked & processed
    tl.store(processed_ptr + s * BLOCK_LENGTH + b, processed, mask=inside)
    tl.store(masked_ptr + s * BLOCK_LENGTH + b, is_masked, mask=inside)

    start = tl.load(row_start_ptr + s)
    is_open = is_masked
    if WHOLE_BLOCKS:
        scalars_ptr = words_ptr + scalar_at(0, BLOCK_LENGTH)
        is_joint = is_current & (tl.load(scalars_ptr + STRATEGY) == JOINT)
        is_answer = start + b >= tl.load(scalars_ptr + PROMPT_LEN)
        is_open = is_masked | (inside & decoded & is_joint & is_answer)
    is_seen = processed
    if ATTEND_CACHED:
        is_seen = processed | (inside & ~(is_current & ~decoded))
    limit = start + tl.max(tl.where(is_seen, b + 1, 0), 0)
    page = tl.load(page_table_ptr + m * page_table_stride_m + start // page_size).to(tl.int64)
    slot = page * page_size + start % page_size + b
    ids = tl.load(ids_ptr + b, mask=processed, other=0)
    count = processed.to(tl.int32)
    t = tl.load(row_offsets_ptr + s) + tl.cumsum(count, 0) - count
    tl.store(token_ids_ptr + t, ids.to(tl.int64), mask=processed)
    tl.store(positions_ptr + t, start + b, mask=processed)
    tl.store(slot_ptr + t, slot, mask=processed)
    tl.store(kv_limit_ptr + t, (limit + tl.zeros_like(t)).to(tl.int32), mask=processed)
    count = is_open.to(tl.int32)
    index = tl.load(open_offsets_ptr + s) + tl.cumsum(count, 0) - count
    tl.store(open_token_ptr + index, t.to(tl.int64), mask=is_open)
    tl.store(open_place_ptr + index, m * BLOCK_LENGTH + b, mask=is_open)

    entry = s * SHARE + tl.arange(0, SHARE)
    zeros = tl.zeros([SHARE], tl.int64)
    is_padding = (entry >= num_used) & (entry < num_tokens)
    tl.store(token_ids_ptr + entry, zeros, mask=is_padding)
    tl.store(positions_ptr + entry, zeros, mask=is_padding)
    tl.store(slot_ptr + entry, zeros + trash_slot, mask=is_padding)
    tl.store(kv_limit_ptr + entry, tl.full([SHARE], 1, tl.int32), mask=is_padding)
    is_padding = (entry >= num_open) & (entry < num_tokens)
    tl.store(open_token_ptr + entry, zeros, mask=is_padding)
    tl.store(open_place_ptr + entry, zeros + trash_place, mask=is_padding)
