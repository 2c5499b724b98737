"""What coming steps will process, predicted from what past ones did. NumPy and numbers only.

A token counts as processed where it went past layer 1: those that eviction leaves out cost one or
two layers of many. M slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from focus_ray.engine.outputs import COUNT_NAMES

FloatM = NDArray[np.float64]

STEPS, ENTERED, PROCESSED, DECODED = (
    COUNT_NAMES.index(name)
    for name in ("denoising_steps", "processed_tokens", "retained_tokens", "decoded_tokens")
)

PRIOR_STEPS = 4
"""What is known of others counts like so many steps of a sequence's own."""

OWN_STEPS = 32
"""Horizon of a sequence's own average: some blocks, for a step's work depends on where in its block
a sequence is."""

ENGINE_STEPS = 128
"""Horizon, in steps of the batch, of the average over all sequences."""


@dataclass(frozen=True)
class Pace:
    """What a sequence does in a step, on average; tokens.

    Args:
        entered: into layer 0.
        processed: of these, past layer 1.
        decoded: by the step.
    """

    entered: float
    processed: float
    decoded: float


class EnginePace:
    """The average over all sequences of an engine, in which later steps count for more.

    Before anything was seen, a sequence is taken to process its whole block for every token.
    """

    def __init__(self, block_length: int) -> None:
        self._sum_C = np.zeros(len(COUNT_NAMES))
        self._sum_C[STEPS] = self._sum_C[DECODED] = 1.0
        self._sum_C[[ENTERED, PROCESSED]] = block_length

    def take(self, counted_C: NDArray[np.int64]) -> None:
        """What a step did for all sequences together."""
        if counted_C[STEPS]:  # steps that only prefill say nothing
            self._sum_C *= 1.0 - 1.0 / ENGINE_STEPS
            self._sum_C += counted_C

    @property
    def now(self) -> Pace:
        each_C = self._sum_C / self._sum_C[STEPS]
        return Pace(float(each_C[ENTERED]), float(each_C[PROCESSED]), float(each_C[DECODED]))


class SlotPaces:
    """The average of the sequence in each slot; means something once it took part in a step."""

    def __init__(self, num_slots: int) -> None:
        self._processed_M: FloatM = np.zeros(num_slots)
        self._decoded_M: FloatM = np.zeros(num_slots)

    def take(self, counted_MC: NDArray[np.int64], num_steps_M: NDArray[np.int64]) -> None:
        """What a step did for each, of ``num_steps_M`` that each has taken part in so far."""
        took_part_M = counted_MC[:, STEPS] > 0
        for mean_M, column in ((self._processed_M, PROCESSED), (self._decoded_M, DECODED)):
            mean_M[took_part_M] = follow(mean_M, counted_MC[:, column], num_steps_M)[took_part_M]

    def predicted(self, num_steps_M: NDArray[np.int64], prior: Pace) -> tuple[FloatM, FloatM]:
        """Tokens that each will process and decode in a step.

        Args:
            num_steps_M: that each has taken part in.
            prior: what is known of all of them.
        """
        return (
            lean(self._processed_M, num_steps_M, prior.processed),
            lean(self._decoded_M, num_steps_M, prior.decoded),
        )


def follow(mean_M: FloatM, value_M: NDArray[np.int64], num_values_M: NDArray[np.int64]) -> FloatM:
    """Averages after one more value each, the latest of ``num_values_M``; later the old fade."""
    moved: FloatM = (value_M - mean_M) / np.clip(num_values_M, 1, OWN_STEPS)
    return mean_M + moved


def lean(mean_M: FloatM, num_values_M: NDArray[np.int64], prior: float) -> FloatM:
    """Averages of so many values each, with the prior among them ``PRIOR_STEPS`` times."""
    moved: FloatM = (prior - mean_M) * (PRIOR_STEPS / (num_values_M + PRIOR_STEPS))
    return mean_M + moved


def tokens_to_process(left_M: NDArray[np.int64], processed_M: FloatM, decoded_M: FloatM) -> float:
    """Of sequences that may still emit ``left_M`` tokens, to their ends: an upper bound.

    Args:
        processed_M, decoded_M: per step; who decodes nothing is taken to need a step a token.
    """
    per_decoded_M = processed_M / np.where(decoded_M > 0.0, decoded_M, 1.0)
    return float((left_M * per_decoded_M).sum())


def places_left(tokens_left: float, tokens_per_sequence: float, *, anybody_runs: bool) -> int:
    """Sequences that may be admitted now, as far as predicted tokens go.

    Args:
        tokens_left: of a step, up to the bound; negative where it is passed already.
        tokens_per_sequence: predicted of a new one.
        anybody_runs: if nobody does, one may always come, or nothing would ever run.
    """
    fitting = int(max(0.0, tokens_left) // tokens_per_sequence)
    return max(fitting, 0 if anybody_runs else 1)


@dataclass(frozen=True)
class Forecast:
    """What an engine will do next, in tokens; see ``EngineLoad``, which has the same fields."""

    next_step_tokens: float
    waiting_tokens: float
    remaining_tokens: float
    tokens_per_sequence: float
    retained_ratio: float
    decoded_per_step: float
