"""Tensor parallelism: which part of the weights a rank holds, and what ranks tell each other.

A model is cut into as many shards as there are ranks; every rank runs the same step with its own.
Collective calls must be made by all ranks in the same order, and give all of them the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")

PATIENCE = timedelta(hours=1)
"""How long a collective call may wait for a rank. Whoever drives the ranks sees sooner that one of
them is gone or hangs, and ends them; how long loading may take, nobody knows."""


class Group(Protocol):
    """The part of a process group of ``torch.distributed`` that is used here."""

    def allreduce(self, tensors: list[Tensor]) -> Any: ...
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Any: ...
    def abort(self) -> None: ...


class Meeting(Protocol):
    """Where ranks meet: a ``TCPStore`` of ``torch.distributed``."""

    @property
    def port(self) -> int: ...


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
        group: over which they exchange tensors; None: ``size`` is 1.
        device: where exchanged tensors lie.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = None
    device: torch.device = field(default=CPU)

    def part(self, whole: int) -> Part:
        """This rank's even part of ``whole``; of fewer than ranks, neighbours hold the same one.

        One of the two numbers is a multiple of the other.
        """
        assert whole % self.size == 0 or self.size % whole == 0, f"{whole} among {self.size} ranks"
        start = self.rank * whole // self.size
        return Part(start, start + max(whole // self.size, 1), whole)

    def add_up(self, x: Tensor) -> Tensor:
        """``x`` itself, contiguous, in place now the sum over all ranks, the same bits on each."""
        if self.group is not None and x.numel():  # gloo takes nothing that is empty
            self.group.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        """``[size, ...]``: the ``x`` of every rank, contiguous and of one shape, in their order."""
        if self.group is None:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
            self.group.allgather([list(out.unbind())], [x]).wait()
        return out

    def least(self, value: int) -> int:
        """The smallest of the ranks' values. Waits for the device."""
        return int(self._values(value).min())

    def of_first(self, value: int) -> int:
        """The value of rank 0. Waits for the device."""
        return int(self._values(value)[0])

    def abort(self) -> None:
        """Let go of a collective call in which another thread waits for a rank that is gone.

        gloo notices by itself: the sockets of a process that has ended are closed.
        """
        if self.device.type == "cuda" and self.group is not None:
            self.group.abort()

    def _values(self, value: int) -> Tensor:
        return self.gather(torch.tensor(value, device=self.device))


WHOLE = Shards()
"""One rank that holds everything."""


def open_meeting(host: str, size: int) -> Meeting:
    """Where ``size`` ranks meet, kept by this process; its ``port`` is what the others are told."""
    return _store(host, 0, size, is_master=True)


def find_meeting(host: str, port: int, size: int) -> Meeting:
    """The place that another process has opened."""
    return _store(host, port, size, is_master=False)


def _store(host: str, port: int, size: int, *, is_master: bool) -> Meeting:
    store: Meeting = dist.TCPStore(  # type: ignore[attr-defined]  # public, yet not in __all__
        host, port, size, is_master, PATIENCE, wait_for_workers=False
    )
    return store


def join(rank: int, size: int, *, meeting: Meeting, own_host: str, device: torch.device) -> Shards:
    """Meet the other ranks; returns when all are there. NCCL on GPUs, gloo on CPUs.

    The group belongs to nobody else: it is not the default one of ``torch.distributed``, which a
    program that embeds an engine may use itself.

    Args:
        rank: 0 to ``size - 1``.
        size: ranks.
        meeting: the same for all.
        own_host: under which the others reach this process.
        device: of the model.
    """
    store: Any = meeting
    group: Any  # neither class is known to have what it inherits from C++
    if device.type == "cuda":
        from torch.distributed.distributed_c10d import ProcessGroupNCCL

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = PATIENCE
        group = ProcessGroupNCCL(store, rank, size, nccl)
    else:
        from torch.distributed.distributed_c10d import ProcessGroupGloo

        gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # nothing else sets _devices
        gloo._timeout = PATIENCE
        gloo._devices = [ProcessGroupGloo.create_device(hostname=own_host)]
        group = ProcessGroupGloo(store, rank, size, gloo)
    return Shards(rank, size, group, device)
