"""A task before an engine: the chunks of all its prompts as one stream, or one whole answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Protocol

from focus_ray.errors import RequestRejected
from focus_ray.openai.answers import Answer, UsageCount
from focus_ray.openai.merging import merge
from focus_ray.openai.messages import Chunk, Submission
from focus_ray.openai.replies import Reply
from focus_ray.openai.tasks import Task

Chunks = AsyncGenerator[tuple[int, Chunk], None]


class Generates(Protocol):
    """The one thing that is asked of an engine here, wherever it runs."""

    def generate(self, submission: Submission) -> AsyncGenerator[Chunk, None]: ...


def chunks_of(task: Task, engine: Generates) -> Chunks:
    """Chunks of all prompts as they come, each with the number of its prompt.

    Closing the stream aborts what still runs.
    """
    return merge([engine.generate(each) for each in task.submissions])


async def whole_reply(task: Task, chunks: Chunks, count: UsageCount) -> Reply:
    """The body of an answer that is sent in one piece.

    Args:
        count: has been told of every chunk by the time that ``chunks`` ends.
    """
    answers = [Answer() for _ in range(len(task.submissions) * task.n)]
    async with aclosing(chunks):
        async for prompt_index, chunk in chunks:
            answers[prompt_index * task.n + chunk.index].take(chunk)
    return task.writer.whole(answers, count.usage())


@contextmanager
def in_client_words(task: Task) -> Iterator[None]:
    """Let a refusal name the field as this client does."""
    try:
        yield
    except RequestRejected as error:
        if (name := task.client_names.get(error.param or "")) is None:
            raise
        raise RequestRejected(str(error), name) from error
