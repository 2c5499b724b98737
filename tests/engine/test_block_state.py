"""What the host tells the device lands in the right words, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from focus_ray.engine.block_state import BlockState, pack_starts
from focus_ray.engine.plan import BlockSnapshot, PageUpdate, PrefillChunk, SlotStart, StepPlan
from focus_ray.kernels.slot_words import SlotLayout, SlotWords
from focus_ray.sampling import SamplingParams

B, MASK, SLOTS = 4, 99, 5


@pytest.fixture
def state(device):
    return BlockState(SlotLayout(B, 3), SLOTS, 6, 4, MASK, torch.device(device))


def start(slot, *, seed=0, stops=(), **params):
    block = BlockSnapshot(
        np.array([7, MASK, 8, MASK], np.int32),
        np.array([True, False, True, False]),
        np.array([-0.5, 0.0, -0.25, 0.0], np.float32),
        2,
        post_steps=1,
    )
    given = {
        "max_tokens": 10,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "min_tokens": 3,
        "unmasking": "sequential",
        "confidence_threshold": 0.75,
        "denoising_steps": 2,
        "editing_threshold": 0.625,
        "max_post_steps": 5,
    }
    return SlotStart(slot, block, 8, 9, SamplingParams(**{**given, **params}), seed, stops)


def test_a_start_fills_every_word_of_its_slot_and_no_other(state):
    state.words.words_MW.fill_(1234)
    state.take(StepPlan(starts=[start(3, seed=-2, stops=(5, 6))]))
    words = SlotWords(state.layout, state.words.words_MW.cpu())
    others = [slot for slot in range(SLOTS) if slot != 3]
    assert bool((words.words_MW[others] == 1234).all())
    assert words.array("token_ids")[3].tolist() == [7, MASK, 8, MASK]
    assert words.array("decoded")[3].tolist() == [1, 0, 1, 0]
    assert words.array("logprobs")[3].tolist() == [-0.5, 0.0, -0.25, 0.0]
    assert words.array("uncached")[3].tolist() == [1] * B, "its KV is not in the pages"
    assert words.array("leftover")[3].tolist() == [0] * B
    assert words.counts_MC[3].tolist() == [0] * 8
    assert words.array("forced_ids")[3].tolist() == [MASK] * B, "any token may come"
    assert words.stop_ids_MK[3].tolist() == [5, 6, MASK]
    found = {name: words.scalar(name)[3].item() for name in ("active", "block_start", "progress")}
    assert found == {"active": 1, "block_start": 8, "progress": -1}
    assert words.seed_M[3].item() == -2
    numbers = {
        "denoising_step": 2,
        "warm_up": 1,
        "decoded_sum": 0,
        "post_steps": 1,
        "prompt_len": 9,
        "limit": 19,
        "strategy": 2,
        "threshold": 0.75,
        "num_steps": 2,
        "editing_threshold": 0.625,
        "max_post_steps": 5,
        "temperature": 0.5,
        "top_k": 20,
        "suppress_before": 12,
    }
    assert {name: words.scalar(name)[3].item() for name in numbers} == numbers
    assert words.scalar("top_p")[3].item() == pytest.approx(0.9)
    assert words.scalar("min_p")[3].item() == pytest.approx(0.1)


def test_what_tokens_must_become_travels_with_the_start_that_says_so():
    forced_B = np.array([MASK, 4, 5, MASK], np.int32)
    starts = [replace(start(0), forced_ids_B=forced_B), start(1)]
    layout = SlotLayout(B, 1)
    words = SlotWords(layout, torch.from_numpy(pack_starts(layout, starts, MASK)))
    assert words.array("forced_ids").tolist() == [[MASK, 4, 5, MASK], [MASK] * B]


def test_a_block_without_a_number_of_steps_may_take_as_many_as_it_has_tokens():
    layout = SlotLayout(B, 1)
    joint = start(0, unmasking="joint_threshold", denoising_steps=None)
    words = SlotWords(layout, torch.from_numpy(pack_starts(layout, [joint], MASK)))
    assert (words.scalar("strategy").item(), words.scalar("num_steps").item()) == (3, B)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63), 2**32 - 1])
def test_seeds_of_64_bits_arrive_whole(seed):
    layout = SlotLayout(B, 1)
    packed = pack_starts(layout, [start(0, seed=seed)], MASK)
    assert SlotWords(layout, torch.from_numpy(packed)).seed_M.item() == seed


def test_who_is_stopped_and_replaced_in_one_step_runs(state):
    state.take(StepPlan(starts=[start(0), start(1)]))
    state.take(StepPlan(stops=[0, 1], starts=[start(1)]))
    assert state.words.scalar("active").tolist() == [0, 1, 0, 0, 0]


def test_pages_are_entered_where_they_belong(state):
    state.take(StepPlan(page_updates=[PageUpdate(1, 2, [30, 31]), PageUpdate(4, 0, [9])]))
    table = state.page_table_MP.cpu()
    assert table[1].tolist() == [0, 0, 30, 31, 0, 0]
    assert table[4].tolist() == [9, 0, 0, 0, 0, 0]
    assert int((table != 0).sum()) == 3


def test_prefill_is_cut_into_blocks_and_gone_in_the_next_step(state):
    chunks = [
        PrefillChunk(2, 8, np.arange(2 * B, dtype=np.int32)),
        PrefillChunk(0, 0, np.arange(50, 50 + B, dtype=np.int32)),
    ]
    state.take(StepPlan(prefill=chunks))
    assert state.num_prefill_1.item() == 3
    assert state.prefill_slot_F[:3].tolist() == [2, 2, 0]
    assert state.prefill_start_F[:3].tolist() == [8, 8 + B, 0]
    assert state.prefill_ids_FB[:3].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [50, 51, 52, 53]]
    state.take(StepPlan())
    assert state.num_prefill_1.item() == 0
