"""Which tokens go to each expert, and how they are cut into tiles.

Each expert has a list as long as there are tokens, so that a pair's place is known as soon as its
expert has counted it: one launch counts, lists and cuts, where sorting into one list would take
another to learn where an expert's share of it begins. The lists are written and read as far as
they are filled. In which order pairs stand in a list is left to chance: a row of a product does not
depend on which row of a tile it is.

T tokens, E experts, k experts per token, T k pairs, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous
from focus_ray.kernels.split_counters import MAX_COUNTED_TILES, finished_counters

MOST_EXPERTS = MAX_COUNTED_TILES - 1
BLOCK_P = 512
NUM_WARPS = 4


@dataclass(frozen=True)
class Placement:
    """The pairs of each expert, in tiles of at most ``block_t``.

    Args:
        pair_ET: ``[E, T]`` int32; of each expert its pairs, then anything.
        tile_3M: ``[3, M]`` int32: expert of a tile, where its pairs begin in the flat ``pair_ET``,
            and how many they are: 0 from the last tile on, whose other two may be anything.
        block_t: most pairs of a tile.
    """

    pair_ET: Tensor
    tile_3M: Tensor
    block_t: int


def place(expert_Tk: Tensor, num_experts: int, block_t: int) -> Placement:
    """List the pairs of each expert and cut the lists into tiles.

    Args:
        expert_Tk: ``[T, k]`` int32, T at least 1, contiguous; an expert at most once in a row, E in
            the rows of tokens that belong to nobody.
        num_experts: E, at most ``MOST_EXPERTS``.
        block_t: most pairs of a tile.

    Raises:
        ValueError: there are more experts.
    """
    if num_experts > MOST_EXPERTS:
        raise ValueError(f"{num_experts} experts are more than the {MOST_EXPERTS} that are counted")
    if not can_launch(expert_Tk):
        return place_reference(expert_Tk, num_experts, block_t)
    num_tokens, num_pairs = len(expert_Tk), expert_Tk.numel()
    pair_ET = expert_Tk.new_empty(num_experts, num_tokens)
    tile_3M = expert_Tk.new_empty(3, most_tiles(num_pairs, num_experts, block_t))
    _place_pairs_kernel[(triton.cdiv(num_pairs, BLOCK_P),)](
        expert_Tk,
        pair_ET,
        tile_3M,
        finished_counters(expert_Tk.device),
        num_pairs,
        num_tokens,
        num_experts,
        tile_3M.shape[1],
        BLOCK_T=block_t,
        BLOCK_P=BLOCK_P,
        BLOCK_E=triton.next_power_of_2(num_experts),
        num_warps=NUM_WARPS,
        **overlap_options(expert_Tk.device),
    )
    return Placement(pair_ET, tile_3M, block_t)


def most_tiles(num_pairs: int, num_experts: int, block_t: int) -> int:
    """Tiles that there may be whatever the routing: all full, and one more of each expert."""
    return min(num_pairs, -(-num_pairs // block_t) + num_experts)


def place_reference(expert_Tk: Tensor, num_experts: int, block_t: int) -> Placement:
    """The definition, with the pairs of an expert in ascending order."""
    expert_P = expert_Tk.flatten()
    pair_ET = expert_Tk.new_zeros(num_experts, len(expert_Tk))
    tiles = []
    for expert, pair_T in enumerate(pair_ET):
        pair_N = (expert_P == expert).nonzero()[:, 0]
        pair_T[: len(pair_N)] = pair_N
        for start in range(0, len(pair_N), block_t):
            first = expert * len(expert_Tk) + start
            tiles.append((expert, first, min(block_t, len(pair_N) - start)))
    tile_3M = expert_Tk.new_zeros(3, most_tiles(len(expert_P), num_experts, block_t))
    for tile_3, facts in zip(tile_3M.T, tiles, strict=False):
        tile_3.copy_(torch.tensor(facts))
    return Placement(pair_ET, tile_3M, block_t)


@triton.jit(do_not_specialize=["num_pairs", "num_tokens", "num_tiles"])
def _place_pairs_kernel(
    expert_ptr,
    pair_ptr,
    tile_ptr,
    counter_ptr,
    num_pairs,
    num_tokens,
    num_experts,
    num_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # A program owns BLOCK_P pairs; the last one to finish cuts the lists of all into tiles. There
    # is a counter for each expert, and one of programs behind them.
    let_next_begin(OVERLAP)
    pair_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    wait_for_previous(OVERLAP)
    expert_P = tl.load(expert_ptr + pair_P, mask=pair_P < num_pairs, other=num_experts)
    is_real_P = expert_P < num_experts
    place_P = tl.atomic_add(counter_ptr + expert_P, 1, mask=is_real_P, sem="relaxed")
    tl.store(pair_ptr + expert_P.to(tl.int64) * num_tokens + place_P, pair_P, mask=is_real_P)

    tl.debug_barrier()  # all threads have counted before one of them counts the program
    finished = tl.atomic_add(counter_ptr + num_experts, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        e_E = tl.arange(0, BLOCK_E)
        is_expert_E = e_E < num_experts
        count_E = tl.load(counter_ptr + e_E, mask=is_expert_E, other=0, cache_modifier=".cg")
        tiles_E = (count_E + BLOCK_T - 1) // BLOCK_T
        end_E = tl.cumsum(tiles_E, axis=0)
        for i in range(0, tl.max(tiles_E, axis=0)):
            has_E = i < tiles_E
            tile_ptrs = tile_ptr + end_E - tiles_E + i
            tl.store(tile_ptrs, e_E, mask=has_E)
            tl.store(tile_ptrs + num_tiles, e_E * num_tokens + i * BLOCK_T, mask=has_E)
            rows_E = tl.minimum(count_E - i * BLOCK_T, BLOCK_T)
            tl.store(tile_ptrs + 2 * num_tiles, rows_E, mask=has_E)
        for start in range(tl.sum(tiles_E, axis=0), num_tiles, BLOCK_E):
            m_E = start + e_E
            tl.store(tile_ptr + 2 * num_tiles + m_E, 0, mask=m_E < num_tiles)
        tl.debug_barrier()  # with few experts every warp reads all counters
        tl.store(counter_ptr + e_E, 0, mask=is_expert_E)
        tl.store(counter_ptr + num_experts, 0)
