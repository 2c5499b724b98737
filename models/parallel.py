"""Tensor parallelism: which part of the weights a rank holds, and what ranks tell each other.

A model is cut into as many shards as there are ranks; every rank runs the same step with its own.
Collective calls must be made by all ranks in the same order, and give all of them the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """This rank among those that share a model; alone by default, when nothing is exchanged.

    Args:
        rank: 0 to ``size - 1``.
        size: ranks.
        group: over which they exchange tensors of the model's device; None: ``size`` is 1.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def add_up(self, x: Tensor) -> Tensor:
        """``x`` itself, contiguous, in place now the sum over all ranks, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """``[size, ...]``: the ``x`` of every rank, contiguous and of one shape, in their order."""
        if self.size == 1:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(out.unbind()), x, group=self.group)
        return out

    def least(self, value: int) -> int:
        """The smallest of the ranks' values. Waits for the device."""
        values = self.gather(torch.tensor([value], device=self._device()))
        return int(values.min())

    def of_first(self, value: int) -> int:
        """The value of rank 0. Waits for the device."""
        return int(self.gather(torch.tensor([value], device=self._device()))[0])

    def _device(self) -> torch.device:
        """Where the group exchanges tensors."""
        if self.group is None or dist.get_backend(self.group) == "gloo":
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


WHOLE = Shards()
"""One rank that holds everything."""
