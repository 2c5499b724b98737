"""What an engine says about a request: deltas while it runs, a whole output at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from focus_ray.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class GenerationRequest:
    """A validated wish for ``params.n`` completions of one prompt.

    Args:
        request_id: unique among the requests that run; chosen by the caller.
        prompt_token_ids: at least one id of the vocabulary, never the mask id.
        prompt: the text the ids came from, kept for outputs; None for token-id prompts.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None


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
    """One denoising step of one sequence, as recorded under ``record_trace``.

    Positions are absolute and ascending; confidences are probabilities in [0, 1].
    """

    block_start: int
    num_masked_before: int
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    confidences: tuple[float, ...]


@dataclass(frozen=True)
class RequestStats:
    """Work and time one completion took. Times are seconds, counts are tokens or steps.

    ``processed_tokens`` entered layer 0 in decoding, ``retained_tokens`` of these the last layer;
    the others were evicted.
    """

    prompt_tokens: int = 0
    denoising_steps: int = 0
    processed_tokens: int = 0
    retained_tokens: int = 0
    decoded_tokens: int = 0
    committed_blocks: int = 0
    prefill_tokens: int = 0
    cached_prefix_tokens: int = 0
    preemptions: int = 0
    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class TokenDelta:
    """New final text of one completion of a request.

    ``text`` never changes once sent. The last delta of a completion carries ``finish_reason``,
    ``stats`` and, under ``record_trace``, ``trace``; it may carry no text.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stats: RequestStats | None = None
    trace: tuple[DenoisingStep, ...] | None = None


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


@dataclass(frozen=True)
class EngineLoad:
    """A snapshot of what an engine holds, for health, metrics and routing."""

    num_running: int
    num_waiting: int
    free_pages: int
    total_pages: int
    num_steps: int
    processed_tokens: int
    decoded_tokens: int
    prefill_tokens: int
    cached_prefix_tokens: int
    emitted_tokens: int
    prompt_tokens: int
    num_preemptions: int
    finished: dict[str, int]
    step_s: float

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages that running sequences hold, 0 to 1."""
        return 1.0 - self.free_pages / self.total_pages
