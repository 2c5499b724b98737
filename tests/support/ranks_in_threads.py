"""Ranks as threads of one process: collective calls of tiny tensors without any process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from focus_ray.models.parallel import Shards

Result = TypeVar("Result")


class Done:
    """A collective call that is over."""

    def wait(self) -> None: ...


class ThreadGroup:
    """One rank's end of a group; what all have brought is exchanged at a barrier."""

    def __init__(self, rank: int, brought: list[Tensor | None], barrier: threading.Barrier) -> None:
        self._rank, self._brought, self._barrier = rank, brought, barrier

    def _all(self, own: Tensor) -> list[Tensor]:
        self._brought[self._rank] = own.clone()
        self._barrier.wait(10)
        found = [x for x in self._brought if x is not None]
        self._barrier.wait(10)
        return found

    def allreduce(self, tensors: list[Tensor]) -> Done:
        total, *others = self._all(tensors[0])
        tensors[0].copy_(sum(others, total))
        return Done()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Done:
        for out, found in zip(outputs[0], self._all(inputs[0]), strict=True):
            out.copy_(found)
        return Done()

    def abort(self) -> None:
        self._barrier.abort()


def on_ranks(size: int, action: Callable[[Shards], Result]) -> list[Result | BaseException]:
    """What ``action`` returns, or raises, on each of ``size`` ranks."""
    brought: list[Tensor | None] = [None] * size
    barrier = threading.Barrier(size)
    results: list[Result | BaseException] = [RuntimeError("did not end")] * size

    def run(rank: int) -> None:
        try:
            results[rank] = action(Shards(rank, size, ThreadGroup(rank, brought, barrier)))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results
