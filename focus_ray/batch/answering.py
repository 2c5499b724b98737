"""One line before an engine: whatever comes of it is a record, unless the engine itself is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from focus_ray.batch.lines import BatchRequest, custom_id_of, parse_line
from focus_ray.batch.records import Record, Source, error_record, result_record
from focus_ray.errors import EngineDead, EngineOverloaded
from focus_ray.openai.answers import UsageCount
from focus_ray.openai.error_kinds import ModelNotFound
from focus_ray.openai.protocol import ChatCompletionRequest
from focus_ray.openai.running import Chunks, Generates, chunks_of, in_client_words, whole_reply
from focus_ray.openai.tasks import Task, chat_task, completion_task

logger = logging.getLogger(__name__)

COUNTED = (
    *("prompt_tokens", "completion_tokens", "denoising_steps", "processed_tokens"),
    *("retained_tokens", "evicted_tokens", "decoded_tokens", "edited_tokens"),
)


async def record_of_line(
    raw: bytes,
    engine: Generates,
    *,
    key: str,
    source: Source,
    names: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
) -> Record:
    """What comes of a line of a job; arguments as for ``record_of`` and ``parse_line``."""
    try:
        request = parse_line(raw, str(source), defaults)
    except ValueError as error:  # RequestRejected is one
        return error_record(key, custom_id_of(raw) or str(source), error, source)
    return await record_of(request, engine, key=key, names=names, source=source)


async def record_of(
    request: BatchRequest,
    engine: Generates,
    *,
    key: str,
    names: Sequence[str],
    source: Source | None = None,
) -> Record:
    """Ask an engine, again and again while it has no place.

    Args:
        key: the work's own name, under which the engine knows it.
        names: by which requests may call the model; the first is the one for those that do not.
        source: told in the record, if it is given.

    Raises:
        EngineDead: the work is not done, and this engine will not do it.
    """
    try:
        if request.body.model not in (None, *names):
            raise ModelNotFound(str(request.body.model), tuple(names))
        task = _task(request, key, request.body.model or names[0])
        while True:
            try:
                return await _answered(task, engine, request.custom_id, key, source)
            except EngineOverloaded as error:
                await asyncio.sleep(error.retry_after_s)
    except EngineDead:
        raise
    except Exception as error:  # one line never stops the others
        if not isinstance(error, ValueError):
            logger.exception("request %s failed", request.custom_id)
        return error_record(key, request.custom_id, error, source)


async def _answered(
    task: Task, engine: Generates, custom_id: str, key: str, source: Source | None
) -> Record:
    count = UsageCount(len(task.submissions))
    with in_client_words(task):
        reply = await whole_reply(task, _counted(chunks_of(task, engine), count), count)
    usage = count.usage()
    counts = {name: int(getattr(usage, name)) for name in COUNTED}
    return result_record(key, custom_id, reply, counts, source)


async def _counted(chunks: Chunks, count: UsageCount) -> Chunks:
    async with aclosing(chunks):
        async for prompt_index, chunk in chunks:
            count.take(prompt_index, chunk)
            yield prompt_index, chunk


def _task(request: BatchRequest, key: str, model: str) -> Task:
    body = request.body
    if isinstance(body, ChatCompletionRequest):
        return chat_task(body, key, model, None)
    return completion_task(body, key, model, None)
