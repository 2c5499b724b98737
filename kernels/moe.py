"""The feed-forward part of a mixture of experts: every token through the experts of its own.

Which experts these are, ``routing`` says. The rest is four launches, each in a file of its own:
permutation, as lists of every expert's pairs (``moe_placement``); two grouped products, gate and up
with the SwiGLU and then down, tile by tile of such a list (``moe_products``, cut as ``moe_tiles``
says); and the weighted sum over a token's experts (``moe_combine``). No row is moved to be permuted
or put back: a product gathers the rows of its tile's tokens, and writes to rows of pairs, which
stand in the order of the tokens. No count comes to the host: grids have room for any routing, and
programs without work end at once.

T tokens, D hidden size, E experts, k experts per token, I intermediate size of an expert. A *pair*
is a token with one of its experts: number ``t * k + place``, T k pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.linear import linear, linear_swiglu
from focus_ray.kernels.moe_combine import combine_reference, launch_combine
from focus_ray.kernels.moe_placement import place
from focus_ray.kernels.moe_products import expert_product
from focus_ray.kernels.moe_tiles import moe_tiles
from focus_ray.kernels.partial_sums import Summand
from focus_ray.kernels.routing import Routing


def moe(
    x_TD: Tensor,
    routing: Routing,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    added_TD: Summand | None = None,
) -> Tensor:
    """``sum over a token's experts of weight * down(silu(gate(x)) * up(x))``, and ``added``.

    What an expert makes of a token is rounded as by ``linear_swiglu`` and ``linear``; the weighted
    sum over the experts is taken in float32 in their order and rounded once; ``added`` comes last,
    as a sum of two rounded numbers. A token's result does not depend on the other tokens, but how
    many there are may decide the order in which products are summed. The same call gives the same
    bits. A token that belongs to nobody gets ``added``, or 0.

    Args:
        x_TD: ``[T, D]``, any float dtype, unit stride along D.
        routing: ``[T, k]`` each, contiguous.
        gate_up_E2ID: ``[E, 2 I, D]``, dtype of ``x_TD``, contiguous; of each expert the gate above
            the up projection.
        down_EDI: ``[E, D, I]``, the same.
        added_TD: ``[T, D]``, unit stride along D, or partial sums of it: what shared experts make
            of the tokens.

    Returns:
        ``[T, D]``, dtype and device of ``x_TD``; contiguous.

    Raises:
        ValueError: a shape, dtype or layout differs from the above.
    """
    _check(x_TD, routing, gate_up_E2ID, down_EDI, added_TD)
    if not x_TD.numel() or not can_launch(x_TD, routing.expert_Tk, gate_up_E2ID, down_EDI):
        return moe_reference(x_TD, routing, gate_up_E2ID, down_EDI, added_TD)
    num_experts, places = len(down_EDI), routing.expert_Tk.shape[1]
    tiles = moe_tiles(x_TD.device, x_TD.dtype, routing.expert_Tk.numel(), num_experts)
    placement = place(routing.expert_Tk, num_experts, tiles.block_t)
    hidden_PI = expert_product(
        x_TD, gate_up_E2ID, placement, tiles.gate_up, pairs_per_row=places, gated=True
    )
    out_PD = expert_product(hidden_PI, down_EDI, placement, tiles.down, pairs_per_row=1)
    out_TkD = out_PD.unflatten(0, (-1, places))
    return launch_combine(out_TkD, routing, num_experts, added_TD)


def _check(
    x_TD: Tensor,
    routing: Routing,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    added_TD: Summand | None,
) -> None:
    if x_TD.ndim != 2 or down_EDI.ndim != 3 or down_EDI.shape[1] != x_TD.shape[1]:
        raise ValueError(
            f"x must be [T, D] and the down projections [E, D, I] of one D, got "
            f"{tuple(x_TD.shape)} and {tuple(down_EDI.shape)}"
        )
    num_experts, hidden, width = down_EDI.shape
    if gate_up_E2ID.shape != (num_experts, 2 * width, hidden):
        raise ValueError(
            f"gate and up projections must be {[num_experts, 2 * width, hidden]} beside down "
            f"projections {list(down_EDI.shape)}, got {list(gate_up_E2ID.shape)}"
        )
    pairs = routing.expert_Tk.shape
    if len(pairs) != 2 or pairs[0] != len(x_TD) or routing.weight_Tk.shape != pairs:
        raise ValueError(
            f"experts and weights must be [{len(x_TD)}, k] for these tokens, got {tuple(pairs)} "
            f"and {tuple(routing.weight_Tk.shape)}"
        )
    if routing.expert_Tk.dtype != torch.int32 or routing.weight_Tk.dtype != torch.float32:
        raise ValueError(
            f"experts must be int32 and weights float32, got {routing.expert_Tk.dtype} and "
            f"{routing.weight_Tk.dtype}"
        )
    if added_TD is not None and (added_TD.shape != x_TD.shape or added_TD.dtype != x_TD.dtype):
        raise ValueError(
            f"what is added must be {x_TD.dtype} {list(x_TD.shape)} as x, got {added_TD.dtype} "
            f"{list(added_TD.shape)}"
        )
    if not x_TD.dtype == gate_up_E2ID.dtype == down_EDI.dtype:
        raise ValueError(
            f"x and the weights must be one dtype, got {x_TD.dtype}, {gate_up_E2ID.dtype} and "
            f"{down_EDI.dtype}"
        )
    contiguous = (routing.expert_Tk, routing.weight_Tk, gate_up_E2ID, down_EDI)
    if x_TD.stride(1) != 1 or not all(tensor.is_contiguous() for tensor in contiguous):
        raise ValueError("x needs unit stride along D, routing and weights must be contiguous")
    if isinstance(added_TD, Tensor) and added_TD.stride(1) != 1:
        raise ValueError(
            f"what is added needs unit stride along D, got {added_TD.stride()}; make it contiguous"
        )


def moe_reference(
    x_TD: Tensor,
    routing: Routing,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    added_TD: Summand | None,
) -> Tensor:
    """The definition: one expert after the other, each with its tokens."""
    out_TkD = x_TD.new_zeros((*routing.expert_Tk.shape, x_TD.shape[1]))
    for expert in routing.expert_Tk.unique().tolist():
        if expert < len(down_EDI):
            token_N, place_N = (routing.expert_Tk == expert).nonzero(as_tuple=True)
            hidden_NI = linear_swiglu(x_TD[token_N], gate_up_E2ID[expert])
            out_TkD[token_N, place_N] = linear(hidden_NI, down_EDI[expert])
    return combine_reference(out_TkD, routing, len(down_EDI), added_TD)
