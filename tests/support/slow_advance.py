"""``advance_blocks`` once more, slot by slot in plain Python, and steps to try both on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from slot_states import MASK_ID, NUM_IDS, Draws, copy_of
from torch import Tensor

from focus_ray.kernels.rows import Rows
from focus_ray.kernels.slot_words import ARRAYS, SCALARS, STRATEGIES, SlotWords


@dataclass(frozen=True)
class Outcome:
    """What a step found out about the blocks of all slots, on the CPU."""

    rows: Rows
    kept_SB: Tensor
    token_MB: Tensor
    confidence_MB: Tensor
    logprob_MB: Tensor
    decodable_MB: Tensor | None = None
    whole_blocks: bool = False


def random_outcome(words: SlotWords, draws: Draws, *, counted: bool, whole_blocks: bool) -> Outcome:
    """Some active slots took no part; confidences are multiples of 1/8, as are thresholds."""
    num_slots, block_length = words.num_slots, words.layout.block_length
    num_rows = 2 * num_slots + 1
    rows = Rows.allocate(num_slots, block_length, num_rows, 1, "cpu")
    rows.processed_SB.copy_(draws.flags(0.8, num_rows, block_length))
    took_part_M = (words.scalar("active") != 0) & draws.flags(0.8, num_slots)
    row_M = torch.randperm(num_rows, generator=draws.generator)[:num_slots]
    rows.row_of_slot_M.copy_(torch.where(took_part_M, row_M, -1))
    shape = (num_slots, block_length)
    return Outcome(
        rows=rows,
        kept_SB=rows.processed_SB & draws.flags(draws.uniform(num_rows, 1), *rows.masked_SB.shape),
        token_MB=draws.integers(0, NUM_IDS, *shape),
        confidence_MB=draws.integers(0, 9, *shape) / 8,
        logprob_MB=-draws.uniform(*shape),
        decodable_MB=draws.flags(0.3, *shape) if counted else None,
        whole_blocks=whole_blocks,
    )


class SlowSlot:
    """One slot in plain numbers; columns are attributes, and ``store`` writes them back."""

    def __init__(self, words: SlotWords, slot: int) -> None:
        self._words, self._slot = words, slot
        self.columns: dict[str, Any] = {name: words.array(name)[slot].tolist() for name in ARRAYS}
        self.columns |= {name: words.scalar(name)[slot].item() for name in SCALARS}

    def __getattr__(self, name: str) -> Any:
        return self.columns[name]

    def store(self) -> None:
        for name, value in self.columns.items():
            view = self._words.array(name) if name in ARRAYS else self._words.scalar(name)
            view[self._slot] = torch.tensor(value).to(view.dtype)


def slow_choice(slot: SlowSlot, candidates: list[int], confidence: list[float]) -> list[int]:
    """Which of the candidates are decoded."""
    block_length = len(slot.decoded)
    quota = block_length // slot.num_steps
    quota += slot.denoising_step < block_length % slot.num_steps
    quota = max(quota, 1)
    best = sorted(candidates, key=lambda b: (-confidence[b], b))[:quota]
    strategy = STRATEGIES[slot.strategy]
    if strategy == "sequential":
        return [b for b in candidates if b < candidates[0] + quota]
    above = [b for b in candidates if confidence[b] > slot.threshold]
    if strategy != "low_confidence_static" and len(above) >= quota:
        return above
    return best


def slow_advance_slot(words: SlotWords, m: int, outcome: Outcome) -> list[int]:
    """Advance one slot that took part; the positions that were decoded."""
    slot = SlowSlot(words, m)
    columns, block_length = slot.columns, words.layout.block_length
    positions = range(block_length)
    row = int(outcome.rows.row_of_slot_M[m])
    processed = [b for b in positions if outcome.rows.processed_SB[row, b]]
    kept = [b for b in positions if outcome.kept_SB[row, b]]
    before = [bool(flag) for flag in slot.decoded]
    chosen = slow_choice(
        slot, [b for b in kept if not before[b]], outcome.confidence_MB[m].tolist()
    )

    columns["denoising_steps"] += 1
    columns["processed_tokens"] += len(processed) + sum(slot.leftover)
    columns["retained_tokens"] += len(kept) + sum(slot.leftover)
    columns["evicted_tokens"] += sum(not before[b] and b not in kept for b in positions)
    columns["decoded_tokens"] += len(chosen)
    found = [
        int(outcome.token_MB[m, b]) if forced == MASK_ID else forced
        for b, forced in enumerate(slot.forced_ids)
    ]
    is_joint = outcome.whole_blocks and STRATEGIES[slot.strategy] == "joint_threshold"
    edited = [
        b
        for b in kept
        if is_joint
        and before[b]
        and slot.block_start + b >= slot.prompt_len
        and outcome.confidence_MB[m, b] > slot.editing_threshold
        and found[b] != slot.token_ids[b]
    ]
    columns["edited_tokens"] += len(edited)
    if outcome.decodable_MB is not None:
        decodable = [b for b in positions if outcome.decodable_MB[m, b]]
        columns["decodable_tokens"] += len(decodable)
        columns["recalled_tokens"] += len(set(decodable) & set(kept))

    for b in chosen + edited:
        slot.token_ids[b] = found[b]
        slot.logprobs[b] = float(outcome.logprob_MB[m, b])
        slot.decoded[b] = 1
    has_settled = True
    if is_joint:
        columns["post_steps"] += all(before)
        is_last = not edited or slot.post_steps >= slot.max_post_steps
        has_settled = all(before) and is_last
    for b in positions:
        if before[b] and (b + 1 == block_length or before[b + 1]):
            slot.uncached[b] = 0
    columns["leftover"] = [0] * block_length
    columns["progress"] = max([slot.progress, *kept])
    columns["decoded_sum"] += len(chosen)
    columns["productive_steps"] += bool(chosen)
    columns["denoising_step"] += 1
    columns["warm_up"] = 0

    prefix = 0
    while prefix < block_length and slot.decoded[prefix]:
        prefix += 1
    stop_ids = set(words.stop_ids_MK[m].tolist()) - {MASK_ID}
    stops = any(
        slot.token_ids[b] in stop_ids
        for b in range(prefix)
        if slot.block_start + b >= slot.prompt_len
    )
    if not has_settled:
        pass
    elif stops or slot.block_start + prefix >= slot.limit:
        columns["active"] = 0
    elif prefix == block_length:
        columns |= {
            "closed_ids": slot.token_ids,
            "closed_logprobs": slot.logprobs,
            "leftover": (
                [int(not is_joint or bool(edited))] * block_length
                if outcome.whole_blocks
                else slot.uncached
            ),
            "block_start": slot.block_start + block_length,
            "token_ids": [MASK_ID] * block_length,
            "decoded": [0] * block_length,
            "logprobs": [0.0] * block_length,
            "uncached": [1] * block_length,
            "forced_ids": [MASK_ID] * block_length,
            "warm_up": 1,
            "progress": -1,
            "decoded_sum": 0,
            "productive_steps": 0,
            "post_steps": 0,
            "denoising_step": 0,
        }
    slot.store()
    return chosen


def slow_advance(words: SlotWords, outcome: Outcome) -> tuple[SlotWords, Tensor]:
    """Slot by slot."""
    words = copy_of(words, "cpu")
    chosen_MB = torch.zeros_like(outcome.token_MB, dtype=torch.bool)
    for m in range(words.num_slots):
        if outcome.rows.row_of_slot_M[m] >= 0:
            chosen_MB[m, slow_advance_slot(words, m, outcome)] = True
    return words, chosen_MB
