"""What a step makes of the blocks: tokens decoded or edited, blocks closed, texts that are final.

M slots, B block length, S rows, N slots that took part in the step, L blocks that it closes.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from focus_ray.kernels.advance_kernels import advance_blocks_kernel
from focus_ray.kernels.delayed_cache import after_step
from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.rows import Rows
from focus_ray.kernels.slot_words import STRATEGIES, SlotWords
from focus_ray.kernels.unmasking import choose_edited, choose_unmasked, may_be_edited, quota


def advance_blocks(
    words: SlotWords,
    rows: Rows,
    kept_SB: Tensor,
    token_MB: Tensor,
    confidence_MB: Tensor,
    logprob_MB: Tensor,
    *,
    mask_token_id: int,
    whole_blocks: bool,
    chosen_MB: Tensor,
    decodable_MB: Tensor | None,
) -> None:
    """Move every slot that took part in a step on by this step, in place.

    Of the masked tokens that were retained, those which ``choose_unmasked`` names are decoded: to
    what the step found, or to what the block must become there (``forced_ids``). Then

    - the text is final, and the slot no longer active, when the block's contiguous decoded prefix
      has a stop id behind the prompt, or reaches the limit; the block stays as it is;
    - or else, when the whole block is decoded, it is closed: what is not final of it is left over
      for the next step, and the next block begins, all masked.

    Under ``joint_threshold``, decoded tokens are edited, too, as ``choose_edited`` names them, and
    both of these wait for the block to settle: no token was masked before the step, and the step
    edited nothing, or was the last of ``max_post_steps`` such steps. Of a block that settles
    without an edit nothing is left over: the step has processed the tokens that stay.

    What was left over before is final now: the step processed it.

    Args:
        words: changed; slots that took no part stay as they are.
        rows: of the step.
        kept_SB: bool, the tokens of each row that went through all layers.
        token_MB: int64, what each retained open position would become; any value elsewhere.
        confidence_MB: float32, its probability.
        logprob_MB: float32, its log probability at temperature 1.
        mask_token_id: of positions not decoded; no stop id.
        whole_blocks: as in the ``RowRule`` of the step; ``joint_threshold`` edits only with it.
        chosen_MB: bool, receives what was decoded; false for slots that took no part.
        decodable_MB: bool, what would have been decoded without eviction, to be counted.

    Raises:
        ValueError: a shape, dtype or stride differs from the above.
    """
    shape = (words.num_slots, words.layout.block_length)
    for name, tensor, wanted, dtype in (
        ("kept_SB", kept_SB, rows.processed_SB.shape, torch.bool),
        ("token_MB", token_MB, shape, torch.int64),
        ("confidence_MB", confidence_MB, shape, torch.float32),
        ("logprob_MB", logprob_MB, shape, torch.float32),
        ("chosen_MB", chosen_MB, shape, torch.bool),
        ("decodable_MB", chosen_MB if decodable_MB is None else decodable_MB, shape, torch.bool),
    ):
        if tensor.shape != wanted or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(wanted)}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    given = (kept_SB, token_MB, confidence_MB, logprob_MB)
    if not can_launch(words.words_MW, rows.row_of_slot_M, *given, chosen_MB):
        advance_blocks_reference(
            words,
            rows,
            *given,
            mask_token_id=mask_token_id,
            whole_blocks=whole_blocks,
            chosen_MB=chosen_MB,
            decodable_MB=decodable_MB,
        )
        return
    block = triton.next_power_of_2(words.layout.block_length)
    advance_blocks_kernel[(words.num_slots,)](
        words.words_MW,
        rows.row_of_slot_M,
        rows.processed_SB,
        *given,
        chosen_MB,
        decodable_MB,
        words.words_MW.stride(0),
        words.layout.num_stop_ids,
        mask_token_id,
        BLOCK_LENGTH=words.layout.block_length,
        WHOLE_BLOCKS=whole_blocks,
        BLOCK=block,
        num_warps=max(1, block * block // 1024),
    )


def advance_blocks_reference(
    words: SlotWords,
    rows: Rows,
    kept_SB: Tensor,
    token_MB: Tensor,
    confidence_MB: Tensor,
    logprob_MB: Tensor,
    *,
    mask_token_id: int,
    whole_blocks: bool,
    chosen_MB: Tensor,
    decodable_MB: Tensor | None,
) -> None:
    """The definition."""
    slots_N = (rows.row_of_slot_M >= 0).nonzero()[:, 0]
    row_N = rows.row_of_slot_M[slots_N]
    state = SlotWords(words.layout, words.words_MW[slots_N])
    kept_NB, processed_NB = kept_SB[row_N], rows.processed_SB[row_N]
    before_NB = state.array("decoded") != 0
    chosen_NB = choose_unmasked(
        confidence_MB[slots_N],
        kept_NB & ~before_NB,
        strategy_N=state.scalar("strategy"),
        threshold_N=state.scalar("threshold"),
        quota_N=quota(
            words.layout.block_length, state.scalar("num_steps"), state.scalar("denoising_step")
        ),
    )
    chosen_MB.zero_()
    chosen_MB[slots_N] = chosen_NB
    token_ids_NB, forced_NB = state.array("token_ids"), state.array("forced_ids")
    proposed_NB = torch.where(forced_NB == mask_token_id, token_MB[slots_N], forced_NB.long())
    is_joint_N = (state.scalar("strategy") == STRATEGIES.index("joint_threshold")) & whole_blocks
    first_position_N = state.scalar("prompt_len") - state.scalar("block_start")
    editable_NB = may_be_edited(state.scalar("strategy"), first_position_N, before_NB)
    edited_NB = choose_edited(
        confidence_MB[slots_N],
        proposed_NB,
        token_ids_NB,
        kept_NB & editable_NB & whole_blocks,
        state.scalar("editing_threshold"),
    )

    num_leftover_N = state.array("leftover").sum(1)
    num_chosen_N = chosen_NB.sum(1)
    count = {
        "denoising_steps": torch.ones_like(num_chosen_N),
        "processed_tokens": processed_NB.sum(1) + num_leftover_N,
        "retained_tokens": kept_NB.sum(1) + num_leftover_N,
        "evicted_tokens": (~before_NB & ~kept_NB).sum(1),
        "decoded_tokens": num_chosen_N,
        "edited_tokens": edited_NB.sum(1),
    }
    if decodable_MB is not None:
        decodable_NB = decodable_MB[slots_N]
        count["decodable_tokens"] = decodable_NB.sum(1)
        count["recalled_tokens"] = (decodable_NB & kept_NB).sum(1)
    for name, count_N in count.items():
        state.scalar(name).add_(count_N)

    written_NB = chosen_NB | edited_NB
    token_ids_NB.copy_(torch.where(written_NB, proposed_NB, token_ids_NB))
    logprobs_NB = state.array("logprobs")
    logprobs_NB.copy_(torch.where(written_NB, logprob_MB[slots_N], logprobs_NB))
    decoded_NB = before_NB | chosen_NB
    state.array("decoded").copy_(decoded_NB)
    state.array("leftover").zero_()
    state.array("uncached").copy_(after_step(state.array("uncached") != 0, before_NB))
    position_B = torch.arange(kept_NB.shape[1], device=kept_NB.device)
    progress_N = state.scalar("progress")
    progress_N.copy_(torch.where(kept_NB, position_B, progress_N[:, None]).amax(1))
    state.scalar("warm_up").zero_()
    state.scalar("decoded_sum").add_(num_chosen_N)
    state.scalar("productive_steps").add_(num_chosen_N > 0)
    state.scalar("denoising_step").add_(1)

    edits_N, is_post_step_N = edited_NB.any(1), is_joint_N & before_NB.all(1)
    post_steps_N = state.scalar("post_steps").add_(is_post_step_N)
    is_last_N = ~edits_N | (post_steps_N >= state.scalar("max_post_steps"))
    settled_N = ~is_joint_N | (is_post_step_N & is_last_N)
    final_N = settled_N & _is_final(state, decoded_NB, mask_token_id)
    state.scalar("active").copy_(~final_N)
    leftover_NB = (state.array("uncached") != 0) | whole_blocks
    leftover_NB &= ~(is_joint_N & ~edits_N)[:, None]
    closes_L = (settled_N & decoded_NB.all(1) & ~final_N).nonzero()[:, 0]
    state.words_MW[closes_L] = _closed(
        state.words_MW[closes_L], words, mask_token_id, leftover_NB[closes_L]
    )
    words.words_MW[slots_N] = state.words_MW


def _is_final(state: SlotWords, decoded_NB: Tensor, mask_token_id: int) -> Tensor:
    """``[N]`` bool: the contiguous decoded prefix has a stop id, or reaches the limit."""
    in_prefix_NB = decoded_NB.int().cumprod(1) != 0
    end_N = state.scalar("block_start") + in_prefix_NB.sum(1)
    position_B = torch.arange(decoded_NB.shape[1], device=decoded_NB.device)
    position_NB = state.scalar("block_start")[:, None] + position_B
    is_new_NB = in_prefix_NB & (position_NB >= state.scalar("prompt_len")[:, None])
    token_ids_NB, stop_ids_NK = state.array("token_ids"), state.stop_ids_MK
    is_stop_NB = (token_ids_NB[:, :, None] == stop_ids_NK[:, None]).any(2)
    is_stop_NB &= token_ids_NB != mask_token_id  # with which stop ids are padded
    return (is_new_NB & is_stop_NB).any(1) | (end_N >= state.scalar("limit"))


def _closed(words_LW: Tensor, words: SlotWords, mask_token_id: int, leftover_LB: Tensor) -> Tensor:
    """The words of wholly decoded blocks, once these are closed and the next ones begin."""
    state = SlotWords(words.layout, words_LW)
    state.array("closed_ids").copy_(state.array("token_ids"))
    state.array("closed_logprobs").copy_(state.array("logprobs"))
    state.array("leftover").copy_(leftover_LB)
    state.array("token_ids").fill_(mask_token_id)
    state.array("decoded").zero_()
    state.array("logprobs").zero_()
    state.array("uncached").fill_(1)
    state.array("forced_ids").fill_(mask_token_id)
    state.scalar("block_start").add_(words.layout.block_length)
    state.scalar("warm_up").fill_(1)
    state.scalar("progress").fill_(-1)
    for name in ("decoded_sum", "productive_steps", "post_steps", "denoising_step"):
        state.scalar(name).zero_()
    return words_LW
