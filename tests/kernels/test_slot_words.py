from __future__ import annotations

import pytest
import torch

from focus_ray.kernels import slot_columns
from focus_ray.kernels.slot_words import ARRAYS, COUNTS, FLOATS, SCALARS, SlotLayout, SlotWords

LAYOUTS = [
    pytest.param(SlotLayout(4, 3), id="smallest block"),
    pytest.param(SlotLayout(64, 1), id="largest block, one stop id"),
    pytest.param(SlotLayout(5, 0), id="odd block, no stop ids"),
]


def columns(layout: SlotLayout) -> list[int]:
    """Every column's words, in the order of the lists that name them."""
    words: list[int] = []
    for name in ARRAYS:
        words += range(*layout.array(name).indices(layout.num_words))
    words += [layout.word(name) for name in SCALARS]
    return [*words, *range(*layout.stop_ids.indices(layout.num_words))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_word_belongs_to_one_column(layout: SlotLayout) -> None:
    assert columns(layout) == list(range(layout.num_words))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_are_views_that_keep_apart(layout: SlotLayout) -> None:
    words = SlotWords.allocate(layout, 3, "cpu")
    for value, name in enumerate((*ARRAYS, *SCALARS), start=1):
        view = words.array(name) if name in ARRAYS else words.scalar(name)
        assert view.dtype == (torch.float32 if name in FLOATS else torch.int32)
        assert view.shape == ((3, layout.block_length) if name in ARRAYS else (3,))
        view.fill_(value)
    words.stop_ids_MK.fill_(-1)
    for value, name in enumerate((*ARRAYS, *SCALARS), start=1):
        view = words.array(name) if name in ARRAYS else words.scalar(name)
        assert (view == value).all(), name
    assert (words.words_MW != 0).all()


def test_counts_are_those_of_their_names() -> None:
    words = SlotWords.allocate(SlotLayout(4, 2), 2, "cpu")
    for value, name in enumerate(COUNTS):
        words.scalar(name).fill_(value)
    assert words.counts_MC.tolist() == [list(range(len(COUNTS)))] * 2


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, -(2**63), 2**63 - 1, 0x1234_5678_9ABC_DEF0])
def test_a_seed_comes_back_from_its_two_words(seed: int) -> None:
    words = SlotWords.allocate(SlotLayout(4, 2), 1, "cpu")
    halves = torch.tensor([seed]).view(torch.int32)
    words.scalar("seed_low").copy_(halves[:1])
    words.scalar("seed_high").copy_(halves[1:])
    assert words.seed_M.tolist() == [seed]


def test_kernels_know_the_columns_by_the_same_numbers() -> None:
    numbers = {name: i for names in (ARRAYS, SCALARS) for i, name in enumerate(names)}
    known = {
        name: getattr(slot_columns, name.upper()).value
        for name in numbers
        if hasattr(slot_columns, name.upper())
    }
    assert set(ARRAYS) | set(COUNTS) < set(known)
    assert known == {name: numbers[name] for name in known}
