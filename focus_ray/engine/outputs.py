"""What an engine says about a request: deltas while it runs, a whole output at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focus_ray.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class GenerationRequest:
    """A validated wish for ``params.n`` completions of one prompt.

    Args:
        request_id: unique among the requests that run; chosen by the caller.
        prompt_token_ids: at least one id of the vocabulary, never the mask id.
        prompt: the text the ids came from, kept for outputs; None for token-id prompts.
        continued: of a request that another engine did not finish, the ids of the tokens that each
            completion had emitted there, by its index; those that had ended are left out. What
            these ids stand for is not emitted again. None: every completion begins here.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None
    continued: Mapping[int, tuple[int, ...]] | None = None

    @property
    def emitted_before(self) -> Mapping[int, tuple[int, ...]]:
        """Every completion that is to run, by its index, with what it has emitted already."""
        return dict.fromkeys(range(self.params.n), ()) if self.continued is None else self.continued


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of an emitted token under the unscaled softmax (temperature 1).

    ``top`` holds ``(token_id, logprob)`` of the best alternatives, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class DenoisingStep:
    """One step of one sequence's block, as recorded under ``record_trace``.

    Positions are absolute and ascending; confidences are probabilities in [0, 1].

    Args:
        block_start: of the block that the step decodes from.
        masked: masked before the step.
        processed: entered layer 0. Positions left of the block are tokens of the block before that
            ride along: their KV was not final yet, and is after this step.
        retained: of these, went past layer 1; decoded tokens of the processing set always do.
        positions, token_ids, confidences: what was decoded in the step.
        edited, edited_token_ids, edited_confidences: what was decoded before and replaced in it.
        masked_confidences: of each masked position; None where it was evicted.
        importance_deltas: of each masked position; empty where nothing was decided by importance.
    """

    block_start: int
    masked: tuple[int, ...]
    processed: tuple[int, ...]
    retained: tuple[int, ...]
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    edited: tuple[int, ...] = ()
    edited_token_ids: tuple[int, ...] = ()
    edited_confidences: tuple[float, ...] = ()
    masked_confidences: tuple[float | None, ...] = ()
    importance_deltas: tuple[float, ...] = ()

    @property
    def leftover(self) -> tuple[int, ...]:
        """Tokens of the block before whose KV the step makes final."""
        return tuple(position for position in self.processed if position < self.block_start)


@dataclass(frozen=True, kw_only=True)
class DecodingCounts:
    """What decoding computed, in tokens; prefill is not in it.

    Args:
        denoising_steps: steps that a sequence took part in.
        processed_tokens: entered layer 0, the leftovers of closed blocks included.
        retained_tokens: went past layer 1, these included.
        evicted_tokens: masked tokens that a step left out, after layer 1 or before layer 0.
        edited_tokens: decoded tokens that a step replaced, under ``joint_threshold``.
        decodable_tokens: in diagnosed steps, what would have been decoded without eviction.
        recalled_tokens: of these, the retained ones.
    """

    denoising_steps: int = 0
    processed_tokens: int = 0
    retained_tokens: int = 0
    evicted_tokens: int = 0
    decoded_tokens: int = 0
    edited_tokens: int = 0
    decodable_tokens: int = 0
    recalled_tokens: int = 0

    @classmethod
    def from_array(cls, count_C: NDArray[np.integer]) -> DecodingCounts:
        """Counts in the order of the fields, which is the device's, by name."""
        return cls(**dict(zip(COUNT_NAMES, count_C.tolist(), strict=True)))

    def __add__(self, other: DecodingCounts) -> DecodingCounts:
        return DecodingCounts(
            **{name: getattr(self, name) + getattr(other, name) for name in COUNT_NAMES}
        )

    @property
    def tokens_per_step(self) -> float:
        """Tokens decoded per sequence and denoising step; 0 without steps."""
        return self.decoded_tokens / self.denoising_steps if self.denoising_steps else 0.0

    @property
    def eviction_recall(self) -> float | None:
        """Share of the decodable tokens that were retained; None where no step was diagnosed."""
        return self.recalled_tokens / self.decodable_tokens if self.decodable_tokens else None


COUNT_NAMES = tuple(f.name for f in fields(DecodingCounts))


@dataclass(frozen=True, kw_only=True)
class RequestStats(DecodingCounts):
    """Work and time one completion took. Times are seconds, counts are tokens or steps."""

    prompt_tokens: int = 0
    committed_blocks: int = 0
    prefill_tokens: int = 0
    cached_prefix_tokens: int = 0
    preemptions: int = 0
    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


class TokenDelta(NamedTuple):
    """New final text of one completion of a request.

    A tuple, since hundreds are made in a step: 0.2 us instead of the 0.9 us of a frozen dataclass.

    ``text`` never changes once sent. The last delta of a completion carries ``finish_reason``,
    ``stats`` and, under ``record_trace``, ``trace``; it may carry no text.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # in place of the tuple's method
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stats: RequestStats | None = None
    trace: tuple[DenoisingStep, ...] | None = None


def joined(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Consecutive deltas of one completion as one; at least one of them."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    told = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return last._replace(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(told)) if told else None,
    )


@dataclass
class CompletionOutput:
    """One completion, as in vLLM."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stats: RequestStats = RequestStats()
    trace: tuple[DenoisingStep, ...] | None = None

    def append(self, delta: TokenDelta) -> None:
        """Take up the next delta of this completion."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + list(delta.logprobs)
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
            self.stats = delta.stats or self.stats
            self.trace = delta.trace


@dataclass
class RequestOutput:
    """All completions of one prompt, as in vLLM, plus ``stats``."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def stats(self) -> RequestStats:
        """Stats of the first completion."""
        return self.outputs[0].stats


@dataclass(frozen=True, kw_only=True)
class EngineLoad(DecodingCounts):
    """A snapshot of what an engine holds and has done, for health, metrics and routing.

    ``num_steps`` are passes of the whole batch; ``denoising_steps`` are summed over sequences.
    ``step_s`` is the time of a step lately; ``host_s`` is what all steps so far took, less the time
    in which the host waited for the device.

    The rest are predictions from averages of late, in tokens that steps process, of which those
    that eviction leaves out are none:

    Args:
        epoch: grows with every snapshot of one engine.
        page_size: tokens of a page.
        saturation_tokens: of a step, from which on larger steps are hardly faster.
        next_step_tokens: of the next step, by the sequences that run.
        waiting_tokens: what a step would have besides, did those run that wait; their prefill too.
        remaining_tokens: what all have still to process if each emits all it may.
        tokens_per_sequence: what a sequence adds to a step.
        retained_ratio: share of the tokens that entered steps, 0 to 1.
        decoded_per_step: tokens that a step decodes of a sequence.
    """

    num_running: int
    num_waiting: int
    free_pages: int
    total_pages: int
    num_steps: int
    prefill_tokens: int
    cached_prefix_tokens: int
    emitted_tokens: int
    prompt_tokens: int
    num_preemptions: int
    finished: dict[str, int]
    step_s: float
    host_s: float = 0.0
    epoch: int = 0
    page_size: int = 1
    saturation_tokens: int = 1
    next_step_tokens: float = 0.0
    waiting_tokens: float = 0.0
    remaining_tokens: float = 0.0
    tokens_per_sequence: float = 0.0
    retained_ratio: float = 1.0
    decoded_per_step: float = 0.0

    @property
    def host_s_per_step(self) -> float:
        """Time of the host's own work, per step; 0 without steps."""
        return self.host_s / self.num_steps if self.num_steps else 0.0

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages that running sequences hold, 0 to 1."""
        return 1.0 - self.free_pages / self.total_pages
