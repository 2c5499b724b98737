"""How many KV pages fit. Measured at start-up, not configured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from focus_ray.config import EngineConfig

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 1 << 30
OWN_BYTES = 1 << 30
"""CUDA, libraries and loaded kernels of one process, at most; 0.7 to 0.93 GiB on an H200."""
GRAPHS_BYTES = int(1.3 * (1 << 30))
"""Of recorded steps beside their activations, at most: 0.2 to 1.3 GiB on an H200. They are recorded
behind all else, in the part of the memory that ``gpu_memory_utilization`` leaves free."""


def count_pages(
    config: EngineConfig,
    *,
    bytes_per_page: int,
    device: torch.device,
    rehearse: Callable[[], Iterable[Callable[[], None]]],
) -> int:
    """Pages of the pool.

    ``num_pages`` if given; else what ``kv_cache_memory_bytes`` holds; else 1 GiB on a CPU, and on a
    GPU what is left of ``gpu_memory_utilization`` after the model and its largest step. That share
    is this engine's own, as in vLLM: what others have on the GPU does not count to it.

    Args:
        bytes_per_page: keys and values of all layers.
        rehearse: yields what runs the parts of a step, each as large as any will be, whose memory
            is held apart from each other's; called on a GPU only.

    Raises:
        ValueError: not one page fits.
    """
    if config.num_pages is not None:
        return config.num_pages
    if config.kv_cache_memory_bytes is not None:
        available = config.kv_cache_memory_bytes
    elif device.type == "cuda":
        activations = _step_bytes(device, rehearse)
        memory = GpuMemory.of(device, may_share=config.tensor_parallel_size == 1)
        available = memory.room_for_kv(
            config.gpu_memory_utilization, activations, has_graphs=not config.enforce_eager
        )
        logger.info("%s, %.2f GiB for the largest step", memory, activations / 2**30)
    else:
        available = CPU_KV_BYTES
    num_pages = available // bytes_per_page
    if num_pages < 1:
        raise ValueError(
            f"{available} bytes are left for the KV cache, one page "
            f"takes {bytes_per_page}; raise gpu_memory_utilization or kv_cache_memory_bytes, "
            "lower max_num_batched_tokens or page_size, or stop what else is on the GPU"
        )
    return int(num_pages)


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory as one process sees it, in bytes.

    Args:
        total: of the GPU.
        free: of it.
        reserved: by this process's tensors.
        may_share: others may be on the GPU. They are not beside a rank of several, whose libraries
            take more.
    """

    total: int
    free: int
    reserved: int
    may_share: bool = True

    @classmethod
    def of(cls, device: torch.device, *, may_share: bool) -> GpuMemory:
        """As it is now, without what the allocator only keeps."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free, torch.cuda.memory_reserved(device), may_share)

    @property
    def own(self) -> int:
        """What this process takes. Beside its tensors that can only be bounded where others may be:
        a GPU does not tell whose the rest is.
        """
        rest = self.total - self.free - self.reserved
        return self.reserved + (min(rest, OWN_BYTES) if self.may_share else rest)

    def room_for_kv(self, share: float, activations: int, *, has_graphs: bool) -> int:
        """What this process may still take for KV pages.

        Args:
            share: of the GPU that is this process's.
            activations: of its largest step.
            has_graphs: steps will be recorded, in memory that the share does not count.
        """
        outside = int(self.total * (1 - share))
        graphs = min(outside, activations + GRAPHS_BYTES) if has_graphs else 0
        room = min(int(self.total * share) - self.own, self.free - graphs)
        return max(0, room - activations)

    def __str__(self) -> str:
        free, own, total = (each / 2**30 for each in (self.free, self.own, self.total))
        return f"GPU memory: {total:.2f} GiB, {free:.2f} GiB free, {own:.2f} GiB this engine's"


def _step_bytes(device: torch.device, rehearse: Callable[[], Iterable[Callable[[], None]]]) -> int:
    """What the largest step takes beside the model."""
    torch.cuda.empty_cache()
    idle = torch.cuda.memory_allocated(device)
    activations = buffers = 0
    for run in rehearse():
        buffers = torch.cuda.memory_allocated(device) - idle
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        activations += torch.cuda.max_memory_allocated(device) - before
    return activations + buffers
