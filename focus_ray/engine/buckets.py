"""To which sizes steps are padded, so that few CUDA graphs serve all of them. Pure.

A step of n tokens runs at the least bucket that holds it. Buckets are close enough that padding
costs a few per cent where time grows with tokens, and far enough apart where it does not: below
some 250 tokens a step takes as long as reading the weights.
"""

from __future__ import annotations

from bisect import bisect_left

# (up to so many tokens, apart by)
SPACING = ((32, 8), (128, 16), (512, 32), (4096, 64), (1 << 30, 256))


def token_buckets(most: int) -> list[int]:
    """Ascending sizes; the last one holds ``most`` tokens."""
    buckets: list[int] = []
    size = 0
    for end, apart in SPACING:
        while size < min(end, most):
            size += apart
            buckets.append(size)
    return buckets


def bucket_of(buckets: list[int], size: int) -> int:
    """The least bucket of at least ``size``."""
    return buckets[bisect_left(buckets, size)]
