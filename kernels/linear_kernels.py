"""The kernel behind ``linear`` at few tokens: it streams the weight once and little else.

T tokens, O output size, D inner size; for a gated product I output size, the weight ``[2 I, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous
from focus_ray.kernels.partial_sums import PartialSums
from focus_ray.kernels.split_counters import finished_counters

LEAST_BLOCK_T = 16


@dataclass(frozen=True)
class LinearTile:
    """How the product is cut.

    Args:
        block_o: weight rows of a program; 64 and more run on Hopper's wgmma.
        block_d: inner elements per pass of the loop.
        num_splits: programs that share the inner dimension of a tile.
        num_warps: warps that share the tile.
        num_stages: passes whose loads are in flight, one more than that of the pass that computes.
        num_held: passes whose weights are loaded into registers before the kernel waits for its
            predecessor, and multiplied at the end; 0 or a power of two, less than a share has.
    """

    block_o: int
    block_d: int
    num_splits: int
    num_warps: int
    num_stages: int
    num_held: int = 0


def launch_linear(
    x_TD: Tensor, weight_OD: Tensor, tile: LinearTile, *, gated: bool = False
) -> Tensor:
    """``x @ weight.T``, or, gated, ``silu(x @ gate.T) * (x @ up.T)`` of the weight's two halves.

    Args:
        x_TD: ``[T, D]``, T at least 1, unit stride along D.
        weight_OD: ``[O, D]``, contiguous, same dtype; D a multiple of ``block_d * num_splits``.
        tile: how to cut it.
        gated: the weight is ``[2 I, D]``, I a multiple of half of ``block_o``.

    Returns:
        ``[T, O]`` or ``[T, I]``, dtype and device of ``x_TD``; contiguous.
    """
    out_size = weight_OD.shape[0]
    out = x_TD.new_empty(len(x_TD), out_size // 2 if gated else out_size)
    sums_STO = _empty_sums(x_TD, weight_OD, tile) if tile.num_splits > 1 else None
    _launch(x_TD, weight_OD, tile, out, sums_STO, gated=gated)
    return out


def launch_partial_linear(x_TD: Tensor, weight_OD: Tensor, tile: LinearTile) -> PartialSums:
    """``launch_linear`` of at least two splits, each of which is left as a share of the sum."""
    sums_STO = _empty_sums(x_TD, weight_OD, tile)
    _launch(x_TD, weight_OD, tile, None, sums_STO, gated=False)
    return PartialSums(sums_STO, x_TD.dtype)


def _empty_sums(x_TD: Tensor, weight_OD: Tensor, tile: LinearTile) -> Tensor:
    shape = (tile.num_splits, len(x_TD), len(weight_OD))
    return x_TD.new_empty(shape, dtype=torch.float32)


def _launch(
    x_TD: Tensor,
    weight_OD: Tensor,
    tile: LinearTile,
    out: Tensor | None,
    sums_STO: Tensor | None,
    *,
    gated: bool,
) -> None:
    """Shares of the sum go to ``sums_STO``, if there are several, and their sum to ``out``."""
    num_tokens, inner = x_TD.shape
    out_size = weight_OD.shape[0]
    added_up = out is not None and sums_STO is not None
    _linear_kernel[(triton.cdiv(out_size, tile.block_o), tile.num_splits)](
        x_TD,
        weight_OD,
        out,
        sums_STO,
        finished_counters(x_TD.device) if added_up else None,
        num_tokens,
        out_size,
        x_TD.stride(0),
        INNER=inner,
        GATED=gated,
        BLOCK_T=max(LEAST_BLOCK_T, triton.next_power_of_2(num_tokens)),
        BLOCK_O=tile.block_o,
        BLOCK_D=tile.block_d,
        SPLITS=tile.num_splits,
        STAGES=tile.num_stages,
        HELD=tile.num_held,
        num_warps=tile.num_warps,
        **overlap_options(x_TD.device),
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    sums_ptr,
    finished_ptr,
    num_tokens,
    out_size,
    x_stride_t,
    INNER: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # A program owns BLOCK_O weight rows, for all tokens, over one of SPLITS shares of the inner
    # dimension. Weight rows are the rows of the product, tokens its columns: tensor cores want 64
    # rows but only 8 columns.
    let_next_begin(OVERLAP)
    tile = tl.program_id(0)
    SHARE: tl.constexpr = INNER // SPLITS
    first_d = tl.program_id(1) * SHARE
    place_O = tl.arange(0, BLOCK_O)
    if GATED:  # half of the rows from the gate, their partners from the other half of the weight
        half: tl.constexpr = BLOCK_O // 2
        row_O = tile * half + place_O % half + (place_O // half) * (out_size // 2)
    else:
        row_O = tl.minimum(tile * BLOCK_O + place_O, out_size - 1)
    weight_row_ptr = weight_ptr + row_O.to(tl.int64) * INNER + first_d
    HELD_D: tl.constexpr = HELD * BLOCK_D
    if HELD > 0:
        d_H = tl.arange(0, HELD_D)
        weight_OH = tl.load(weight_row_ptr[:, None] + d_H[None, :])
    wait_for_previous(OVERLAP)

    token_T = tl.arange(0, BLOCK_T)
    is_token_T = token_T < num_tokens
    x_row_ptr = x_ptr + first_d + token_T.to(tl.int64) * x_stride_t
    if HELD > 0:
        x_HT = tl.load(x_row_ptr[None, :] + d_H[:, None], mask=is_token_T[None, :], other=0.0)
    d_D = HELD_D + tl.arange(0, BLOCK_D)
    weight_ptrs = weight_row_ptr[:, None] + d_D[None, :]
    x_ptrs = x_row_ptr[None, :] + d_D[:, None]
    sum_OT = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for _ in tl.range(SHARE // BLOCK_D - HELD, num_stages=STAGES):
        weight_OD = tl.load(weight_ptrs)
        x_DT = tl.load(x_ptrs, mask=is_token_T[None, :], other=0.0)
        sum_OT = tl.dot(weight_OD, x_DT, sum_OT, input_precision="ieee")
        weight_ptrs += BLOCK_D
        x_ptrs += BLOCK_D
    if HELD > 0:
        if OVERLAP:
            weight_OH, x_HT = _held_until_here(weight_OH), _held_until_here(x_HT)
        sum_OT = tl.dot(weight_OH, x_HT, sum_OT, input_precision="ieee")

    if SPLITS == 1:
        store_product(sum_OT, out_ptr, tile, token_T, is_token_T, out_size, GATED, BLOCK_O)
    else:
        column_O = tile * BLOCK_O + place_O
        stored_TO = is_token_T[:, None] & (column_O < out_size)[None, :]
        places_TO = token_T[:, None].to(tl.int64) * out_size + column_O[None, :]
        stride_s = num_tokens.to(tl.int64) * out_size
        share_ptrs = sums_ptr + tl.program_id(1) * stride_s + places_TO
        tl.store(share_ptrs, tl.trans(sum_OT), mask=stored_TO)
        if out_ptr is not None:  # whoever ends last adds the shares up
            tl.debug_barrier()  # all threads have stored before one of them counts the program
            if tl.atomic_add(finished_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
                tl.store(finished_ptr + tile, 0)
                total_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
                for split in tl.static_range(SPLITS):
                    share_ptrs = sums_ptr + split * stride_s + places_TO
                    total_TO += tl.load(share_ptrs, mask=stored_TO, other=0.0, cache_modifier=".cg")
                store_product(
                    tl.trans(total_TO),
                    out_ptr,
                    tile,
                    token_T,
                    is_token_T,
                    out_size,
                    GATED,
                    BLOCK_O,
                )


@triton.jit
def _held_until_here(x):
    """``x`` unchanged. Triton would move it to shared memory as soon as it is loaded, and the
    program would wait for it where it should go on.
    """
    if x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    else:
        return x


@triton.jit
def store_product(
    sum_OT,
    out_ptr,
    tile,
    token_T,
    is_token_T,
    out_size,
    GATED: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Round the sums of BLOCK_O weight rows, the ``tile``-th ones, and write them, gated or not.

    Of gated ones half of the rows are the gate's. Token numbers say where in ``out`` a column goes.
    """
    dtype = out_ptr.dtype.element_ty
    rounded_TO = tl.trans(sum_OT).to(dtype)
    if GATED:
        half: tl.constexpr = BLOCK_O // 2
        block_t: tl.constexpr = rounded_TO.shape[0]
        pairs = tl.permute(tl.reshape(rounded_TO, (block_t, 2, half)), (0, 2, 1))
        gate, up = tl.split(pairs)
        gate = gate.to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
        rounded_TO = (silu.to(tl.float32) * up.to(tl.float32)).to(dtype)
        width = out_size // 2
        column_O = tile * half + tl.arange(0, half)
    else:
        width = out_size
        column_O = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = is_token_T[:, None] & (column_O < width)[None, :]
    places = token_T[:, None].to(tl.int64) * width + column_O[None, :]
    tl.store(out_ptr + places, rounded_TO, mask=inside)
