"""What a step leaves behind for those who asked: alternatives of tokens, and traces.

Both are taken while the mirrors still show the blocks as they were before the step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from focus_ray.engine.outputs import DenoisingStep
from focus_ray.engine.plan import StepResult
from focus_ray.engine.slots import WANTS_TOP, BlocksAfter, Slots


def record_alternatives(slots: Slots, after: BlocksAfter, result: StepResult) -> None:
    """Keep the best alternatives of newly decoded and edited tokens."""
    if result.top_ids_MBK is None or result.top_logprobs_MBK is None:
        return
    num_top_M = slots.wants_M4[:, WANTS_TOP] - 1
    newly_MB = slots.newly_decoded(after) | slots.edited(after)
    for slot in np.flatnonzero((num_top_M > 0) & newly_MB.any(1)).tolist():
        sequence, start = slots.sequence(slot), int(slots.block_start_M[slot])
        for offset in np.flatnonzero(newly_MB[slot]).tolist():
            ids = result.top_ids_MBK[slot, offset, : num_top_M[slot]].tolist()
            values = result.top_logprobs_MBK[slot, offset, : num_top_M[slot]].tolist()
            sequence.top_logprobs[start + offset] = tuple(zip(ids, values, strict=True))


def record_trace(slots: Slots, after: BlocksAfter, result: StepResult) -> None:
    """Append the step to the trace of every sequence that took part in it."""
    trace = result.trace
    if trace is None:  # not asked for, or nobody took part
        return
    newly_MB, edited_MB = slots.newly_decoded(after), slots.edited(after)
    for slot in np.flatnonzero(after.took_part_M).tolist():
        newly_B, masked_B, edited_B = newly_MB[slot], ~slots.decoded_MB[slot], edited_MB[slot]
        retained_B, confidence_B = trace.retained_MB[slot], trace.confidences_MB[slot]
        start = int(slots.block_start_M[slot])
        leftover = _positions(trace.leftover_MB[slot], start - slots.block_length)
        deltas: tuple[float, ...] = ()
        if trace.deltas_MB is not None:
            deltas = tuple(trace.deltas_MB[slot, masked_B].tolist())
        slots.sequence(slot).trace.append(
            DenoisingStep(
                block_start=start,
                masked=_positions(masked_B, start),
                processed=leftover + _positions(trace.processed_MB[slot], start),
                retained=leftover + _positions(retained_B, start),
                positions=_positions(newly_B, start),
                token_ids=tuple(after.token_ids_MB[slot, newly_B].tolist()),
                confidences=tuple(confidence_B[newly_B].tolist()),
                edited=_positions(edited_B, start),
                edited_token_ids=tuple(after.token_ids_MB[slot, edited_B].tolist()),
                edited_confidences=tuple(confidence_B[edited_B].tolist()),
                masked_confidences=tuple(
                    float(confidence_B[offset]) if retained_B[offset] else None
                    for offset in np.flatnonzero(masked_B)
                ),
                importance_deltas=deltas,
            )
        )


def _positions(chosen_B: NDArray[np.bool_], start: int) -> tuple[int, ...]:
    return tuple((start + np.flatnonzero(chosen_B)).tolist())
