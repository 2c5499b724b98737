"""Parts that several architectures share. Weights start uninitialised; loading fills them.

T tokens, D hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.kernels.linear import linear, linear_swiglu, partial_linear
from focus_ray.kernels.partial_sums import Summand
from focus_ray.kernels.rms_norm import add_rms_norm, rms_norm
from focus_ray.kernels.rotary import rotary_table


class Linear(nn.Module):
    """``x @ weight.T``, no bias; ``weight`` is ``[out, in]``."""

    def __init__(self, in_size: int, out_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self.weight)


class SummandLinear(nn.Module):
    """``Linear`` for what only a norm reads, which adds up the shares that may have been left."""

    def __init__(self, in_size: int, out_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Summand:
        return partial_linear(x_TD, self.weight)


class StoredInParts(nn.Module, ABC):
    """A module whose weights checkpoints store in other pieces than it holds."""

    @abstractmethod
    def stored_parts(self, name: str) -> dict[str, Tensor]:
        """The pieces, views of its own weights, under their names in a checkpoint.

        Args:
            name: of the module itself.
        """


class FusedLinear(StoredInParts):
    """Several linear maps of one input as one product; their weights lie one below the other.

    Args:
        in_size: of the input.
        part_sizes: names each map as checkpoints do, with its number of outputs.
        dtype: of the weight.
        stored_whole: checkpoints store the one weight, under the name of the module.
    """

    def __init__(
        self,
        in_size: int,
        part_sizes: Mapping[str, int],
        dtype: torch.dtype,
        *,
        stored_whole: bool = False,
    ) -> None:
        super().__init__()
        self.stored_whole = stored_whole
        self.part_sizes = dict(part_sizes)
        self.weight = nn.Parameter(
            torch.empty(sum(part_sizes.values()), in_size, dtype=dtype), requires_grad=False
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """The outputs of the maps, side by side in their order."""
        return linear(x_TD, self.weight)

    def stored_parts(self, name: str) -> dict[str, Tensor]:
        if self.stored_whole:
            return {f"{name}.weight": self.weight}
        owner = name.rpartition(".")[0]
        weights = self.weight.split([*self.part_sizes.values()])
        return {
            f"{owner}.{part}.weight": weight
            for part, weight in zip(self.part_sizes, weights, strict=True)
        }


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights under the names of a checkpoint."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, StoredInParts):
            for own, _ in module.named_parameters(recurse=False):
                del weights[f"{name}.{own}"]
            weights.update(module.stored_parts(name))
    return weights


class Embedding(nn.Module):
    """Rows of ``weight``, ``[V, D]``."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False
        )

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return F.embedding(token_ids_T, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the stream of hidden states; ``weight`` is as long as a state."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x_TD: Tensor, added_TD: Summand | None = None) -> tuple[Tensor, Tensor]:
        """Add what is to be added to the stream first; the norm, and the stream."""
        if added_TD is None:
            return rms_norm(x_TD, self.weight, self.eps), x_TD
        return add_rms_norm(x_TD, added_TD, self.weight, self.eps)


class FeedForward(nn.Module, ABC):
    """The second half of a layer, between a norm and the stream."""

    @abstractmethod
    def forward(self, x_TD: Tensor, num_tokens_1: Tensor) -> Summand:
        """What is to be added to the stream.

        Args:
            num_tokens_1: ``[1]`` int32, tokens from this one on belong to nobody.
        """


class SwiGLU(FeedForward):
    """One network for all tokens: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = FusedLinear(hidden_size, sizes, dtype)
        self.down_proj = SummandLinear(intermediate_size, hidden_size, dtype)

    def forward(self, x_TD: Tensor, num_tokens_1: Tensor) -> Summand:
        down_TD: Summand = self.down_proj(linear_swiglu(x_TD, self.gate_up_proj.weight))
        return down_TD


class Rotary(nn.Module):
    """Cosines and sines of every position, computed once; no weight of the checkpoint."""

    table_P2r2: Tensor

    def __init__(
        self, num_positions: int, rotary_dim: int, theta: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        table = rotary_table(
            num_positions, rotary_dim, theta, dtype=dtype, device=torch.get_default_device()
        )
        self.register_buffer("table_P2r2", table, persistent=False)
