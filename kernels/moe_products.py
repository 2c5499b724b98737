"""The products of a mixture: each tile of tokens with the weight of its expert.

T tokens, k experts per token, P = T k pairs, E experts, O output size, D inner size, M tiles; for a
gated product I output size, the weights ``[E, 2 I, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.linear_kernels import store_product
from focus_ray.kernels.moe_placement import Placement
from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous


@dataclass(frozen=True)
class ProductTile:
    """How the product of one tile of tokens is cut.

    Args:
        block_o: weight rows of a program; 64 and more run on Hopper's wgmma.
        block_d: inner elements per pass of the loop.
        num_warps: warps that share the tile.
        num_stages: passes whose loads are in flight, one more than that of the pass that computes.
    """

    block_o: int
    block_d: int
    num_warps: int
    num_stages: int


def expert_product(
    x_RD: Tensor,
    weight_EOD: Tensor,
    placement: Placement,
    tile: ProductTile,
    *,
    pairs_per_row: int,
    gated: bool = False,
) -> Tensor:
    """Of every pair ``x @ weight.T`` of its expert; gated, ``linear_swiglu`` of the two.

    Sums are float32 and rounded once; gated ones as by ``linear_swiglu``. A pair's result does not
    depend on the others.

    Args:
        x_RD: ``[P / pairs_per_row, D]``, unit stride along D: row ``pair // pairs_per_row`` is that
            of a pair.
        weight_EOD: ``[E, O, D]``, contiguous, same dtype; gated, ``[E, 2 I, D]``.
        placement: of the pairs.
        tile: how to cut it.
        pairs_per_row: k for tokens, 1 for what was made of pairs.
        gated: whether the weight holds a gate above an up projection.

    Returns:
        ``[P, O]`` or ``[P, I]``; rows of pairs that are in no tile hold anything.
    """
    _, out_size, inner = weight_EOD.shape
    width = out_size // 2 if gated else out_size
    columns = tile.block_o // 2 if gated else tile.block_o
    num_tiles = placement.tile_3M.shape[1]
    out_PO = x_RD.new_empty(len(x_RD) * pairs_per_row, width)
    _expert_product_kernel[(num_tiles * triton.cdiv(width, columns),)](
        x_RD,
        weight_EOD,
        out_PO,
        placement.pair_ET,
        placement.tile_3M,
        num_tiles,
        x_RD.stride(0),
        PAIRS_PER_ROW=pairs_per_row,
        INNER=inner,
        OUT_SIZE=out_size,
        GATED=gated,
        BLOCK_T=placement.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_D=tile.block_d,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **overlap_options(x_RD.device),
    )
    return out_PO


@triton.jit(do_not_specialize=["num_tiles"])
def _expert_product_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    pair_ptr,
    tile_ptr,
    num_tiles,
    x_stride_r,
    PAIRS_PER_ROW: tl.constexpr,
    INNER: tl.constexpr,
    OUT_SIZE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # A program owns BLOCK_O weight rows of one expert, for one tile of its tokens. Weight rows are
    # the rows of the product, tokens its columns, as in ``linear``. Programs of one tile are
    # neighbours, and so are tiles of one expert: what they share comes from the cache.
    let_next_begin(OVERLAP)
    WIDTH: tl.constexpr = OUT_SIZE // 2 if GATED else OUT_SIZE
    COLUMNS: tl.constexpr = BLOCK_O // 2 if GATED else BLOCK_O
    PROGRAMS_PER_TILE: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    part = tl.program_id(0) % PROGRAMS_PER_TILE
    tile_ptr += tl.program_id(0) // PROGRAMS_PER_TILE
    place_O = tl.arange(0, BLOCK_O)
    row_O = tl.minimum(part * COLUMNS + place_O % COLUMNS, WIDTH - 1)
    if GATED:  # half of the rows from the gate, their partners from the other half of the weight
        row_O += (place_O // COLUMNS) * WIDTH
    wait_for_previous(OVERLAP)
    expert = tl.load(tile_ptr)
    first = tl.load(tile_ptr + num_tiles)
    num_rows = tl.load(tile_ptr + 2 * num_tiles)
    if num_rows == 0:  # the routing made fewer tiles
        return

    place_T = tl.arange(0, BLOCK_T)
    is_row_T = place_T < num_rows
    pair_T = tl.load(pair_ptr + first + place_T, mask=is_row_T, other=0)
    # int64: 256 experts of 2048 x 4096 have 2**31 weights
    weight_row_ptr = weight_ptr + (expert.to(tl.int64) * OUT_SIZE + row_O) * INNER
    x_row_ptr = x_ptr + (pair_T // PAIRS_PER_ROW).to(tl.int64) * x_stride_r
    d_D = tl.arange(0, BLOCK_D)
    weight_ptrs = weight_row_ptr[:, None] + d_D[None, :]
    x_ptrs = x_row_ptr[None, :] + d_D[:, None]
    sum_OT = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for start in tl.range(0, INNER, BLOCK_D, num_stages=STAGES):
        if INNER % BLOCK_D == 0:
            weight_OD = tl.load(weight_ptrs)
            x_DT = tl.load(x_ptrs, mask=is_row_T[None, :], other=0.0)
        else:
            inside_D = start + d_D < INNER
            weight_OD = tl.load(weight_ptrs, mask=inside_D[None, :], other=0.0)
            x_DT = tl.load(x_ptrs, mask=inside_D[:, None] & is_row_T[None, :], other=0.0)
        sum_OT = tl.dot(weight_OD, x_DT, sum_OT, input_precision="ieee")
        weight_ptrs += BLOCK_D
        x_ptrs += BLOCK_D
    store_product(sum_OT, out_ptr, part, pair_T, is_row_T, OUT_SIZE, GATED, BLOCK_O)
