"""The way of a generation request through the ingress, the same for chat and text completions.

A reply begins with the first chunk of the engine: whatever goes wrong before it becomes a status
code, whatever goes wrong after it becomes the last event of the stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from focus_ray.errors import FocusRayError
from focus_ray.openai.answers import UsageCount
from focus_ray.openai.error_kinds import body_of, kind_of
from focus_ray.openai.messages import Chunk
from focus_ray.openai.running import Chunks, chunks_of, in_client_words, whole_reply
from focus_ray.openai.tasks import Task
from focus_ray.serve.client import EngineClient
from focus_ray.serve.request_record import RequestRecord, record_of
from focus_ray.serve.streams import EventStream, event, unless_gone

logger = logging.getLogger(__name__)


async def answer(request: Request, client: EngineClient, task: Task) -> Response:
    """Run a task and reply to its request.

    Raises:
        FocusRayError: nothing has been sent yet.
        ClientDisconnect: nobody is left to reply to; the engine's work was aborted.
    """
    record, count = record_of(request), UsageCount(len(task.submissions))
    record.model = task.writer.model
    chunks = _noted(chunks_of(task, client), count, record)
    with in_client_words(task):
        if task.stream:
            first = await unless_gone(request, anext(chunks))
            return EventStream(_events(first, chunks, count, task, record))
        reply = await unless_gone(request, whole_reply(task, chunks, count))
        return Response(reply.to_json(), media_type="application/json")


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
