"""What the host tells the device to do in one step, and what the device answers.

NumPy on the host side: M slots, B block length, C counts, K alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from focus_ray.sampling import SamplingParams


@dataclass(frozen=True)
class BlockSnapshot:
    """The current block of one sequence: ids (mask id where masked), what is decoded, its steps.

    ``post_steps`` are those that found no mask, under ``joint_threshold``.
    """

    token_ids_B: NDArray[np.int32]
    decoded_B: NDArray[np.bool_]
    logprobs_B: NDArray[np.float32]
    denoising_step: int
    post_steps: int = 0


@dataclass(frozen=True)
class SlotStart:
    """A sequence begins to decode in a slot, in the very step: all that the device keeps about it.

    Everything before its block is in the pages, or is prefilled in the same step.

    Args:
        block_start: absolute position of the block's first token.
        prompt_len: tokens.
        params: resolved sampling parameters.
        stop_token_ids: end the text; suppressed while fewer than ``params.min_tokens`` tokens can
            be out.
        forced_ids_B: what tokens of the block must become, the mask id where any may; None: any.
    """

    slot: int
    block: BlockSnapshot
    block_start: int
    prompt_len: int
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    forced_ids_B: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class PageUpdate:
    """Pages ``pages`` become entries ``first, first + 1, ...`` of a slot's page table."""

    slot: int
    first: int
    pages: list[int]


@dataclass(frozen=True)
class PrefillChunk:
    """Whole blocks of known tokens whose KV is to be computed.

    Args:
        start: absolute position of the first token, a multiple of the block length.
        token_ids: a multiple of the block length of them.
    """

    slot: int
    start: int
    token_ids: NDArray[np.int32]


@dataclass(frozen=True)
class StepPlan:
    """One forward pass: what changes before it, and what is prefilled in it.

    Which tokens of which blocks it decodes is the device's business: every active slot takes part,
    as long as the step's tokens fit.

    Args:
        stops: slots that no longer run, whatever the device thinks; taken before ``starts``.
        starts: slots that decode from this step on.
        num_top_logprobs: alternatives asked for by any decoding sequence; None for no logprobs.
        any_sampled, any_filtered, any_suppressed: whether a decoding sequence has a temperature
            above 0; a top-k, top-p or min-p; stop tokens that must not come yet.
        record_trace: whether the answer must say what each step did token by token.
        evicts: whether masked tokens may be left out; None: the runner decides.
    """

    stops: list[int] = field(default_factory=list)
    starts: list[SlotStart] = field(default_factory=list)
    page_updates: list[PageUpdate] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    num_top_logprobs: int | None = None
    any_sampled: bool = False
    any_filtered: bool = False
    any_suppressed: bool = False
    record_trace: bool = False
    evicts: bool | None = None

    @property
    def num_prefill_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.prefill)


@dataclass(frozen=True)
class StepTrace:
    """What one step did, by slot; rows of slots that took no part mean nothing.

    Positions are those of the block that was current before the step.

    Args:
        took_part_M: bool.
        processed_MB, retained_MB: bool, tokens that entered layer 0, and those past layer 1.
        leftover_MB: bool, tokens of the block before that were processed, and retained, too.
        confidences_MB: float32, probability of the token that each retained open position would
            take.
        deltas_MB: float32, change of importance of masked tokens; None where nothing was decided
            by it.
    """

    took_part_M: NDArray[np.bool_]
    processed_MB: NDArray[np.bool_]
    retained_MB: NDArray[np.bool_]
    leftover_MB: NDArray[np.bool_]
    confidences_MB: NDArray[np.float32]
    deltas_MB: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class StepResult:
    """All slots after the step. Rows of slots that nobody sits in mean nothing.

    A block whose last token the step decoded (under ``joint_threshold``: a block that settled) is
    closed: ``block_start_M`` has moved on by a block, the closed tokens stand in ``closed_ids_MB``,
    and the current block is all masked. The last block of a text is not closed: its slot turns
    inactive instead.

    Args:
        active_M: bool, false once the text is final: a stop id or the limit is behind its
            contiguous decoded tokens.
        block_start_M: int32.
        token_ids_MB: int32, mask id where still masked.
        decoded_MB: bool.
        logprobs_MB: float32, log probability at temperature 1 of tokens decoded in a step, or last
            edited in one.
        closed_ids_MB, closed_logprobs_MB: the same of the block before; valid only in the step
            that closed it.
        denoising_step_M: int32, steps of the current block so far.
        post_steps_M: int32, of these, under ``joint_threshold``, the ones that found no mask.
        counts_MC: int32, all that each sequence did since it took its slot, in the order of
            ``COUNTS`` of ``focus_ray.kernels.slot_words``.
        num_tokens: processed in the step, prefill and leftovers included; 0 where nobody ran.
        top_ids_MBK, top_logprobs_MBK: best alternatives at each position that was open and
            retained, when asked for; of the block before the step.
        trace: when asked for.
    """

    active_M: NDArray[np.bool_]
    block_start_M: NDArray[np.int32]
    token_ids_MB: NDArray[np.int32]
    decoded_MB: NDArray[np.bool_]
    logprobs_MB: NDArray[np.float32]
    closed_ids_MB: NDArray[np.int32]
    closed_logprobs_MB: NDArray[np.float32]
    denoising_step_M: NDArray[np.int32]
    post_steps_M: NDArray[np.int32]
    counts_MC: NDArray[np.int32]
    num_tokens: int
    top_ids_MBK: NDArray[np.int64] | None = None
    top_logprobs_MBK: NDArray[np.float32] | None = None
    trace: StepTrace | None = None
