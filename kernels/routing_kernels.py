"""The kernels behind the routers: a token's row of logits is read once and never leaves registers.

Whatever is compared is turned to an integer that orders as the value does and ends in the number of
the expert, so that one maximum finds the best and, of equals, the first.

T tokens, E experts, k experts per token, G groups of P experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from focus_ray.kernels.launch import INTERPRETED
from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous

# One warp: its maxima are shuffles, and a row has few elements for each lane.
NUM_WARPS = 1

# Below the key of any number, -inf included.
_NO_KEY = tl.constexpr(torch.iinfo(torch.int64).min)


def launch_softmax(
    logits_TE: Tensor, num_chosen: int, *, renormalise: bool, num_tokens_1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``expert_Tk`` and ``weight_Tk`` of ``route_by_softmax``; T at least 1."""
    num_tokens, num_experts = logits_TE.shape
    expert_Tk, weight_Tk = _empty(logits_TE, num_chosen)
    _route_by_softmax_kernel[(num_tokens,)](
        logits_TE,
        num_tokens_1,
        expert_Tk,
        weight_Tk,
        NUM_EXPERTS=num_experts,
        NUM_CHOSEN=num_chosen,
        RENORMALISE=renormalise,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(num_chosen),
        num_warps=NUM_WARPS,
        **overlap_options(logits_TE.device),
    )
    return expert_Tk, weight_Tk


def launch_groups(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    *,
    num_groups: int,
    num_chosen_groups: int,
    scaling: float,
    num_tokens_1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``expert_Tk`` and ``weight_Tk`` of ``route_within_groups``; T at least 1."""
    num_tokens, num_experts = logits_TE.shape
    expert_Tk, weight_Tk = _empty(logits_TE, num_chosen)
    group_size = num_experts // num_groups
    _route_within_groups_kernel[(num_tokens,)](
        logits_TE,
        bias_E,
        num_tokens_1,
        expert_Tk,
        weight_Tk,
        scaling,
        NUM_GROUPS=num_groups,
        GROUP_SIZE=group_size,
        NUM_CHOSEN_GROUPS=num_chosen_groups,
        NUM_CHOSEN=num_chosen,
        BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK_P=triton.next_power_of_2(group_size),
        BLOCK_K=triton.next_power_of_2(num_chosen),
        INTERPRETED=INTERPRETED,
        num_warps=NUM_WARPS,
        **overlap_options(logits_TE.device),
    )
    return expert_Tk, weight_Tk


def _empty(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    shape = (len(logits_TE), num_chosen)
    return (
        logits_TE.new_empty(shape, dtype=torch.int32),
        logits_TE.new_empty(shape, dtype=torch.float32),
    )


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _route_by_softmax_kernel(
    logits_ptr,
    num_tokens_ptr,
    expert_ptr,
    weight_ptr,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    t = tl.program_id(0).to(tl.int64)  # one program per token
    e_E = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, BLOCK_K)
    is_place_K = k_K < NUM_CHOSEN
    expert_K = tl.full((BLOCK_K,), NUM_EXPERTS, tl.int32)
    weight_K = tl.zeros((BLOCK_K,), tl.float32)
    wait_for_previous(OVERLAP)
    if _is_real(t, num_tokens_ptr):
        logits_ptr += t * NUM_EXPERTS
        is_expert_E = e_E < NUM_EXPERTS
        logit_E = tl.load(logits_ptr + e_E, mask=is_expert_E, other=-float("inf")).to(tl.float32)
        key_E = tl.where(is_expert_E, _key(logit_E, e_E), _NO_KEY)
        expert_K, _ = _best(key_E, NUM_CHOSEN, BLOCK_K)
        top = tl.max(tl.where(logit_E == logit_E, logit_E, -float("inf")), axis=0)
        total = tl.sum(tl.exp(logit_E - top), axis=0)  # not a number if one logit is none
        chosen_K = tl.load(logits_ptr + expert_K, mask=is_place_K, other=-float("inf"))
        weight_K = tl.exp(chosen_K.to(tl.float32) - top) / total
        if RENORMALISE:
            weight_K /= tl.sum(tl.where(is_place_K, weight_K, 0.0), axis=0)
        weight_K = weight_K.to(logits_ptr.dtype.element_ty).to(tl.float32)
    tl.store(expert_ptr + t * NUM_CHOSEN + k_K, expert_K, mask=is_place_K)
    tl.store(weight_ptr + t * NUM_CHOSEN + k_K, weight_K, mask=is_place_K)


@triton.jit(do_not_specialize_on_alignment=["num_tokens_ptr"])
def _route_within_groups_kernel(
    logits_ptr,
    bias_ptr,
    num_tokens_ptr,
    expert_ptr,
    weight_ptr,
    scaling,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_CHOSEN_GROUPS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    t = tl.program_id(0).to(tl.int64)  # one program per token
    g_G = tl.arange(0, BLOCK_G)
    p_P = tl.arange(0, BLOCK_P)
    is_expert_GP = (g_G < NUM_GROUPS)[:, None] & (p_P < GROUP_SIZE)[None, :]
    e_GP = g_G[:, None] * GROUP_SIZE + p_P[None, :]
    k_K = tl.arange(0, BLOCK_K)
    is_place_K = k_K < NUM_CHOSEN
    expert_K = tl.full((BLOCK_K,), NUM_GROUPS * GROUP_SIZE, tl.int32)
    weight_K = tl.zeros((BLOCK_K,), tl.float32)
    wait_for_previous(OVERLAP)
    if _is_real(t, num_tokens_ptr):
        logits_ptr += t * (NUM_GROUPS * GROUP_SIZE)
        logit_GP = tl.load(logits_ptr + e_GP, mask=is_expert_GP, other=0.0).to(tl.float32)
        rank_GP = _sigmoid(logit_GP, INTERPRETED)
        if bias_ptr is not None:
            rank_GP += tl.load(bias_ptr + e_GP, mask=is_expert_GP, other=0.0)
        rank_GP = tl.where(rank_GP == rank_GP, rank_GP, -float("inf"))

        key_GP = tl.where(is_expert_GP, _key(rank_GP, e_GP), _NO_KEY)
        first_G = tl.max(key_GP, axis=1)
        score_G = _value(first_G)
        if GROUP_SIZE > 1:
            other_GP = tl.where(key_GP == first_G[:, None], _NO_KEY, key_GP)
            score_G += _value(tl.max(other_GP, axis=1))
        group_key_G = tl.where(g_G < NUM_GROUPS, _key(score_G, g_G), _NO_KEY)
        _, last_group_key = _best(group_key_G, NUM_CHOSEN_GROUPS, BLOCK_G)
        is_eligible_GP = (group_key_G >= last_group_key)[:, None]
        key_GP = tl.where(is_eligible_GP, key_GP, _NO_KEY)
        expert_K, _ = _best(tl.reshape(key_GP, (BLOCK_G * BLOCK_P,)), NUM_CHOSEN, BLOCK_K)
        chosen_K = tl.load(logits_ptr + expert_K, mask=is_place_K, other=0.0)
        weight_K = tl.where(is_place_K, _sigmoid(chosen_K.to(tl.float32), INTERPRETED), 0.0)
        if NUM_CHOSEN > 1:
            weight_K /= tl.sum(weight_K, axis=0) + 1e-20
        weight_K = (weight_K * scaling).to(logits_ptr.dtype.element_ty).to(tl.float32)
    tl.store(expert_ptr + t * NUM_CHOSEN + k_K, expert_K, mask=is_place_K)
    tl.store(weight_ptr + t * NUM_CHOSEN + k_K, weight_K, mask=is_place_K)


@triton.jit
def _is_real(t, num_tokens_ptr):
    """Whether the token belongs to somebody."""
    if num_tokens_ptr is None:
        return t >= 0
    else:
        return t < tl.load(num_tokens_ptr)


@triton.jit
def _sigmoid(x, INTERPRETED: tl.constexpr):
    """Bit for bit that of torch, which ranks experts by it: saturated ones are equal in both.

    Triton's own exponential and division are approximations, and the interpreter has no other.
    """
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@triton.jit
def _key(value, index):
    """int64 that is larger where the value is, and of equal values where the index is smaller.

    0 and -0 are equal, and what is not a number is -inf.
    """
    value = tl.where(value == value, value, -float("inf"))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order the other way round
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _value(key):
    """The float32 of a key; NaN of no key."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best(key_X, COUNT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Indices of the COUNT largest keys, the largest first, and the last of these keys."""
    k_K = tl.arange(0, BLOCK_K)
    index_K = tl.zeros((BLOCK_K,), tl.int32)
    best = tl.full((), _NO_KEY, tl.int64)
    for k in range(COUNT):
        best = tl.max(key_X, axis=0)
        index = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        index_K = tl.where(k_K == k, index, index_K)
        key_X = tl.where(key_X == best, _NO_KEY, key_X)
    return index_K, best
