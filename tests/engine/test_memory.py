"""What an engine may take of a GPU on which it need not be alone."""

from __future__ import annotations

import pytest

from focus_ray.engine.memory import GRAPHS_BYTES, OWN_BYTES, GpuMemory

GIB = 1 << 30
TOTAL = 80 * GIB
WEIGHTS, CUDA, STEP = 16 * GIB, GIB * 3 // 4, 5 * GIB


def memory(others: int = 0) -> GpuMemory:
    """An engine has loaded its model; somebody else has so much."""
    return GpuMemory(TOTAL, TOTAL - WEIGHTS - CUDA - others, WEIGHTS)


def room(others: int, share: float, *, has_graphs: bool = True) -> int:
    return memory(others).room_for_kv(share, STEP, has_graphs=has_graphs)


def test_alone_it_is_what_is_left_of_the_share():
    assert room(0, 0.9) == int(TOTAL * 0.9) - WEIGHTS - CUDA - STEP


def test_others_do_not_count_to_the_share():
    """The second one of two, and the first one while the second one starts."""
    for others in (GIB, 18 * GIB, int(TOTAL * 0.45)):
        mine = room(others, 0.45, has_graphs=False)
        assert mine == int(TOTAL * 0.45) - WEIGHTS - OWN_BYTES - STEP


def test_two_halves_fit_beside_each_other():
    mine = room(int(TOTAL * 0.45), 0.45)
    taken = WEIGHTS + CUDA + STEP + mine
    assert taken > TOTAL * 0.44
    assert 2 * taken + STEP + GRAPHS_BYTES <= TOTAL


def test_a_rank_of_several_counts_all_that_is_taken():
    """NCCL has buffers that torch does not know of."""
    nccl = 2 * GIB
    rank = GpuMemory(TOTAL, TOTAL - WEIGHTS - CUDA - nccl, WEIGHTS, may_share=False)
    mine = rank.room_for_kv(0.9, STEP, has_graphs=True)
    assert mine == int(TOTAL * 0.9) - WEIGHTS - CUDA - nccl - STEP


@pytest.mark.parametrize("has_graphs", [True, False])
def test_what_others_have_is_never_counted_on(has_graphs):
    """Nor the room in which steps are recorded."""
    others = 30 * GIB
    needed = (STEP + GRAPHS_BYTES) * has_graphs + STEP
    assert room(others, 0.9, has_graphs=has_graphs) == memory(others).free - needed


def test_there_may_be_no_room():
    assert room(TOTAL - WEIGHTS - CUDA, 0.9) == 0
    assert room(0, 0.2) == 0
