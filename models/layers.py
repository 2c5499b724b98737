"""Parts that several architectures share. Weights start uninitialised; loading fills them.

Sizes that a part is told are those of the whole model; of its weights it makes the rank's shard.
What a rank holds fewer of is named alike: T tokens, D hidden size, I intermediate size, V
vocabulary.
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
from focus_ray.models.parallel import WHOLE, Part, Shard, Shards


class StoredInParts(nn.Module, ABC):
    """A module that does not hold its weights as checkpoints store them.

    It may hold several as one, and of each no more than its rank's shard.
    """

    @abstractmethod
    def stored_parts(self, name: str) -> dict[str, Shard]:
        """What it holds of each stored weight, under its name in a checkpoint.

        Args:
            name: of the module itself.
        """


class Linear(StoredInParts):
    """``x @ weight.T``, no bias; ``weight`` is ``[out, in]``, and ranks divide the outputs."""

    def __init__(
        self, in_size: int, out_size: int, dtype: torch.dtype, shards: Shards = WHOLE
    ) -> None:
        super().__init__()
        self.part = shards.part(out_size)
        self.weight = _parameter(len(self.part), in_size, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self.weight)

    def stored_parts(self, name: str) -> dict[str, Shard]:
        return {f"{name}.weight": Shard(self.weight, 0, (self.part,))}


class SummandLinear(StoredInParts):
    """``x @ weight.T`` for what is added to the stream; ranks divide the inputs.

    What a rank makes of its inputs, all ranks have to add up, and it must be whole for that. One
    alone may leave shares of it, which the norm adds that reads the stream.
    """

    def __init__(
        self, in_size: int, out_size: int, dtype: torch.dtype, shards: Shards = WHOLE
    ) -> None:
        super().__init__()
        self.alone = shards.size == 1
        self.part = shards.part(in_size)
        self.weight = _parameter(out_size, len(self.part), dtype=dtype)

    def forward(self, x_TD: Tensor) -> Summand:
        return partial_linear(x_TD, self.weight) if self.alone else linear(x_TD, self.weight)

    def stored_parts(self, name: str) -> dict[str, Shard]:
        return {f"{name}.weight": Shard(self.weight, 1, (self.part,))}


class FusedLinear(StoredInParts):
    """Several linear maps of one input as one product; their weights lie one below the other.

    Args:
        in_size: of the input.
        parts: names each map as checkpoints do, with the part of its outputs that is computed here.
        dtype: of the weight.
        stored_whole: checkpoints store the one weight, under the name of the module.
    """

    def __init__(
        self,
        in_size: int,
        parts: Mapping[str, Part],
        dtype: torch.dtype,
        *,
        stored_whole: bool = False,
    ) -> None:
        super().__init__()
        self.stored_whole = stored_whole
        self.parts = dict(parts)
        self.weight = _parameter(sum(map(len, parts.values())), in_size, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The outputs of the maps, side by side in their order."""
        return linear(x_TD, self.weight)

    def stored_parts(self, name: str) -> dict[str, Shard]:
        if self.stored_whole:
            return {f"{name}.weight": Shard(self.weight, 0, tuple(self.parts.values()))}
        owner = name.rpartition(".")[0]
        weights = self.weight.split([len(part) for part in self.parts.values()])
        return {
            f"{owner}.{map_name}.weight": Shard(weight, 0, (part,))
            for (map_name, part), weight in zip(self.parts.items(), weights, strict=True)
        }


def stored_shards(model: nn.Module) -> dict[str, Shard]:
    """What is held of each weight, under its name in a checkpoint."""
    weights = {name: Shard.whole(weight) for name, weight in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, StoredInParts):
            for own, _ in module.named_parameters(recurse=False):
                del weights[f"{name}.{own}"]
            weights.update(module.stored_parts(name))
    return weights


class Embedding(StoredInParts):
    """Rows of ``weight``, ``[V, D]``; ranks divide the vocabulary."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, shards: Shards = WHOLE
    ) -> None:
        super().__init__()
        self.shards = shards
        self.part = shards.part(vocab_size)
        self.weight = _parameter(len(self.part), hidden_size, dtype=dtype)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        if self.shards.size == 1:
            return F.embedding(token_ids_T, self.weight)
        row_T = token_ids_T - self.part.start
        elsewhere_T = (row_T < 0) | (row_T >= len(self.part))
        x_TD = F.embedding(row_T.masked_fill(elsewhere_T, 0), self.weight)
        return self.shards.add_up(x_TD.masked_fill_(elsewhere_T[:, None], 0))  # of one, and zeros

    def stored_parts(self, name: str) -> dict[str, Shard]:
        return {f"{name}.weight": Shard(self.weight, 0, (self.part,))}


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
        """What is to be added to the stream, or the rank's share of it, which is whole then.

        Args:
            num_tokens_1: ``[1]`` int32, tokens from this one on belong to nobody.
        """


class SwiGLU(FeedForward):
    """One network for all tokens: ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        shards: Shards = WHOLE,
    ) -> None:
        super().__init__()
        parts = dict.fromkeys(("gate_proj", "up_proj"), shards.part(intermediate_size))
        self.gate_up_proj = FusedLinear(hidden_size, parts, dtype)
        self.down_proj = SummandLinear(intermediate_size, hidden_size, dtype, shards)

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


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
