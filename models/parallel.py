"""Tensor parallelism: which part of the weights a rank holds, and what ranks tell each other.

A model is cut into as many shards as there are ranks; every rank runs the same step with its own.
Collective calls must be made by all ranks in the same order, and give all of them the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """What a rank holds of a dimension: ``[start, stop)`` of ``whole``."""

    start: int
    stop: int
    whole: int

    def __len__(self) -> int:
        return self.stop - self.start

    def times(self, unit: int) -> Part:
        """The same where each element takes ``unit`` places."""
        return Part(self.start * unit, self.stop * unit, self.whole * unit)


@dataclass(frozen=True)
class Shard:
    """What a rank holds of one stored weight.

    Args:
        tensor: the rank's own weight, or a view of it.
        dim: the dimension along which ranks divide the weight.
        sections: what the stored weight consists of along that dimension, one behind the other, and
            what the rank holds of each; ``tensor`` is made of these.
    """

    tensor: Tensor
    dim: int
    sections: tuple[Part, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Shard:
        """Of a weight that every rank holds."""
        return cls(tensor, 0, (Part(0, len(tensor), len(tensor)),))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the stored weight."""
        shape = list(self.tensor.shape)
        shape[self.dim] = sum(part.whole for part in self.sections)
        return tuple(shape)

    def pieces(self) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """Views that together are ``tensor``, each with its place in the stored weight."""
        views = self.tensor.split([len(part) for part in self.sections], self.dim)
        starts = accumulate((part.whole for part in self.sections), initial=0)
        for view, part, start in zip(views, self.sections, starts, strict=False):
            place = slice(start + part.start, start + part.stop)
            yield view, (*[slice(None)] * self.dim, place)


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

    def part(self, whole: int) -> Part:
        """This rank's even part of ``whole``; of fewer than ranks, neighbours hold the same one.

        One of the two numbers is a multiple of the other.
        """
        assert whole % self.size == 0 or self.size % whole == 0, f"{whole} among {self.size} ranks"
        start = self.rank * whole // self.size
        return Part(start, start + max(whole // self.size, 1), whole)

    def add_up(self, x: Tensor) -> Tensor:
        """``x`` itself, contiguous, in place now the sum over all ranks, the same bits on each."""
        if self.size > 1 and x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """``[size, ...]``: the ``x`` of every rank, contiguous and of one shape, in their order."""
        if self.size == 1:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
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
