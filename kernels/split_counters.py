"""Counters that the programs of a launch share, so that the last of them knows that it is the last.

They count the splits of each tile that are done; of a mixture, the pairs of each expert that are
placed, and the programs that placed them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX_COUNTED_TILES = 4096
"""Tiles of one launch whose splits are counted, or experts, and their programs."""


@cache
def finished_counters(device: torch.device) -> Tensor:
    """What is counted so far: all 0 between launches, which leave them so.

    One set per device, for kernels of one stream follow one another.

    Raises:
        RuntimeError: a CUDA graph is being recorded, and they were never asked for before.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the counters of shared tiles do not exist yet: run such a kernel on {device} once "
            "before recording a graph of it"
        )
    return torch.zeros(MAX_COUNTED_TILES, dtype=torch.int32, device=device)
