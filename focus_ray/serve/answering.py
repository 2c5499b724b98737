"""The way of a generation request through the ingress, the same for chat and text completions.

A reply begins with the first chunk of the engine: whatever goes wrong before it becomes a status
code, whatever goes wrong after it becomes the last event of the stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from focus_ray.engine.outputs import DecodingCounts
from focus_ray.errors import FocusRayError, RequestRejected
from focus_ray.serve.client import EngineClient
from focus_ray.serve.http_errors import body_of, kind_of
from focus_ray.serve.messages import Chunk, Submission, TokenText
from focus_ray.serve.replies import FinishReason, PromptTokensDetails, Reply, Usage
from focus_ray.serve.request_record import RequestRecord, record_of
from focus_ray.serve.streams import EventStream, event, merge, unless_gone

logger = logging.getLogger(__name__)

Chunks = AsyncGenerator[tuple[int, Chunk], None]


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


@dataclass(frozen=True)
class Task:
    """A validated request: what to ask the engine, and how the client wants to hear of it."""

    submissions: tuple[Submission, ...]
    writer: Writer
    stream: bool
    with_usage: bool

    @property
    def n(self) -> int:
        return self.submissions[0].params.n


async def answer(
    request: Request, client: EngineClient, task: Task, client_names: dict[str, str]
) -> Response:
    """Run a task and reply to its request.

    Args:
        client_names: what this client calls fields that the engine may object to.

    Raises:
        FocusRayError: nothing has been sent yet.
        ClientDisconnect: nobody is left to reply to; the engine's work was aborted.
    """
    record, count = record_of(request), UsageCount(len(task.submissions))
    record.model = task.writer.model
    chunks = _noted(merge([client.generate(each) for each in task.submissions]), count, record)
    try:
        if task.stream:
            first = await unless_gone(request, anext(chunks))
            return EventStream(_events(first, chunks, count, task, record))
        return await unless_gone(request, _whole(chunks, count, task))
    except RequestRejected as error:
        if (name := client_names.get(error.param or "")) is None:
            raise
        raise RequestRejected(str(error), name) from error


async def _noted(chunks: Chunks, count: UsageCount, record: RequestRecord) -> Chunks:
    """The chunks, of which usage and record are told first."""
    async with aclosing(chunks):
        try:
            async for prompt_index, chunk in chunks:
                count.take(prompt_index, chunk)
                record.take(chunk, time.monotonic())
                yield prompt_index, chunk
        finally:
            usage = count.usage()
            record.prompt_tokens = usage.prompt_tokens or None  # an answer's end tells of them
            record.completion_tokens = usage.completion_tokens


async def _whole(chunks: Chunks, count: UsageCount, task: Task) -> Response:
    answers = [Answer() for _ in range(len(task.submissions) * task.n)]
    async with aclosing(chunks):
        async for prompt_index, chunk in chunks:
            answers[prompt_index * task.n + chunk.index].take(chunk)
    body = task.writer.whole(answers, count.usage()).to_json()
    return Response(body, media_type="application/json")


async def _events(
    first: tuple[int, Chunk], chunks: Chunks, count: UsageCount, task: Task, record: RequestRecord
) -> AsyncGenerator[str, None]:
    def tell(prompt_index: int, chunk: Chunk) -> str:
        replies = task.writer.events(prompt_index * task.n + chunk.index, chunk)
        return "".join(event(reply.to_json()) for reply in replies)

    async with aclosing(chunks):
        try:
            yield tell(*first)
            async for prompt_index, chunk in chunks:
                yield tell(prompt_index, chunk)
            if task.with_usage:
                yield event(task.writer.usage_event(count.usage()).to_json())
            yield event("[DONE]")
        except Exception as error:
            record.error = kind_of(error).code
            if not isinstance(error, FocusRayError):
                extra = {"request_id": record.request_id}
                logger.exception("failed while streaming", extra=extra)
            yield event(body_of(error).to_json())
