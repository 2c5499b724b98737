"""Kernels that begin while the kernel before them still runs (programmatic dependent launch).

On Hopper and later a kernel launched with ``**overlap_options(device)`` may start as soon as every
program of the kernel before it has called ``let_next_begin``. Such a kernel calls
``wait_for_previous`` before it touches anything that an earlier kernel writes, or that an earlier
kernel may still read where it writes itself; its start runs in the shadow of the other. After the
wait all earlier kernels of the stream have ended and what they wrote is seen, provided that none of
them was launched this way without waiting.

Kernels take ``OVERLAP``, a constexpr, because the interpreter and older GPUs know none of this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from focus_ray.kernels.tuning import capability


def overlaps(device: torch.device) -> bool:
    """Whether kernels on ``device`` may begin before their predecessors have ended."""
    return capability(device) >= (9, 0)


def overlap_options(device: torch.device) -> dict[str, bool]:
    """What the launch of a kernel with ``OVERLAP`` is given: the constexpr and the attribute."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Until every earlier kernel has ended; at once where they do not overlap."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """The next kernel may start once all programs came here; no promise about what was written."""
    if OVERLAP:
        gdc_launch_dependents()
