"""Feed-forward layers in which each token goes through a few experts of many.

T tokens, D hidden size, E experts, k experts per token, I intermediate size of an expert, of which
ranks hold a part; all of them choose the same experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from focus_ray.kernels.linear import linear, linear_float32
from focus_ray.kernels.moe import moe
from focus_ray.kernels.partial_sums import Summand
from focus_ray.kernels.routing import Routing, route_by_softmax, route_within_groups
from focus_ray.models.layers import FeedForward, StoredInParts, SwiGLU
from focus_ray.models.parallel import WHOLE, Shard, Shards


class Gate(nn.Module, ABC):
    """Chooses the experts of every token; ``weight`` is ``[E, D]``."""

    def __init__(
        self, hidden_size: int, num_experts: int, num_chosen: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_chosen = num_chosen
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, dtype=dtype), requires_grad=False
        )

    @abstractmethod
    def forward(self, x_TD: Tensor, num_tokens_1: Tensor) -> Routing:
        """Experts and their weights; none for tokens from ``num_tokens_1`` on."""


class SoftmaxGate(Gate):
    """The most probable experts of all; logits in the model's dtype, all else in float32."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_chosen: int,
        dtype: torch.dtype,
        *,
        renormalise: bool,
    ) -> None:
        super().__init__(hidden_size, num_experts, num_chosen, dtype)
        self.renormalise = renormalise

    def forward(self, x_TD: Tensor, num_tokens_1: Tensor) -> Routing:
        return route_by_softmax(
            linear(x_TD, self.weight),
            self.num_chosen,
            renormalise=self.renormalise,
            num_tokens_1=num_tokens_1,
        )


class GroupedGate(Gate):
    """The best experts of the best groups, by sigmoids with a bias; float32 from the logits on.

    Args:
        biased: whether there is ``expert_bias``, float32, by which experts are ranked.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_chosen: int,
        dtype: torch.dtype,
        *,
        biased: bool,
        num_groups: int,
        num_chosen_groups: int,
        scaling: float,
    ) -> None:
        super().__init__(hidden_size, num_experts, num_chosen, dtype)
        self.num_groups = num_groups
        self.num_chosen_groups = num_chosen_groups
        self.scaling = scaling
        self.expert_bias = (
            nn.Parameter(torch.empty(num_experts, dtype=torch.float32), requires_grad=False)
            if biased
            else None
        )

    def forward(self, x_TD: Tensor, num_tokens_1: Tensor) -> Routing:
        return route_within_groups(
            linear_float32(x_TD, self.weight),
            self.expert_bias,
            self.num_chosen,
            num_groups=self.num_groups,
            num_chosen_groups=self.num_chosen_groups,
            scaling=self.scaling,
            num_tokens_1=num_tokens_1,
        )


class Experts(StoredInParts):
    """The weights of all experts, one behind the other, as grouped products read them."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        shards: Shards = WHOLE,
    ) -> None:
        super().__init__()
        self.part = shards.part(intermediate_size)
        width = len(self.part)
        gate_up_E2ID = torch.empty(num_experts, 2 * width, hidden_size, dtype=dtype)
        down_EDI = torch.empty(num_experts, hidden_size, width, dtype=dtype)
        self.gate_up_proj = nn.Parameter(gate_up_E2ID, requires_grad=False)
        self.down_proj = nn.Parameter(down_EDI, requires_grad=False)

    def stored_parts(self, name: str) -> dict[str, Shard]:
        parts = {}
        sections = (self.part,)
        for index, (gate_up_2ID, down_DI) in enumerate(
            zip(self.gate_up_proj, self.down_proj, strict=True)
        ):
            gate_ID, up_ID = gate_up_2ID.chunk(2)
            parts[f"{name}.{index}.gate_proj.weight"] = Shard(gate_ID, 0, sections)
            parts[f"{name}.{index}.up_proj.weight"] = Shard(up_ID, 0, sections)
            parts[f"{name}.{index}.down_proj.weight"] = Shard(down_DI, 1, sections)
        return parts


class SparseMLP(FeedForward):
    """Each token through the experts of its own, and through shared ones if there are any."""

    def __init__(self, gate: Gate, experts: Experts, shared_experts: SwiGLU | None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, x_TD: Tensor, num_tokens_1: Tensor) -> Summand:
        shared = self.shared_experts
        return moe(
            x_TD,
            self.gate(x_TD, num_tokens_1),
            self.experts.gate_up_proj,
            self.experts.down_proj,
            None if shared is None else shared(x_TD, num_tokens_1),
        )
