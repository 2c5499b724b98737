"""Counts of a step per sequence, as arrays: what ``DecodingCounts`` is the sum of.

N decoding slots, B block length, C counts in the order of the fields of ``DecodingCounts``.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from focus_ray.engine.outputs import DecodingCounts
from focus_ray.engine.plan import StepResult

COUNT_NAMES = tuple(field.name for field in fields(DecodingCounts))


def count_step(decoded_before_NB: NDArray[np.bool_], result: StepResult) -> NDArray[np.int64]:
    """``[N, C]``: what a step did for each sequence."""
    masked_NB = ~decoded_before_NB
    decodable_NB = result.decodable_NB
    if decodable_NB is None:
        decodable_NB = np.zeros_like(masked_NB)
    counted = {
        "denoising_steps": masked_NB.any(1, keepdims=True),
        "processed_tokens": result.processed_NB,
        "retained_tokens": result.retained_NB,
        "evicted_tokens": masked_NB & ~result.retained_NB,
        "decoded_tokens": masked_NB & result.decoded_NB,
        "decodable_tokens": decodable_NB,
        "recalled_tokens": decodable_NB & result.retained_NB,
    }
    return np.stack([counted[name].sum(1) for name in COUNT_NAMES], axis=1).astype(np.int64)


def as_counts(count_C: NDArray[np.int64]) -> DecodingCounts:
    """The same by name."""
    return DecodingCounts(**dict(zip(COUNT_NAMES, count_C.tolist(), strict=True)))
