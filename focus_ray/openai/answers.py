"""Whole answers and their token counts, put together from the chunks of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from focus_ray.engine.outputs import DecodingCounts
from focus_ray.openai.messages import Chunk, TokenText
from focus_ray.openai.replies import FinishReason, PromptTokensDetails, Reply, Usage


@dataclass
class Answer:
    """One completion, put together from its chunks."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenText] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: tuple[int, ...] | None = None

    def take(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs or ())
        self.prompt_token_ids = self.prompt_token_ids or chunk.prompt_token_ids
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason


class UsageCount:
    """Token counts over all prompts of a request."""

    def __init__(self, num_prompts: int) -> None:
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens = [0] * num_prompts
        self._completion_tokens = 0
        self._counts = DecodingCounts()

    def take(self, prompt_index: int, chunk: Chunk) -> None:
        self._completion_tokens += len(chunk.token_ids)
        if (stats := chunk.stats) is not None:
            cached = max(self._cached_tokens[prompt_index], stats.cached_prefix_tokens)
            self._prompt_tokens[prompt_index] = stats.prompt_tokens
            self._cached_tokens[prompt_index] = min(cached, stats.prompt_tokens)
            self._counts += stats

    def usage(self) -> Usage:
        prompt_tokens = sum(self._prompt_tokens)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached_tokens)),
            denoising_steps=self._counts.denoising_steps,
            processed_tokens=self._counts.processed_tokens,
            retained_tokens=self._counts.retained_tokens,
            evicted_tokens=self._counts.evicted_tokens,
            decoded_tokens=self._counts.decoded_tokens,
            edited_tokens=self._counts.edited_tokens,
        )


class Writer(Protocol):
    """Writes the bodies of one reply, in one route's shape."""

    @property
    def model(self) -> str:
        """The name that the client asked for."""
        ...

    def events(self, choice: int, chunk: Chunk) -> Iterator[Reply]:
        """The events of a stream that tell of a chunk."""
        ...

    def usage_event(self, usage: Usage) -> Reply: ...

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Reply: ...
