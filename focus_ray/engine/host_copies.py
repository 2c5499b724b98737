"""Results on their way from the device to the host."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HostCopy:
    """A copy that was queued; ``wait`` has it."""

    tensor: Tensor
    event: torch.cuda.Event | None


class HostCopies:
    """Starts copies, and knows how long the host has waited for them.

    Attributes:
        waited_s: seconds, in total.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.waited_s = 0.0

    def start(self, tensor: Tensor) -> HostCopy:
        """Copy ``tensor`` as it is when the work queued so far is done."""
        if not self._is_cuda:
            return HostCopy(tensor.clone(), None)
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return HostCopy(pinned, event)

    def wait(self, copy: HostCopy) -> Tensor:
        """The values, on the CPU."""
        if copy.event is not None:
            started = time.perf_counter()
            copy.event.synchronize()
            self.waited_s += time.perf_counter() - started
        return copy.tensor
