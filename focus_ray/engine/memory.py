"""How many KV pages fit. Measured at start-up, not configured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from focus_ray.config import EngineConfig

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 1 << 30


def count_pages(
    config: EngineConfig,
    *,
    bytes_per_page: int,
    device: torch.device,
    rehearse: Callable[[], Iterable[Callable[[], None]]],
) -> int:
    """Pages of the pool.

    ``num_pages`` if given; else what ``kv_cache_memory_bytes`` holds; else 1 GiB on a CPU, and on a
    GPU what is left of ``gpu_memory_utilization`` after the model and its largest step.

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
        available = _free_gpu_bytes(config.gpu_memory_utilization, device, rehearse)
    else:
        available = CPU_KV_BYTES
    num_pages = available // bytes_per_page
    if num_pages < 1:
        raise ValueError(
            f"{available} bytes are left for the KV cache, one page "
            f"takes {bytes_per_page}; raise gpu_memory_utilization or kv_cache_memory_bytes, or "
            "lower max_num_batched_tokens or page_size"
        )
    return int(num_pages)


def _free_gpu_bytes(
    utilization: float,
    device: torch.device,
    rehearse: Callable[[], Iterable[Callable[[], None]]],
) -> int:
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
    activations += buffers
    del run  # and with it what it ran on
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    in_use = total - free
    available = int(total * utilization) - in_use - activations
    logger.info(
        "GPU memory: %.2f GiB in use, %.2f GiB for the largest step, %.2f GiB for KV pages",
        in_use / 2**30,
        activations / 2**30,
        available / 2**30,
    )
    return max(available, 0)
