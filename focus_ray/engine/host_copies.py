"""Results on their way from the device to the host."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 64
"""Values that are sooner copied once more than given memory of their own, which takes 70 us."""


@dataclass(frozen=True)
class HostCopy:
    """A copy that was queued; ``wait`` has it, once."""

    tensor: Tensor
    event: torch.cuda.Event | None


class HostCopies:
    """Starts copies, and knows how long the host has waited for them.

    Attributes:
        waited_s: seconds, in total.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []  # to be used again
        self._few: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}  # likewise
        self.waited_s = 0.0

    def start(self, tensor: Tensor) -> HostCopy:
        """Copy ``tensor`` as it is when the work queued so far is done."""
        if not self._is_cuda:
            return HostCopy(tensor.clone(), None)
        free = self._few.get((tensor.shape, tensor.dtype))
        if free:
            pinned = free.pop()
        else:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor, non_blocking=True)
        event = self._events.pop() if self._events else torch.cuda.Event()
        event.record()
        return HostCopy(pinned, event)

    def wait(self, copy: HostCopy) -> Tensor:
        """The values, on the CPU."""
        tensor, event = copy.tensor, copy.event
        if event is None:
            return tensor
        started = time.perf_counter()
        event.synchronize()
        self.waited_s += time.perf_counter() - started
        self._events.append(event)
        if tensor.numel() > FEW:
            return tensor
        values = tensor.clone()
        self._few.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        return values
