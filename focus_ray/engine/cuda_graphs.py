"""Parts of a step recorded as CUDA graphs, by their size. Elsewhere they simply run."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

Cut = Callable[[], None]
"""Ends a graph and begins the next one, of the same part."""

Body = Callable[[Cut], object]
"""Reads and writes static buffers only, and never waits for the device; may cut itself."""


@dataclass(frozen=True)
class Recording:
    """One part to be recorded: its key, its size, and what it does."""

    key: Hashable
    size: int
    body: Body


class CudaGraphs:
    """Graphs that share one pool of memory: none holds anything for longer than its part runs.

    While parts are recorded, no other engine of the process may use the device.

    The host needs longer to launch a graph than the device to begin it, in proportion to its nodes.
    So a long part is cut: while the device runs the first, short graph, the host launches the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, list[torch.cuda.CUDAGraph]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, body: Body) -> None:
        """Replay what was recorded under ``key``; run the body itself where nothing was."""
        graphs = self._graphs.get(key)
        if graphs is None:
            body(_go_on)
            return
        for graph in graphs:
            graph.replay()

    def record(self, recordings: Iterable[Recording]) -> None:
        """Record each part, the largest first: the smaller ones fit into the memory it took.

        A body runs once before it is recorded, which compiles the kernels it takes.
        """
        started = time.monotonic()
        ordered = sorted(recordings, key=lambda recording: -recording.size)
        gc.collect()
        torch.cuda.empty_cache()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for recording in tqdm(ordered, desc="Recording CUDA graphs", disable=None):
                recording.body(_go_on)
                stream.synchronize()
                self._graphs[recording.key] = self._record(recording.body)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        logger.info("%d parts recorded in %.1f s", len(ordered), time.monotonic() - started)

    def _record(self, body: Body) -> list[torch.cuda.CUDAGraph]:
        """On the current stream, which is not the default one."""
        graphs: list[torch.cuda.CUDAGraph] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            # thread_local: NCCL's own thread asks for events meanwhile, which is no error of ours
            graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def cut() -> None:
            graphs[-1].capture_end()
            begin()

        begin()
        try:
            body(cut)
        except BaseException:
            with suppress(RuntimeError):  # of the two errors, the first one tells
                graphs[-1].capture_end()
            raise
        graphs[-1].capture_end()
        return graphs


def _go_on() -> None:
    """A cut where nothing is recorded."""
