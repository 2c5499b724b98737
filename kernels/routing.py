"""Which experts of a mixture compute a token, and with which weights.

T tokens, E experts, k experts per token, G groups of experts, of which C are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.routing_kernels import launch_groups, launch_softmax


@dataclass(frozen=True)
class Routing:
    """The experts of every token, best first; each at most once.

    Args:
        expert_Tk: ``[T, k]`` int32; E for tokens that belong to nobody.
        weight_Tk: ``[T, k]`` float32, what the output of each is multiplied by; 0 for tokens that
            belong to nobody.
    """

    expert_Tk: Tensor
    weight_Tk: Tensor


def route_by_softmax(
    logits_TE: Tensor, num_chosen: int, *, renormalise: bool, num_tokens_1: Tensor | None = None
) -> Routing:
    """The k most probable experts under the softmax over all (Qwen3-MoE, SDAR-MoE).

    Everything is float32; the weights are rounded to the dtype of the logits in the end. Of equal
    logits the lower expert comes first, and one that is not a number comes last.

    Args:
        logits_TE: ``[T, E]``, any float dtype, contiguous.
        num_chosen: k, 1 to E.
        renormalise: whether the weights of a token are divided by their sum.
        num_tokens_1: ``[1]`` int32, tokens from this one on belong to nobody; None: all are real.

    Raises:
        ValueError: a shape, dtype or number differs from the above.
    """
    _check(logits_TE, num_chosen, num_tokens_1)
    if len(logits_TE) and _can_launch(logits_TE, num_tokens_1):
        found = launch_softmax(
            logits_TE, num_chosen, renormalise=renormalise, num_tokens_1=num_tokens_1
        )
        return Routing(*found)
    return route_by_softmax_reference(
        logits_TE, num_chosen, renormalise=renormalise, num_tokens_1=num_tokens_1
    )


def route_within_groups(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    *,
    num_groups: int,
    num_chosen_groups: int,
    scaling: float,
    num_tokens_1: Tensor | None = None,
) -> Routing:
    """The k best experts of the best groups, weighted by their sigmoids (BailingMoeV2, LLaDA2).

    Experts are ranked by ``sigmoid(logit) + bias``, a group of consecutive experts by the sum of
    its two best. Weights know nothing of the bias: where k > 1 they are the sigmoids divided by
    their sum plus 1e-20, and in any case they are multiplied by ``scaling``. Everything is float32;
    the weights are rounded to the dtype of the logits in the end. Of equals the lower expert, or
    group, comes first, and what is not a number comes last.

    Args:
        logits_TE: ``[T, E]``, any float dtype, contiguous.
        bias_E: ``[E]`` float32; None is 0.
        num_chosen: k, 1 to the number of experts in the chosen groups.
        num_groups: G, divides E.
        num_chosen_groups: 1 to G.
        scaling: factor of all weights.
        num_tokens_1: ``[1]`` int32, tokens from this one on belong to nobody; None: all are real.

    Raises:
        ValueError: a shape, dtype or number differs from the above.
    """
    _check(logits_TE, num_chosen, num_tokens_1)
    num_experts = logits_TE.shape[1]
    if bias_E is not None and (bias_E.shape != (num_experts,) or bias_E.dtype != torch.float32):
        raise ValueError(
            f"bias must be float32 [{num_experts}], got {bias_E.dtype} {tuple(bias_E.shape)}"
        )
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups {num_groups} does not divide {num_experts} experts")
    if not 1 <= num_chosen_groups <= num_groups:
        raise ValueError(f"num_chosen_groups must be 1 to {num_groups}, got {num_chosen_groups}")
    num_eligible = num_experts // num_groups * num_chosen_groups
    if num_chosen > num_eligible:
        raise ValueError(
            f"num_chosen {num_chosen} is above the {num_eligible} experts of {num_chosen_groups} "
            f"of {num_groups} groups"
        )
    if len(logits_TE) and _can_launch(logits_TE, bias_E, num_tokens_1):
        found = launch_groups(
            logits_TE,
            bias_E,
            num_chosen,
            num_groups=num_groups,
            num_chosen_groups=num_chosen_groups,
            scaling=scaling,
            num_tokens_1=num_tokens_1,
        )
        return Routing(*found)
    return route_within_groups_reference(
        logits_TE,
        bias_E,
        num_chosen,
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        scaling=scaling,
        num_tokens_1=num_tokens_1,
    )


def _check(logits_TE: Tensor, num_chosen: int, num_tokens_1: Tensor | None) -> None:
    if logits_TE.ndim != 2 or not logits_TE.is_contiguous():
        raise ValueError(f"logits must be contiguous [T, E], got {tuple(logits_TE.shape)}")
    if not 1 <= num_chosen <= logits_TE.shape[1]:
        raise ValueError(f"num_chosen must be 1 to {logits_TE.shape[1]}, got {num_chosen}")
    if num_tokens_1 is not None and (
        num_tokens_1.shape != (1,) or num_tokens_1.dtype != torch.int32
    ):
        raise ValueError(
            f"num_tokens must be int32 [1], got {num_tokens_1.dtype} {tuple(num_tokens_1.shape)}"
        )


def _can_launch(*tensors: Tensor | None) -> bool:
    return can_launch(*(tensor for tensor in tensors if tensor is not None))


def route_by_softmax_reference(
    logits_TE: Tensor, num_chosen: int, *, renormalise: bool, num_tokens_1: Tensor | None
) -> Routing:
    """The definition."""
    expert_Tk = _best(logits_TE.float(), num_chosen)
    weight_Tk = logits_TE.softmax(1, dtype=torch.float32).gather(1, expert_Tk)
    if renormalise:
        weight_Tk = weight_Tk / weight_Tk.sum(1, keepdim=True)
    return _routing(expert_Tk, weight_Tk, logits_TE, num_tokens_1)


def route_within_groups_reference(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    *,
    num_groups: int,
    num_chosen_groups: int,
    scaling: float,
    num_tokens_1: Tensor | None,
) -> Routing:
    """The definition."""
    sigmoid_TE = logits_TE.float().sigmoid()
    rank_TE = sigmoid_TE if bias_E is None else sigmoid_TE + bias_E
    rank_TE = rank_TE.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    rank_TGg = rank_TE.unflatten(1, (num_groups, -1))
    score_TG = rank_TGg.topk(min(2, rank_TGg.shape[2]), dim=2).values.sum(2)
    # In order of their numbers, so that of equal experts the lower is the first.
    group_TC = _best(score_TG, num_chosen_groups).sort(1).values
    group_size = rank_TGg.shape[2]
    eligible_TCg = rank_TGg.gather(1, group_TC[:, :, None].expand(-1, -1, group_size))
    place_Tk = _best(eligible_TCg.flatten(1), num_chosen)
    expert_Tk = group_TC.gather(1, place_Tk // group_size) * group_size + place_Tk % group_size
    weight_Tk = sigmoid_TE.gather(1, expert_Tk)
    if num_chosen > 1:
        weight_Tk = weight_Tk / (weight_Tk.sum(1, keepdim=True) + 1e-20)
    return _routing(expert_Tk, weight_Tk * scaling, logits_TE, num_tokens_1)


def _best(value_TX: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` largest of each row, of equals the lower first: ``[T, count]``."""
    value_TX = value_TX.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return value_TX.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _routing(
    expert_Tk: Tensor, weight_Tk: Tensor, logits_TE: Tensor, num_tokens_1: Tensor | None
) -> Routing:
    num_tokens, num_experts = logits_TE.shape
    weight_Tk = weight_Tk.to(logits_TE.dtype).float()
    if num_tokens_1 is not None:
        is_nobodys_T1 = torch.arange(num_tokens, device=logits_TE.device)[:, None] >= num_tokens_1
        expert_Tk = expert_Tk.masked_fill(is_nobodys_T1, num_experts)
        weight_Tk = weight_Tk.masked_fill(is_nobodys_T1, 0.0)
    return Routing(expert_Tk.int(), weight_Tk)
