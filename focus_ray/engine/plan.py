"""What the host tells the device to do in one step, and what the device answers.

NumPy on the host side: N decoding slots, B block length, P prefill blocks, K alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from focus_ray.sampling import SamplingParams


@dataclass(frozen=True)
class BlockSnapshot:
    """The current block of one sequence: ids (mask id where masked), what is decoded, its step."""

    token_ids_B: NDArray[np.int32]
    decoded_B: NDArray[np.bool_]
    logprobs_B: NDArray[np.float32]
    denoising_step: int


@dataclass(frozen=True)
class SlotStart:
    """A sequence takes a slot: everything the device keeps about it.

    Args:
        block_start: absolute position of the block's first token.
        prompt_len: tokens.
        params: resolved sampling parameters.
        stop_token_ids: suppressed while fewer than ``params.min_tokens`` tokens can be out.
    """

    slot: int
    block: BlockSnapshot
    block_start: int
    prompt_len: int
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]


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
    """One forward pass: who decodes, who prefills, and what changed since the last one.

    Args:
        decode_slots_N: int64, slots whose current block takes a denoising or commit step.
        max_kv_len: most KV positions any token of the step sees.
        num_top_logprobs: alternatives asked for by any decoding sequence; None for no logprobs.
        any_sampled, any_filtered, any_suppressed: whether a decoding sequence has a temperature
            above 0; a top-k, top-p or min-p; stop tokens that must not come yet.
        record_deltas: whether changes of importance are to be reported.
    """

    starts: list[SlotStart] = field(default_factory=list)
    page_updates: list[PageUpdate] = field(default_factory=list)
    decode_slots_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    prefill: list[PrefillChunk] = field(default_factory=list)
    max_kv_len: int = 0
    num_top_logprobs: int | None = None
    any_sampled: bool = False
    any_filtered: bool = False
    any_suppressed: bool = False
    record_deltas: bool = False

    @property
    def num_prefill_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.prefill)

    def is_empty(self) -> bool:
        return not self.prefill and not len(self.decode_slots_N)


@dataclass(frozen=True)
class StepResult:
    """The blocks of the decoding slots after the step.

    A block whose input was wholly decoded was committed: its row here still holds the committed
    tokens, all decoded.

    Args:
        token_ids_NB: int32, mask id where still masked.
        decoded_NB: bool.
        confidences_NB: float32, probability under which a token newly decoded was chosen.
        logprobs_NB: float32, log probability of a token newly decoded at temperature 1.
        processed_NB, retained_NB: bool, tokens that entered layer 0, and those past layer 1.
        top_ids_NBK, top_logprobs_NBK: best alternatives at each masked position, when asked for.
        deltas_NB: float32, change of importance of masked tokens; only for traces, and only where
            it decided.
        decodable_NB: bool, what the step would have decoded without eviction; only when diagnosed.
    """

    token_ids_NB: NDArray[np.int32]
    decoded_NB: NDArray[np.bool_]
    confidences_NB: NDArray[np.float32]
    logprobs_NB: NDArray[np.float32]
    processed_NB: NDArray[np.bool_]
    retained_NB: NDArray[np.bool_]
    top_ids_NBK: NDArray[np.int64] | None = None
    top_logprobs_NBK: NDArray[np.float32] | None = None
    deltas_NB: NDArray[np.float32] | None = None
    decodable_NB: NDArray[np.bool_] | None = None
