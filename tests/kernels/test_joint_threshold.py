"""Blocks under joint threshold, one step at a time: what is open, what is edited, how they end."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from slot_states import MASK_ID, copy_of
from torch import Tensor

from focus_ray.kernels.advance_blocks import advance_blocks
from focus_ray.kernels.plan_rows import plan_rows
from focus_ray.kernels.rows import RowRule, Rows
from focus_ray.kernels.slot_words import STRATEGIES, SlotLayout, SlotWords

BLOCKS = RowRule(whole_blocks=True, leftmost=False, attend_cached=False, alpha=None)
DELAYED = RowRule(whole_blocks=False, leftmost=False, attend_cached=True, alpha=None)
SURE, LIKELY, UNSURE = 0.95, 0.6, 0.3
CONFIDENCES = {"!": SURE, "?": LIKELY, ".": UNSURE}


@dataclass(frozen=True)
class Block:
    """One slot whose block of 4, from position 8 on, is described by strings.

    Digits of ``ids`` are decoded, dots are masks. The step finds the digits of ``found``, as sure
    as ``sure`` says: of ``!`` above both thresholds, of ``?`` above the one of masks, of a dot
    above none.
    """

    ids: str
    found: str
    sure: str
    post_steps: int = 0
    prompt_len: int = 0
    limit: int = 100
    stop_id: int = MASK_ID
    strategy: str = "joint_threshold"


def words_of(block: Block) -> SlotWords:
    words = SlotWords.allocate(SlotLayout(4, 1), 1, "cpu")
    words.array("token_ids").copy_(
        torch.tensor([[MASK_ID if c == "." else int(c) for c in block.ids]])
    )
    words.array("decoded").copy_(torch.tensor([[c != "." for c in block.ids]]))
    words.array("uncached").fill_(1)
    words.array("forced_ids").fill_(MASK_ID)
    words.array("logprobs").fill_(-2.0)
    words.stop_ids_MK.fill_(block.stop_id)
    for name, value in (
        ("active", 1),
        ("block_start", 8),
        ("prompt_len", block.prompt_len),
        ("limit", block.limit),
        ("strategy", STRATEGIES.index(block.strategy)),
        ("threshold", 0.5),
        ("editing_threshold", 0.9),
        ("max_post_steps", 3),
        ("post_steps", block.post_steps),
        ("num_steps", 4),
        ("denoising_step", 1),
    ):
        words.scalar(name).fill_(value)
    return words


def planned(block: Block, rule: RowRule, device: torch.device) -> Rows:
    words = copy_of(words_of(block), device)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    rows = Rows.allocate(1, 4, 2, 8, device)
    plan_rows(
        words,
        torch.arange(4, dtype=torch.int32, device=device)[None],
        nothing,
        nothing,
        nothing.expand(1, 4).contiguous(),
        nothing,
        rule,
        page_size=4,
        trash_slot=0,
        first_slot=0,
        out=rows,
    )
    return rows


def advanced(block: Block, device: torch.device, whole_blocks: bool = True) -> SlotWords:
    """The words after the step, brought back."""
    words = copy_of(words_of(block), device)
    rows = planned(block, BLOCKS, device)

    def of_slot(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor([values], dtype=dtype, device=device)

    advance_blocks(
        words,
        rows,
        rows.processed_SB,
        of_slot([int(c) for c in block.found], torch.int64),
        of_slot([CONFIDENCES[c] for c in block.sure], torch.float32),
        of_slot([-0.5] * 4, torch.float32),
        mask_token_id=MASK_ID,
        whole_blocks=whole_blocks,
        chosen_MB=torch.zeros(1, 4, dtype=torch.bool, device=device),
        decodable_MB=None,
    )
    return copy_of(words, "cpu")


@pytest.mark.parametrize(
    ("block", "rule", "is_open"),
    [
        pytest.param(Block("1.3.", "", ""), BLOCKS, [0, 1, 2, 3], id="masked and decoded"),
        pytest.param(Block("1.3.", "", "", prompt_len=9), BLOCKS, [1, 2, 3], id="not the prompt"),
        pytest.param(Block("1234", "", ""), BLOCKS, [0, 1, 2, 3], id="nothing masked any more"),
        pytest.param(
            Block("1.3.", "", "", strategy="sequential"), BLOCKS, [1, 3], id="another strategy"
        ),
        pytest.param(Block("1.3.", "", ""), DELAYED, [1, 3], id="not where tokens are left out"),
    ],
)
def test_open_tokens(block: Block, rule: RowRule, is_open: list[int], device: torch.device) -> None:
    rows = planned(block, rule, device)
    assert rows.counts_4.tolist() == [4, len(is_open), 1, 1]
    assert rows.open_token_C[: len(is_open)].tolist() == is_open
    assert rows.open_place_C.tolist() == is_open + [4] * (8 - len(is_open))
    assert rows.open_offsets_S1.tolist() == [0, len(is_open), len(is_open)]
    assert rows.masked_SB[0].tolist() == [c == "." for c in block.ids]


@pytest.mark.parametrize(
    ("block", "ids", "num_edited"),
    [
        pytest.param(Block("12..", "5678", "!!?."), "567.", 2, id="decodes and edits in one step"),
        pytest.param(Block("12..", "5678", "???."), "127.", 0, id="sure enough for masks only"),
        pytest.param(Block("12..", "5678", "!..."), "527.", 1, id="of the masks the best"),
        pytest.param(Block("12..", "1278", "!!??"), "1278", 0, id="the same tokens are no edit"),
        pytest.param(Block("12..", "5678", "!!??", prompt_len=9), "1678", 1, id="the prompt stays"),
        pytest.param(
            Block("12..", "5678", "!!!!", strategy="low_confidence_dynamic"),
            "1278",
            0,
            id="another strategy edits nothing",
        ),
    ],
)
def test_what_a_step_writes(block: Block, ids: str, num_edited: int, device: torch.device) -> None:
    after = advanced(block, device)
    closed = int(after.scalar("block_start")) > 8
    names = ("closed_ids", "closed_logprobs") if closed else ("token_ids", "logprobs")
    found, logprobs = (after.array(name)[0].tolist() for name in names)
    assert found == [MASK_ID if c == "." else int(c) for c in ids]
    assert int(after.scalar("edited_tokens")) == num_edited
    written = [was != now for was, now in zip(block.ids, ids, strict=True)]
    assert logprobs == [-0.5 if is_written else -2.0 for is_written in written]


@pytest.mark.parametrize(
    ("block", "post_steps", "leftover"),
    [
        pytest.param(Block("123.", "1238", "...!"), 0, None, id="the last mask does not end it"),
        pytest.param(Block("1234", "1238", "...!"), 1, None, id="nor does an edit"),
        pytest.param(Block("1234", "1238", "...?"), None, 0, id="nothing changed: all is final"),
        pytest.param(Block("1234", "1238", "...!", 1), 2, None, id="the last step but one"),
        pytest.param(Block("1234", "1238", "...!", 2), None, 1, id="the last step: all left over"),
        pytest.param(Block("1234", "1234", "!!!!", 2), None, 0, id="the last step changed nothing"),
    ],
)
def test_when_a_block_settles(
    block: Block, post_steps: int | None, leftover: int | None, device: torch.device
) -> None:
    """``post_steps`` is None where the block is closed, ``leftover`` where it is not."""
    after = advanced(block, device)
    is_closed = post_steps is None
    assert int(after.scalar("block_start")) == (12 if is_closed else 8)
    assert int(after.scalar("post_steps")) == (post_steps or 0)
    assert after.array("leftover").tolist() == [[leftover or 0] * 4]
    assert after.array("decoded").tolist() == [[int(not is_closed)] * 4]
    assert after.scalar("active").tolist() == [1]


@pytest.mark.parametrize(
    ("block", "is_active"),
    [
        pytest.param(Block("123.", "1234", "...!", stop_id=2), True, id="a stop id may go again"),
        pytest.param(Block("1234", "1634", ".!..", stop_id=2), True, id="and does"),
        pytest.param(Block("1234", "1634", ".?..", stop_id=2), False, id="until the block settles"),
        pytest.param(Block("1234", "1634", ".!..", 2, stop_id=6), False, id="edited to a stop id"),
        pytest.param(Block("1234", "1634", ".!..", limit=10), True, id="limit in a block"),
        pytest.param(Block("1234", "1634", "....", limit=10), False, id="limit in a settled one"),
        pytest.param(
            Block("2234", "2234", "....", stop_id=2, prompt_len=10), True, id="stop ids of prompts"
        ),
    ],
)
def test_a_text_ends_with_a_block(block: Block, is_active: bool, device: torch.device) -> None:
    after = advanced(block, device)
    assert bool(after.scalar("active")) is is_active
    if not is_active:
        assert int(after.scalar("block_start")) == 8, "the last block stays as it is"


def test_where_tokens_are_left_out_nothing_is_edited(device: torch.device) -> None:
    after = advanced(Block("1.34", "5678", "!!!!"), device, whole_blocks=False)
    assert after.array("closed_ids").tolist() == [[1, 6, 3, 4]]
    assert int(after.scalar("edited_tokens")) == 0
