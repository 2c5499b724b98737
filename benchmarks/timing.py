"""How long a function takes on a device, and the most that the device can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20
"""More than the second-level cache of any GPU: written before each run, so that inputs are cold."""


@dataclass(frozen=True)
class Timer:
    """Median time of a function on a device.

    On a GPU a run starts with cold caches and is timed between events. A function that can be
    recorded into a CUDA graph is replayed from it, so that launching from Python does not count;
    one that asks the device for counts cannot be, and pays for that.

    Args:
        budget_s: how long a function is repeated for, once it is warm.
        most_runs: and how often at most.
    """

    device: torch.device
    budget_s: float = 0.1
    most_runs: int = 50

    def seconds(self, run: Callable[[], object], *, recordable: bool = True) -> float:
        """Median of one call."""
        run()  # compiles
        if self.device.type == "cpu":
            return statistics.median(self._repeat(run, _seconds_on_cpu))
        torch.cuda.synchronize(self.device)
        if recordable:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run = graph.replay
        flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        times = self._repeat(run, lambda once: _seconds_on_gpu(once, flushed))
        return statistics.median(times)

    def _repeat(
        self, run: Callable[[], object], measure: Callable[[Callable[[], object]], float]
    ) -> list[float]:
        first = measure(run)
        runs = min(self.most_runs, max(2, int(self.budget_s / max(first, 1e-9))))
        return [measure(run) for _ in range(runs)]


def _seconds_on_cpu(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _seconds_on_gpu(run: Callable[[], object], flushed: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()  # also keeps the GPU busy until the host has queued what follows
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best, measured like everything else."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float


def measure_ceilings(timer: Timer, copy_bytes: int, matmul_size: int) -> Ceilings:
    """A large copy, read and write counted, and a large square bfloat16 product."""
    device, n = timer.device, matmul_size
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    words, copied = source.view(torch.int64), target.view(torch.int64)
    copy_s = min(  # the copy engine's way, and a kernel's
        timer.seconds(lambda: target.copy_(source)),
        timer.seconds(lambda: torch.add(words, 1, out=copied)),
    )
    left, right = torch.randn(2, n, n, device=device).bfloat16()
    matmul_s = timer.seconds(lambda: left @ right)
    return Ceilings(2 * copy_bytes / copy_s, 2 * n**3 / matmul_s)
