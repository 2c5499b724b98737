from __future__ import annotations

import pytest
import torch
from ranks_in_threads import on_ranks

from focus_ray.engine.rank_check import RankCheck, RanksDisagree

HELD = {
    "processing sets": torch.arange(40).reshape(2, 20),
    "retained tokens": torch.tensor([[True, False, True], [False, False, True]]),
    "blocks": torch.arange(-50, 50, dtype=torch.int32).reshape(10, 10),
}


def compare(change, size=3, step=6, every=3):
    """All ranks compare; ``change`` of a copy is what a rank has otherwise."""

    def rank(shards):
        held = {name: tensor.clone() for name, tensor in HELD.items()}
        change(shards.rank, held)
        RankCheck(shards, every).compare(step, held)

    return on_ranks(size, rank)


def test_equal_ranks_agree():
    assert compare(lambda rank, held: None) == [None, None, None]


def flip_retained(rank, held):
    if rank == 2:
        held["retained tokens"][1, 0] = True


def swap_two(rank, held):
    if rank == 1:  # the same numbers, in other places
        held["processing sets"][0, :2] = held["processing sets"][0, :2].flip(0)


def shift_blocks(rank, held):
    if rank:
        held["blocks"][9, 9] += 1
        held["processing sets"][1, 3] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(flip_retained, r"retained tokens on ranks \[2\]$", id="one bit"),
        pytest.param(swap_two, r"processing sets on ranks \[1\]$", id="two places swapped"),
        pytest.param(
            shift_blocks,
            r"processing sets on ranks \[1, 2\]; blocks on ranks \[1, 2\]$",
            id="two differences on all ranks but the first",
        ),
    ],
)
def test_every_rank_says_what_differs_and_where(change, message):
    for error in compare(change):
        assert isinstance(error, RanksDisagree)
        with pytest.raises(RanksDisagree, match=r"^step 6: .*" + message):
            raise error


def test_other_steps_are_not_compared():
    assert compare(flip_retained, step=7) == [None, None, None]


def test_the_place_of_a_number_counts():
    """Random changes of one number are found, whatever the place."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        place = int(torch.randint(100, (), generator=generator))

        def change(rank, held, place=place):
            if rank == 1:
                held["blocks"].view(-1)[place] ^= 1 << (place % 31)

        assert all(isinstance(error, RanksDisagree) for error in compare(change, size=2))
