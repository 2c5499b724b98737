"""A mixture of experts at real shapes, random weights, and the least that a routing costs.

T tokens, D hidden size, E experts, k experts per token, I intermediate size of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.kernels.routing import (
    Routing,
    route_by_softmax,
    route_by_softmax_reference,
    route_within_groups,
    route_within_groups_reference,
)
from focus_ray.models.llada2 import Llada2Config
from focus_ray.models.sdar_moe import SdarMoeConfig
from focus_ray.models.shapes import LLADA2_FLASH, LLADA2_MINI, SDAR_30B_A3B

SCALING = 2.5


@dataclass(frozen=True)
class MoeShape:
    """A sparse layer; with ``num_groups`` of 1 its router is the softmax over all experts."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_chosen: int
    num_groups: int = 1
    num_chosen_groups: int = 1


def sparse_layer(name: str, config: SdarMoeConfig | Llada2Config) -> MoeShape:
    """That of a model."""
    groups = (config.n_group, config.topk_group) if isinstance(config, Llada2Config) else (1, 1)
    return MoeShape(
        name,
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        *groups,
    )


SHAPES = {
    name: sparse_layer(name, config)
    for name, config in (
        ("llada2.0-mini", LLADA2_MINI),
        ("sdar-30b-a3b", SDAR_30B_A3B),
        ("llada2.0-flash", LLADA2_FLASH),
    )
}
# Of a size at which the script itself can be looked at on a CPU.
QUICK_SHAPES = {
    shape.name: shape
    for shape in (MoeShape("quick groups", 64, 32, 16, 4, 4, 2), MoeShape("quick", 64, 48, 8, 2))
}

# Deviation of the logarithm of an expert's popularity. Routers are trained to balance their load,
# over all texts and not over those of a batch.
SKEWS = {"spread": 0.0, "skewed": 1.0}


class Experts:
    """Router and weights of one layer."""

    def __init__(self, shape: MoeShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)
        hidden, width, num_experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
        self.gate_up_E2ID = self._weights(num_experts, 2 * width, hidden)
        self.down_EDI = self._weights(num_experts, hidden, width)
        self.bias_E = torch.zeros(num_experts, device=device)

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self._generator, device=self.device)

    def _weights(self, *sizes: int) -> Tensor:
        """Filled without a float32 copy, which would be twice their size."""
        weights = torch.empty(sizes, dtype=self.dtype, device=self.device)
        return weights.normal_(std=sizes[-1] ** -0.5, generator=self._generator)

    def tokens(self, num_tokens: int) -> Tensor:
        return self.normal(num_tokens, self.shape.hidden_size).to(self.dtype)

    def logits(self, num_tokens: int, skew: float) -> Tensor:
        """Every token has its own taste, and some experts are popular."""
        num_experts = self.shape.num_experts
        return self.normal(num_tokens, num_experts) + skew * self.normal(num_experts)

    def route(self, logits_TE: Tensor) -> Routing:
        shape = self.shape
        if shape.num_groups == 1:
            return route_by_softmax(logits_TE, shape.num_chosen, renormalise=True)
        return route_within_groups(
            logits_TE,
            self.bias_E,
            shape.num_chosen,
            num_groups=shape.num_groups,
            num_chosen_groups=shape.num_chosen_groups,
            scaling=SCALING,
        )

    def route_by_definition(self, logits_TE: Tensor) -> Routing:
        shape = self.shape
        if shape.num_groups == 1:
            return route_by_softmax_reference(
                logits_TE, shape.num_chosen, renormalise=True, num_tokens_1=None
            )
        return route_within_groups_reference(
            logits_TE,
            self.bias_E,
            shape.num_chosen,
            num_groups=shape.num_groups,
            num_chosen_groups=shape.num_chosen_groups,
            scaling=SCALING,
            num_tokens_1=None,
        )


@dataclass(frozen=True)
class Work:
    """What a routing costs at the least.

    Args:
        touched: experts with tokens.
        fullest: tokens of the expert that has most.
        num_bytes: weights of the touched experts.
        num_flops: of the products of all pairs, padding left out.
    """

    touched: int
    fullest: int
    num_bytes: int
    num_flops: int


def work_of(shape: MoeShape, routing: Routing, itemsize: int) -> Work:
    counts_E = routing.expert_Tk.flatten().bincount(minlength=shape.num_experts)
    touched = int((counts_E > 0).sum())
    weights = 3 * shape.hidden_size * shape.intermediate_size
    return Work(
        touched,
        int(counts_E.max()),
        touched * weights * itemsize,
        2 * routing.expert_Tk.numel() * weights,
    )
