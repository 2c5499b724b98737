"""The kernel behind ``linear`` at few tokens: it streams the weight once and little else.

T tokens, O output size, D inner size; for a gated product I output size, the weight ``[2 I, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous

LEAST_BLOCK_T = 16
# Tiles of one launch whose splits are counted; 65536 output columns in tiles of 16.
MAX_COUNTED_TILES = 4096


@dataclass(frozen=True)
class LinearTile:
    """How the product is cut.

    Args:
        block_o: weight rows of a program; 64 and more run on Hopper's wgmma.
        block_d: inner elements per pass of the loop.
        num_splits: programs that share the inner dimension of a tile.
        num_warps: warps that share the tile.
        num_stages: passes whose loads are in flight, one more than that of the pass that computes.
    """

    block_o: int
    block_d: int
    num_splits: int
    num_warps: int
    num_stages: int


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
    num_tokens, inner = x_TD.shape
    out_size = weight_OD.shape[0]
    block_t = max(LEAST_BLOCK_T, triton.next_power_of_2(num_tokens))
    tiles = triton.cdiv(out_size, tile.block_o)
    out = x_TD.new_empty(num_tokens, out_size // 2 if gated else out_size)
    if tile.num_splits == 1:
        partial = finished = None
    else:
        partial_shape = (tile.num_splits, tiles, block_t, tile.block_o)
        partial = x_TD.new_empty(partial_shape, dtype=torch.float32)
        finished = finished_counters(x_TD.device)
    _linear_kernel[(tiles, tile.num_splits)](
        x_TD,
        weight_OD,
        out,
        partial,
        finished,
        num_tokens,
        out_size,
        x_TD.stride(0),
        INNER=inner,
        GATED=gated,
        BLOCK_T=block_t,
        BLOCK_O=tile.block_o,
        BLOCK_D=tile.block_d,
        SPLITS=tile.num_splits,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **overlap_options(x_TD.device),
    )
    return out


@cache
def finished_counters(device: torch.device) -> Tensor:
    """How many splits of each tile are done: all 0 between launches, which leave them so.

    One set per device, for kernels of one stream follow one another.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the counters of split products do not exist yet: compute one such product on "
            f"{device} before recording a graph of it"
        )
    return torch.zeros(MAX_COUNTED_TILES, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    partial_ptr,
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
    token_T = tl.arange(0, BLOCK_T)
    is_token_T = token_T < num_tokens
    d_D = tl.arange(0, BLOCK_D)
    weight_ptrs = weight_ptr + row_O.to(tl.int64)[:, None] * INNER + first_d + d_D[None, :]
    x_ptrs = x_ptr + first_d + token_T[None, :].to(tl.int64) * x_stride_t + d_D[:, None]
    sum_OT = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    wait_for_previous(OVERLAP)
    for _ in tl.range(SHARE // BLOCK_D, num_stages=STAGES):
        weight_OD = tl.load(weight_ptrs)
        x_DT = tl.load(x_ptrs, mask=is_token_T[None, :], other=0.0)
        sum_OT = tl.dot(weight_OD, x_DT, sum_OT, input_precision="ieee")
        weight_ptrs += BLOCK_D
        x_ptrs += BLOCK_D

    if SPLITS == 1:
        _store(sum_OT, out_ptr, tile, token_T, is_token_T, out_size, GATED, BLOCK_O)
    else:
        place_TO = token_T[:, None] * BLOCK_O + place_O[None, :]
        stored_TO = tl.broadcast_to(is_token_T[:, None], (BLOCK_T, BLOCK_O))
        partial_ptrs = partial_ptr + tile.to(tl.int64) * (BLOCK_T * BLOCK_O) + place_TO
        stride_s = tl.num_programs(0).to(tl.int64) * (BLOCK_T * BLOCK_O)
        tl.store(partial_ptrs + tl.program_id(1) * stride_s, tl.trans(sum_OT), mask=stored_TO)
        tl.debug_barrier()  # all threads have stored before one of them counts the program
        if tl.atomic_add(finished_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(finished_ptr + tile, 0)
            total_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
            for split in tl.static_range(SPLITS):
                total_TO += tl.load(
                    partial_ptrs + split * stride_s,
                    mask=stored_TO,
                    other=0.0,
                    cache_modifier=".cg",
                )
            _store(tl.trans(total_TO), out_ptr, tile, token_T, is_token_T, out_size, GATED, BLOCK_O)


@triton.jit
def _store(
    sum_OT,
    out_ptr,
    tile,
    token_T,
    is_token_T,
    out_size,
    GATED: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Round the sums and write them, gated or not."""
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
