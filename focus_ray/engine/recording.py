"""What a step leaves behind for those who asked: alternatives of tokens, and traces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from focus_ray.engine.outputs import DenoisingStep
from focus_ray.engine.plan import StepPlan, StepResult
from focus_ray.engine.slots import WANTS_TOP, Slots


def record_alternatives(slots: Slots, plan: StepPlan, result: StepResult) -> None:
    """Keep the best alternatives of newly decoded tokens; before the mirrors move on."""
    newly_NB = result.decoded_NB & ~slots.decoded_MB[plan.decode_slots_N]
    num_top_N = slots.wants_M4[plan.decode_slots_N, WANTS_TOP] - 1
    for row in np.flatnonzero((num_top_N > 0) & newly_NB.any(1)):
        assert result.top_ids_NBK is not None and result.top_logprobs_NBK is not None
        slot = plan.decode_slots_N[row]
        sequence, start = slots.sequence(slot), int(slots.block_start_M[slot])
        for offset in np.flatnonzero(newly_NB[row]).tolist():
            ids = result.top_ids_NBK[row, offset, : num_top_N[row]].tolist()
            values = result.top_logprobs_NBK[row, offset, : num_top_N[row]].tolist()
            sequence.top_logprobs[start + offset] = tuple(zip(ids, values, strict=True))


def record_trace(slots: Slots, plan: StepPlan, result: StepResult) -> None:
    """Append the step to the trace of every decoding sequence; before the mirrors move on."""
    for row, slot in enumerate(plan.decode_slots_N):
        decoded_B = slots.decoded_MB[slot]
        newly_B = result.decoded_NB[row] & ~decoded_B
        masked_B, retained_B = ~decoded_B, result.retained_NB[row]
        start = int(slots.block_start_M[slot])
        confidences = result.confidences_NB[row]
        deltas: tuple[float, ...] = ()
        if result.deltas_NB is not None:
            deltas = tuple(result.deltas_NB[row, masked_B].tolist())
        slots.sequence(slot).trace.append(
            DenoisingStep(
                block_start=start,
                masked=_positions(masked_B, start),
                processed=_positions(result.processed_NB[row], start),
                retained=_positions(retained_B, start),
                positions=_positions(newly_B, start),
                token_ids=tuple(result.token_ids_NB[row, newly_B].tolist()),
                confidences=tuple(confidences[newly_B].tolist()),
                masked_confidences=tuple(
                    float(confidences[offset]) if retained_B[offset] else None
                    for offset in np.flatnonzero(masked_B)
                ),
                importance_deltas=deltas,
            )
        )


def _positions(chosen_B: NDArray[np.bool_], start: int) -> tuple[int, ...]:
    return tuple((start + np.flatnonzero(chosen_B)).tolist())
