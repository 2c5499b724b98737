from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slot_states import MASK_ID, NUM_IDS, Draws, copy_of, random_words
from torch import Tensor

from focus_ray.kernels.launch import INTERPRETED
from focus_ray.kernels.plan_rows import plan_rows
from focus_ray.kernels.rows import RowRule, Rows
from focus_ray.kernels.slot_words import STRATEGIES, SlotLayout, SlotWords

TRASH_SLOT = 7
BLOCKS = RowRule(whole_blocks=True, leftmost=False, attend_cached=False, alpha=None)
DELAYED = RowRule(whole_blocks=False, leftmost=False, attend_cached=True, alpha=None)
FOCUS = RowRule(whole_blocks=False, leftmost=False, attend_cached=False, alpha=1.5)
LEFTMOST = RowRule(whole_blocks=False, leftmost=True, attend_cached=True, alpha=1.2)


@dataclass(frozen=True)
class Step:
    """What a step is planned from, on the CPU; ``prefill`` is slot, start and ids of each block."""

    words: SlotWords
    page_table_MP: Tensor
    page_size: int
    rule: RowRule
    first_slot: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    prefill: list[tuple[int, int, list[int]]] = field(default_factory=list)


def random_step(
    num_slots: int,
    block_length: int,
    rule: RowRule,
    seed: int,
    *,
    num_prefill: int = 0,
    room: float = 1.0,
    first_slot: int = 0,
) -> Step:
    """``room`` is the share of the most that decoding can ask for, beside what prefill needs."""
    draws = Draws(seed)
    words = random_words(num_slots, block_length, draws)
    page_size = block_length * int(draws.integers(1, 4, 1))
    num_pages = -(-4 * block_length // page_size)
    most_rows = 2 * num_slots
    return Step(
        words=words,
        page_table_MP=draws.integers(0, 1000, num_slots, num_pages).int(),
        page_size=page_size,
        rule=rule,
        first_slot=first_slot,
        num_rows=max(1, int(room * most_rows)) + num_prefill,
        num_tokens=max(1, int(room * most_rows * block_length)) + num_prefill * block_length,
        prefill=[
            (
                int(draws.integers(0, num_slots, 1)),
                block_length * int(draws.integers(0, 3, 1)),
                draws.integers(0, NUM_IDS, block_length).tolist(),
            )
            for _ in range(num_prefill)
        ],
    )


def planned(step: Step, device: torch.device) -> Rows:
    """The rows, brought back; what is not written keeps what stood in the buffers before."""
    num_slots, block_length = step.words.num_slots, step.words.layout.block_length
    out = Rows.allocate(num_slots, block_length, step.num_rows, step.num_tokens, device)
    for buffer in vars(out).values():
        buffer.view(torch.uint8).fill_(1 if buffer.dtype == torch.bool else 0x55)
    num_buffers = len(step.prefill) + 2  # more than are used
    slots_F = torch.zeros(num_buffers, dtype=torch.int32)
    starts_F = torch.full((num_buffers,), 10**6, dtype=torch.int32)
    ids_FB = torch.full((num_buffers, block_length), 10**6, dtype=torch.int32)
    for i, (slot, start, ids) in enumerate(step.prefill):
        slots_F[i], starts_F[i], ids_FB[i] = slot, start, torch.tensor(ids)
    plan_rows(
        copy_of(step.words, device),
        step.page_table_MP.to(device),
        slots_F.to(device),
        starts_F.to(device),
        ids_FB.to(device),
        torch.tensor([len(step.prefill)], dtype=torch.int32, device=device),
        step.rule,
        page_size=step.page_size,
        trash_slot=TRASH_SLOT,
        first_slot=step.first_slot,
        out=out,
    )
    return Rows(**{name: buffer.cpu() for name, buffer in vars(out).items()})


@dataclass
class Row:
    """One row of the slow plan."""

    slot: int
    start: int
    processed: list[int]
    ids: list[int]
    masked: list[int]
    editable: list[int]
    seen: int
    target: int = 0
    progress: int = -1


def slow_rows_of(words: SlotWords, slot: int, rule: RowRule) -> list[Row]:
    """The rows of one slot, the current one last."""
    block_length = words.layout.block_length
    positions = range(block_length)

    def flags(name: str) -> list[bool]:
        return [bool(flag) for flag in words.array(name)[slot]]

    def scalar(name: str) -> int:
        return int(words.scalar(name)[slot])

    decoded, uncached, leftover = flags("decoded"), flags("uncached"), flags("leftover")
    start = scalar("block_start")
    rows = []
    if any(leftover):
        processed = [b for b in positions if leftover[b]]
        seen = block_length if rule.attend_cached else processed[-1] + 1
        ids = words.array("closed_ids")[slot].tolist()
        rows.append(Row(slot, start - block_length, processed, ids, [], [], seen))

    masked = [b for b in positions if not decoded[b]]
    target = len(masked)
    resumed = scalar("warm_up") and any(decoded[b] and b > masked[0] for b in positions if masked)
    if rule.alpha is not None and not resumed:
        mean = np.float32(scalar("decoded_sum")) / np.float32(max(scalar("productive_steps"), 1))
        wanted = math.ceil(max(mean, np.float32(1)) * np.float32(rule.alpha))
        target = min(len(masked), wanted)
    if rule.whole_blocks or scalar("warm_up") or not any(uncached):
        processed = list(positions)
    else:
        processed = [b for b in positions if uncached[b]]
    if rule.leftmost:
        processed = [b for b in processed if b not in masked[target:]]
    seen = processed[-1] + 1
    if rule.attend_cached:
        seen = max([seen, *(b + 1 for b in positions if decoded[b])])
    masked = [b for b in masked if b in processed]
    ids = words.array("token_ids")[slot].tolist()
    is_joint = rule.whole_blocks and STRATEGIES[scalar("strategy")] == "joint_threshold"
    answer = scalar("prompt_len") - start
    editable = [b for b in positions if is_joint and decoded[b] and b >= answer]
    current = Row(slot, start, processed, ids, masked, editable, seen, target, scalar("progress"))
    return [*rows, current]


def slow_plan(step: Step) -> Rows:
    """Slot by slot and token by token."""
    words, block_length = step.words, step.words.layout.block_length
    num_slots = words.num_slots
    room_tokens = step.num_tokens - len(step.prefill) * block_length
    room_rows = step.num_rows - len(step.prefill)
    taking_part: dict[int, list[Row]] = {}
    for slot in [(step.first_slot + i) % num_slots for i in range(num_slots)]:
        if not words.scalar("active")[slot]:
            continue
        rows = slow_rows_of(words, slot, step.rule)
        room_tokens -= sum(len(row.processed) for row in rows)
        room_rows -= len(rows)
        if room_tokens < 0 or room_rows < 0:
            break
        taking_part[slot] = rows

    table = [row for slot in sorted(taking_part) for row in taking_part[slot]]
    rows_before = [table.index(taking_part[slot][-1]) for slot in sorted(taking_part)]
    for slot, start, ids in step.prefill:
        table.append(Row(slot, start, list(range(block_length)), ids, [], [], block_length))
    out = Rows.allocate(num_slots, block_length, step.num_rows, step.num_tokens, "cpu")
    out.progress_S.fill_(-1)
    out.slot_C.fill_(TRASH_SLOT)
    out.kv_limit_C.fill_(1)
    out.open_place_C.fill_(num_slots * block_length)
    out.row_of_slot_M.fill_(-1)
    for slot, row_index in zip(sorted(taking_part), rows_before, strict=True):
        out.row_of_slot_M[slot] = row_index
    t = q = 0
    for s, row in enumerate(table):
        out.row_slot_S[s], out.row_start_S[s] = row.slot, row.start
        out.target_S[s], out.progress_S[s] = row.target, row.progress
        for b in row.processed:
            out.processed_SB[s, b] = True
            position = row.start + b
            page = int(step.page_table_MP[row.slot, position // step.page_size])
            out.token_ids_C[t], out.positions_C[t] = row.ids[b], position
            out.slot_C[t] = page * step.page_size + position % step.page_size
            out.kv_limit_C[t] = row.start + row.seen
            out.masked_SB[s, b] = b in row.masked
            if b in row.masked or b in row.editable:
                out.open_token_C[q], out.open_place_C[q] = t, row.slot * block_length + b
                q += 1
            t += 1
        out.row_offsets_S1[s + 1], out.open_offsets_S1[s + 1] = t, q
    out.row_offsets_S1[len(table) + 1 :], out.open_offsets_S1[len(table) + 1 :] = t, q
    out.counts_4.copy_(torch.tensor([t, q, len(table), len(taking_part)]))
    return out


def assert_same(found: Rows, expected: Rows) -> None:
    for name, tensor in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(BLOCKS, id="whole blocks"),
        pytest.param(DELAYED, id="delayed cache"),
        pytest.param(replace(DELAYED, attend_cached=False), id="delayed cache, published limits"),
        pytest.param(FOCUS, id="targets for eviction"),
        pytest.param(LEFTMOST, id="leftmost"),
        pytest.param(replace(LEFTMOST, attend_cached=False), id="leftmost, published limits"),
        pytest.param(replace(LEFTMOST, alpha=None), id="leftmost without a target: all"),
    ],
)
@pytest.mark.parametrize(
    ("num_slots", "block_length", "num_prefill"),
    [
        pytest.param(7, 8, 2, id="a few"),
        pytest.param(1, 4, 0, id="one slot, smallest block"),
        pytest.param(3, 64, 1, id="largest block"),
        pytest.param(40, 5, 3, id="many slots, odd block"),
    ],
)
def test_equals_slot_by_slot(
    num_slots: int, block_length: int, num_prefill: int, rule: RowRule, device: torch.device
) -> None:
    for seed in range(1 if INTERPRETED else 3):
        step = random_step(num_slots, block_length, rule, seed, num_prefill=num_prefill)
        assert_same(planned(step, device), slow_plan(step))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    num_slots = draw(st.integers(1, 40))
    return random_step(
        num_slots,
        draw(st.integers(4, 64)),
        draw(st.sampled_from([BLOCKS, DELAYED, FOCUS, LEFTMOST])),
        draw(st.integers(0, 2**32 - 1)),
        num_prefill=draw(st.integers(0, 5)),
        room=draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])),
        first_slot=draw(st.integers(0, num_slots - 1)),
    )


# nothing that the fixture gives changes between examples
@settings(
    max_examples=8 if INTERPRETED else 50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(step=steps())
def test_any_step_equals_slot_by_slot(device: torch.device, step: Step) -> None:
    assert_same(planned(step, device), slow_plan(step))


def fresh_words(num_slots: int, block_length: int) -> SlotWords:
    """Every slot at the start of a block at position ``2 * block_length``, nothing left over."""
    words = SlotWords.allocate(SlotLayout(block_length, 1), num_slots, "cpu")
    words.array("token_ids").fill_(MASK_ID)
    words.array("uncached").fill_(1)
    for name, value in (("active", 1), ("block_start", 2 * block_length), ("progress", -1)):
        words.scalar(name).fill_(value)
    words.scalar("warm_up").fill_(1)
    return words


def fresh_step(
    num_slots: int, rule: RowRule, *, num_tokens: int, num_rows: int = 100, block_length: int = 4
) -> Step:
    table_MP = torch.arange(num_slots * 4, dtype=torch.int32).view(num_slots, 4)
    words = fresh_words(num_slots, block_length)
    return Step(words, table_MP, block_length, rule, num_rows=num_rows, num_tokens=num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "first_slot", "taking_part"),
    [
        pytest.param(20, 5, 3, [0, 1, 2, 3, 4], id="all fit exactly"),
        pytest.param(19, 5, 0, [0, 1, 2, 3], id="one token short"),
        pytest.param(20, 4, 0, [0, 1, 2, 3], id="one row short"),
        pytest.param(19, 5, 3, [0, 1, 3, 4], id="cyclic: the last before the first sits out"),
        pytest.param(11, 5, 4, [0, 4], id="around the end"),
        pytest.param(3, 5, 2, [], id="none fits"),
    ],
)
def test_who_takes_part_when_not_all_fit(
    num_tokens: int, num_rows: int, first_slot: int, taking_part: list[int], device: torch.device
) -> None:
    step = fresh_step(5, DELAYED, num_tokens=num_tokens, num_rows=num_rows)
    rows = planned(replace(step, first_slot=first_slot), device)
    expected = [taking_part.index(slot) if slot in taking_part else -1 for slot in range(5)]
    assert rows.row_of_slot_M.tolist() == expected
    count = len(taking_part)
    assert rows.counts_4.tolist() == [4 * count, 4 * count, count, count]


def test_a_slot_that_does_not_fit_ends_the_choice(device: torch.device) -> None:
    # slot 1 has leftover tokens and does not fit; slot 2 would, but its turn does not come
    step = fresh_step(3, DELAYED, num_tokens=8)
    step.words.array("leftover")[1, 0] = 1
    assert planned(step, device).row_of_slot_M.tolist() == [0, -1, -1]
    assert planned(replace(step, num_tokens=9), device).row_of_slot_M.tolist() == [0, 2, -1]


def test_leftover_tokens_come_before_their_slots_current_row(device: torch.device) -> None:
    step = fresh_step(2, DELAYED, num_tokens=20)
    step.words.array("closed_ids").copy_(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
    step.words.array("leftover").copy_(torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]]))
    rows = planned(step, device)
    assert rows.row_slot_S[:4].tolist() == [0, 1, 1, 0]
    assert rows.row_start_S[:4].tolist() == [8, 4, 8, 0]
    assert rows.token_ids_C[:10].tolist() == [99, 99, 99, 99, 6, 8, 99, 99, 99, 99]
    assert rows.positions_C[:10].tolist() == [8, 9, 10, 11, 5, 7, 8, 9, 10, 11]
    # the leftover tokens see to the end of their block, which is not the end of the text
    assert rows.kv_limit_C[4:7].tolist() == [8, 8, 12]
    assert rows.masked_SB.sum(1)[:4].tolist() == [4, 0, 4, 0]


def test_a_block_taken_up_again_is_computed_whole_once(device: torch.device) -> None:
    step = fresh_step(1, LEFTMOST, num_tokens=8)
    words = step.words
    words.array("decoded").copy_(torch.tensor([[1, 0, 1, 0]]))
    assert planned(step, device).target_S[0] == 2
    assert planned(step, device).processed_SB[0].all()
    words.scalar("warm_up").fill_(0)
    words.scalar("decoded_sum").fill_(1)
    words.scalar("productive_steps").fill_(1)
    again = planned(replace(step, rule=replace(LEFTMOST, alpha=1.0)), device)
    assert again.processed_SB[0].tolist() == [True, True, True, False]


def test_a_prompt_at_the_left_is_no_block_taken_up_again(device: torch.device) -> None:
    step = fresh_step(1, LEFTMOST, num_tokens=8)
    step.words.array("decoded").copy_(torch.tensor([[1, 0, 0, 0]]))
    rows = planned(step, device)
    assert rows.target_S[0] == 2
    assert rows.processed_SB[0].tolist() == [True, True, True, False]


def test_targets_are_rounded_up_from_float32(device: torch.device) -> None:
    rule = replace(FOCUS, alpha=2.1)
    step = fresh_step(4, rule, num_tokens=100, block_length=16)
    step.words.scalar("decoded_sum").copy_(torch.tensor([10, 30, 1, 0]))
    step.words.scalar("productive_steps").copy_(torch.tensor([3, 9, 2, 0]))
    # 10 / 3 * 2.1 is 7 in float32, and a little more, hence 8, in float64
    assert planned(step, device).target_S[:4].tolist() == [7, 7, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"first_slot": 3}, "first_slot", id="first slot out of range"),
        pytest.param({"page_size": 6}, "page_size", id="a page of parts of blocks"),
        pytest.param(
            {"page_table_MP": torch.zeros(3, 4)}, "page_table_MP", id="pages that are no integers"
        ),
        pytest.param({"words": fresh_words(2, 4)}, "page_table_MP", id="of other slots"),
    ],
)
def test_refuses(change: dict[str, object], message: str, device: torch.device) -> None:
    step = replace(fresh_step(3, DELAYED, num_tokens=12), **change)
    with pytest.raises(ValueError, match=message):
        planned(step, device)


def test_leftmost_of_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one"):
        replace(BLOCKS, leftmost=True)
