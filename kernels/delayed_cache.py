"""The delayed cache: which tokens of a block a denoising step still has to process.

A decoded token's KV is final once it went through a pass in which its right neighbour was decoded
too; it then leaves the processing set (FOCUS, arXiv 2601.23278). Pure functions on arrays: N
sequences, B block length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def processing_set(uncached_NB: Tensor, warm_up_N: Tensor) -> Tensor:
    """The tokens a step takes up.

    The whole block in the first step after the block began, and, as a fallback, where nothing is
    uncached; otherwise the uncached tokens.

    Args:
        uncached_NB: bool, tokens whose KV is not final.
        warm_up_N: bool, the block had no denoising step yet.

    Returns:
        ``[N, B]`` bool, no row empty.
    """
    whole_N = warm_up_N | ~uncached_NB.any(1)
    return uncached_NB | whole_N[:, None]


def after_step(uncached_NB: Tensor, decoded_NB: Tensor) -> Tensor:
    """The tokens that stay uncached after a step.

    Args:
        uncached_NB: bool, before the step.
        decoded_NB: bool, what was decoded on *input* of the step.

    Returns:
        ``[N, B]`` bool: a token leaves when it and its right neighbour were decoded; the last
        position needs no neighbour.
    """
    right_decoded_NB = torch.ones_like(decoded_NB)
    right_decoded_NB[:, :-1] = decoded_NB[:, 1:]
    return uncached_NB & ~(decoded_NB & right_decoded_NB)
