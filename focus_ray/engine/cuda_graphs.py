"""Parts of a step recorded as CUDA graphs, by their size. Elsewhere they simply run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """One graph to be: its key, its size, and what it records.

    ``body`` reads and writes static buffers only, and never waits for the device.
    """

    key: Hashable
    size: int
    body: Callable[[], object]


class CudaGraphs:
    """Graphs that share one pool of memory: none holds anything for longer than it runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, body: Callable[[], object]) -> None:
        """Replay what was recorded under ``key``; run the body itself where nothing was."""
        graph = self._graphs.get(key)
        if graph is None:
            body()
        else:
            graph.replay()

    def record(self, recordings: Iterable[Recording]) -> None:
        """Record each, the largest first: the smaller ones fit into the memory it took.

        A body runs once before it is recorded, which compiles the kernels it takes.
        """
        started = time.monotonic()
        ordered = sorted(recordings, key=lambda recording: -recording.size)
        for recording in tqdm(ordered, desc="Recording CUDA graphs", unit="graph", disable=None):
            recording.body()
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                recording.body()
            self._graphs[recording.key] = graph
        logger.info("%d CUDA graphs recorded in %.1f s", len(ordered), time.monotonic() - started)
