"""Feed-forward layers of a larger model, dense or of experts, that add what a small one adds.

Letters of the larger model: D hidden size, I intermediate size of one network, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from focus_ray.benchmarks.expand_layout import Reading, unit_groups
from focus_ray.benchmarks.expand_values import Values
from focus_ray.models.layers import SwiGLU
from focus_ray.models.moe import Gate, GroupedGate, SparseMLP

# Of gate logits. Softmax's weights are rounded to the model's dtype: so small a logit leaves equal
# ones in bfloat16, whose sum is exact, and still tells all experts apart in float32.
SOFTMAX_LOGITS = 2.0**-13
# Where sigmoids are far from flat: one that is saturated would leave the choice to the bias.
SIGMOID_LOGITS = 0.5
# There, but next to nothing: gates over white inputs need no bias to be balanced.
BIAS_STD = 0.001


@dataclass(frozen=True)
class Network:
    """``down(silu(gate(x)) * up(x))``, by its three weights."""

    gate_ID: Tensor
    up_ID: Tensor
    down_DI: Tensor

    @classmethod
    def of(cls, mlp: SwiGLU) -> Network:
        gate_ID, up_ID = mlp.gate_up_proj.weight.chunk(2)
        return cls(gate_ID, up_ID, mlp.down_proj.weight)


class FeedForwardExpansion:
    """Fills feed-forward layers.

    A network carries some units of the small model, or none. Those of a mixture are shared out:
    shared experts take as many as they hold, and every other expert carries all that are left. So
    it does not matter which experts a token goes through, as long as their weights add up.
    """

    def __init__(self, values: Values, num_units: int) -> None:
        self.values, self.num_units = values, num_units
        self._layout = cache(self._make_layout)

    def fill_dense(self, mlp: SwiGLU, small: Network, *, carries: bool) -> None:
        """One network for all tokens; it adds nothing if it carries nothing."""
        self._fill_network(Network.of(mlp), small, range(self.num_units if carries else 0))

    def fill_sparse(
        self, mlp: SparseMLP, small: Network, whitening_DD: Tensor, *, carries: bool
    ) -> None:
        """A mixture, with a gate over inputs that ``whitening_DD`` makes white."""
        num_units, num_shared = (self.num_units if carries else 0), 0
        if mlp.shared_experts is not None:
            shared = Network.of(mlp.shared_experts)
            num_shared = min(num_units, shared.down_DI.shape[1])
            self._fill_network(shared, small, range(num_shared))
        rest = range(num_shared, num_units) or range(0)
        share = 1.0 / mlp.gate.scaling if isinstance(mlp.gate, GroupedGate) else 1.0
        experts = mlp.experts
        for gate_up_2ID, down_DI in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            gate_ID, up_ID = gate_up_2ID.chunk(2)
            self._fill_network(Network(gate_ID, up_ID, down_DI), small, rest, share)
        self._fill_gate(mlp.gate, whitening_DD)

    def _fill_network(
        self, large: Network, small: Network, carried: range, share: float = 1.0
    ) -> None:
        """Let it add ``share`` times what the units ``carried`` add in the small model."""
        values = self.values
        unit_I, read_units = self._layout(len(carried), large.down_DI.shape[1])
        for large_ID, small_ID in ((large.gate_ID, small.gate_ID), (large.up_ID, small.up_ID)):
            own_ID = small_ID[carried.start : carried.stop]
            read = values.read(own_ID, values.read_stream, like=small_ID)
            large_ID.copy_(values.rows(read, unit_I, 1.0, like=small_ID))
        read = values.read(small.down_DI[:, carried.start :], read_units, like=small.down_DI)
        large.down_DI.copy_(values.written(read) * share)

    def _make_layout(self, num_carried: int, size: int) -> tuple[Tensor, Reading]:
        """Where the units stand, and how they are read."""
        values = self.values
        groups = unit_groups(num_carried, size, seed=values.seed + 1)
        return values.tensor(groups), values.reading(groups, num_carried)

    def _fill_gate(self, gate: Gate, whitening_DD: Tensor) -> None:
        values = self.values
        size = SIGMOID_LOGITS if isinstance(gate, GroupedGate) else SOFTMAX_LOGITS
        shape = (len(gate.weight), len(whitening_DD))
        random_ED = torch.randn(shape, generator=values.generator, device=values.device)
        rows_ED = random_ED @ whitening_DD.to(values.device) * (size / values.num_copies)
        gate.weight.copy_(values.written(values.own(rows_ED).T).T)
        if isinstance(gate, GroupedGate) and gate.expert_bias is not None:
            gate.expert_bias.normal_(0.0, BIAS_STD, generator=values.generator)
