from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slot_states import MASK_ID, Draws, copy_of, random_words
from slow_advance import Outcome, random_outcome, slow_advance
from torch import Tensor

from focus_ray.kernels.advance_blocks import advance_blocks
from focus_ray.kernels.launch import INTERPRETED
from focus_ray.kernels.rows import Rows
from focus_ray.kernels.slot_words import ARRAYS, SCALARS, SlotLayout, SlotWords


def advanced(words: SlotWords, outcome: Outcome, device: torch.device) -> tuple[SlotWords, Tensor]:
    """The words after the step and what it decoded, brought back."""
    words = copy_of(words, device)
    chosen_MB = torch.ones_like(outcome.token_MB, dtype=torch.bool, device=device)
    decodable_MB = outcome.decodable_MB
    advance_blocks(
        words,
        Rows(**{name: buffer.to(device) for name, buffer in vars(outcome.rows).items()}),
        outcome.kept_SB.to(device),
        outcome.token_MB.to(device),
        outcome.confidence_MB.to(device),
        outcome.logprob_MB.to(device),
        mask_token_id=MASK_ID,
        whole_blocks=outcome.whole_blocks,
        chosen_MB=chosen_MB,
        decodable_MB=None if decodable_MB is None else decodable_MB.to(device),
    )
    return copy_of(words, "cpu"), chosen_MB.cpu()


def assert_same(found: tuple[SlotWords, Tensor], expected: tuple[SlotWords, Tensor]) -> None:
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, msg="chosen")
    for name in (*ARRAYS, *SCALARS):
        read = SlotWords.array if name in ARRAYS else SlotWords.scalar
        ours, theirs = (read(words, name) for words in (found[0], expected[0]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    assert found[0].words_MW.equal(expected[0].words_MW), "words outside of any column"


@st.composite
def steps(draw: st.DrawFn) -> tuple[SlotWords, Outcome]:
    draws = Draws(draw(st.integers(0, 2**32 - 1)))
    num_slots = draw(st.integers(1, 40))
    block_length = draw(st.integers(4, 64))
    words = random_words(num_slots, block_length, draws, draw(st.sampled_from([1, 3, 17])))
    counted, whole_blocks = draw(st.booleans()), draw(st.booleans())
    return words, random_outcome(words, draws, counted=counted, whole_blocks=whole_blocks)


# nothing that the fixture gives changes between examples
@settings(
    max_examples=8 if INTERPRETED else 50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(step=steps())
def test_any_step_equals_slot_by_slot(
    device: torch.device, step: tuple[SlotWords, Outcome]
) -> None:
    assert_same(advanced(*step, device), slow_advance(*step))


@pytest.mark.parametrize("block_length", [4, 5, 32, 64])
def test_blocks_near_their_end(block_length: int, device: torch.device) -> None:
    """Most of them close or end, which is rare among random ones."""
    draws = Draws(block_length)
    words = random_words(12, block_length, draws)
    words.scalar("active").fill_(1)
    words.array("decoded").copy_(draws.flags(0.95, 12, block_length))
    outcome = random_outcome(words, draws, counted=True, whole_blocks=False)
    outcome.kept_SB.copy_(outcome.rows.processed_SB.fill_(True))
    words.scalar("num_steps").fill_(1)
    words.stop_ids_MK[:8] = MASK_ID
    after, _ = found = advanced(words, outcome, device)
    assert_same(found, slow_advance(words, outcome))
    closed_M = after.scalar("block_start") > words.scalar("block_start")
    ended_M = after.scalar("active") == 0
    assert closed_M.sum() >= 3 and ended_M.sum() >= 1, "the cases have become too few"


@dataclass
class Block:
    """One slot whose block of 4 is described by a string: digits are decoded ids, dots masks.

    A step decodes position ``b`` as id ``b`` wherever it stands in ``unmasks``, or as what
    ``forced`` says.
    """

    ids: str
    unmasks: str = "...."
    forced: str = "...."
    start: int = 8
    prompt_len: int = 0
    limit: int = 100
    stop_ids: tuple[int, ...] = ()
    whole_blocks: bool = False


def step_of(block: Block) -> tuple[SlotWords, Outcome]:
    words = SlotWords.allocate(SlotLayout(4, 2), 1, "cpu")
    decoded_B = torch.tensor([c != "." for c in block.ids])
    for name, text in (("token_ids", block.ids), ("forced_ids", block.forced)):
        ids = [MASK_ID if c == "." else int(c) for c in text]
        words.array(name).copy_(torch.tensor([ids]))
    words.array("decoded").copy_(decoded_B)
    words.array("uncached").fill_(1)
    words.array("leftover").fill_(1)
    words.stop_ids_MK.fill_(MASK_ID)
    for k, stop_id in enumerate(block.stop_ids):
        words.stop_ids_MK[0, k] = stop_id
    for name, value in (
        ("active", 1),
        ("block_start", block.start),
        ("num_steps", 4),
        ("threshold", 0.5),
        ("prompt_len", block.prompt_len),
        ("limit", block.limit),
        ("progress", 1),
        ("warm_up", 1),
    ):
        words.scalar(name).fill_(value)
    unmasks_B = torch.tensor([c == "x" for c in block.unmasks])
    rows = Rows.allocate(1, 4, 1, 4, "cpu")
    rows.processed_SB.fill_(True)
    outcome = Outcome(
        rows=rows,
        kept_SB=(decoded_B | unmasks_B)[None],
        token_MB=torch.arange(4)[None],
        confidence_MB=torch.full((1, 4), 0.9),
        logprob_MB=torch.full((1, 4), -0.5),
        whole_blocks=block.whole_blocks,
    )
    return words, outcome


@pytest.mark.parametrize(
    ("block", "is_active", "start"),
    [
        pytest.param(Block("12..", "..x."), True, 8, id="goes on"),
        pytest.param(Block("12.4", "..x."), True, 12, id="closes"),
        pytest.param(Block("12..", "..x.", stop_ids=(2,)), False, 8, id="stop id in the prefix"),
        pytest.param(Block("1.4.", "...x", stop_ids=(3,)), True, 8, id="stop id behind a mask"),
        pytest.param(Block("1.3.", ".x..", stop_ids=(3,)), False, 8, id="mask before it decoded"),
        pytest.param(Block("6...", ".x..", stop_ids=(6,), prompt_len=9), True, 8, id="of prompt"),
        pytest.param(Block("66..", "..x.", stop_ids=(6,), prompt_len=9), False, 8, id="behind it"),
        pytest.param(Block("6124", "....", stop_ids=(7, 6)), False, 8, id="stops, does not close"),
        pytest.param(Block("12..", "..x.", limit=11), False, 8, id="limit inside the block"),
        pytest.param(Block("12..", "...x", limit=11), True, 8, id="limit is behind a mask"),
        pytest.param(Block("12.4", "..x.", limit=12), False, 8, id="limit at the block's end"),
        pytest.param(Block("12.4", "..x.", limit=13), True, 12, id="limit in the next block"),
    ],
)
def test_when_a_text_is_final_and_when_a_block_is_closed(
    block: Block, is_active: bool, start: int, device: torch.device
) -> None:
    after, _ = found = advanced(*step_of(block), device)
    assert (bool(after.scalar("active")), int(after.scalar("block_start"))) == (is_active, start)
    assert_same(found, slow_advance(*step_of(block)))


@pytest.mark.parametrize(
    ("block", "column", "ids"),
    [
        pytest.param(Block("1...", ".xx.", ".7.."), "token_ids", "172.", id="beside a free one"),
        pytest.param(Block("1...", "..x.", ".7.."), "token_ids", "1.2.", id="not its turn yet"),
        pytest.param(Block("172.", "...x", ".7.8"), "closed_ids", "1728", id="closes the block"),
        pytest.param(Block("172.", "...x", ".7.8"), "forced_ids", "....", id="next one is free"),
    ],
)
def test_what_a_token_must_become_it_becomes(
    block: Block, column: str, ids: str, device: torch.device
) -> None:
    after, _ = found = advanced(*step_of(block), device)
    wanted = [MASK_ID if c == "." else int(c) for c in ids]
    assert after.array(column).tolist() == [wanted]
    assert_same(found, slow_advance(*step_of(block)))


def test_a_decoded_mask_id_is_no_stop_id(device: torch.device) -> None:
    words, outcome = step_of(Block("12..", "..x."))
    outcome.token_MB.fill_(MASK_ID)
    after, chosen_MB = advanced(words, outcome, device)
    assert chosen_MB.tolist() == [[False, False, True, False]]
    assert after.scalar("active").tolist() == [1]


@pytest.mark.parametrize(
    ("whole_blocks", "leftover"),
    [
        # the third was a mask before the step, so it is not final, nor is its left neighbour
        pytest.param(False, [0, 1, 1, 0], id="what is not final"),
        pytest.param(True, [1, 1, 1, 1], id="the whole block"),
    ],
)
def test_a_closed_block_leaves_tokens_over(
    whole_blocks: bool, leftover: list[int], device: torch.device
) -> None:
    block = Block("12.4", "..x.", whole_blocks=whole_blocks)
    after, _ = advanced(*step_of(block), device)
    assert after.array("leftover").tolist() == [leftover]
    assert after.array("closed_ids").tolist() == [[1, 2, 2, 4]]
    assert after.array("token_ids").tolist() == [[MASK_ID] * 4]
    assert after.array("decoded").sum() == 0
    assert after.array("uncached").sum() == 4
    assert after.scalar("warm_up").tolist() == [1]
    assert after.scalar("progress").tolist() == [-1]


def test_slots_that_took_no_part_stay_as_they_are(device: torch.device) -> None:
    draws = Draws(0)
    words = random_words(6, 8, draws)
    words.words_MW.copy_(draws.integers(-(2**31), 2**31, *words.words_MW.shape))
    outcome = random_outcome(words, draws, counted=True, whole_blocks=False)
    outcome.rows.row_of_slot_M.fill_(-1)
    after, chosen_MB = advanced(words, outcome, device)
    assert after.words_MW.equal(words.words_MW)
    assert not chosen_MB.any()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("kept_SB", torch.ones(2, 4, dtype=torch.bool), id="rows of another step"),
        pytest.param("token_MB", torch.zeros(1, 4, dtype=torch.int32), id="ids of 32 bits"),
        pytest.param("logprob_MB", torch.zeros(1, 8)[:, ::2], id="gaps"),
    ],
)
def test_refuses(name: str, wrong: Tensor) -> None:
    words, outcome = step_of(Block("1234"))
    with pytest.raises(ValueError, match=name):  # a copy to another device would close gaps
        advanced(words, replace(outcome, **{name: wrong}), torch.device("cpu"))
