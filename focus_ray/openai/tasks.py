"""Validated requests as what is asked of an engine, and the shape of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from focus_ray.openai.answers import Writer
from focus_ray.openai.chat_writer import ChatWriter
from focus_ray.openai.completion_writer import CompletionWriter
from focus_ray.openai.messages import Submission
from focus_ray.openai.protocol import ChatCompletionRequest, CompletionRequest


@dataclass(frozen=True)
class Task:
    """A validated request: what to ask the engine, and how the client wants to hear of it.

    ``client_names``: what this client calls fields that the engine may object to.
    """

    submissions: tuple[Submission, ...]
    writer: Writer
    stream: bool
    with_usage: bool
    client_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.submissions[0].params.n


def chat_task(body: ChatCompletionRequest, key: str, model: str, session: str | None) -> Task:
    """What a conversation asks for.

    Args:
        key: tells this request from all others.
        model: the name by which the client asked for it.
        session: as ``Submission`` has it; the body's own fields come after it.

    Raises:
        RequestRejected: a parameter is out of range.
    """
    reply_id, with_ids = f"chatcmpl-{key}", bool(body.return_token_ids)
    submission = Submission(
        reply_id,
        body.chat_prompt(body.messages),
        body.to_params(),
        with_ids,
        session or body.prompt_cache_key or body.user or None,
    )
    writer = ChatWriter(reply_id, model, body.with_usage, with_ids)
    return Task((submission,), writer, bool(body.stream), body.with_usage, body.client_names())


def completion_task(body: CompletionRequest, key: str, model: str, session: str | None) -> Task:
    """What is asked of each of the prompts of a completion; arguments as for ``chat_task``."""
    reply_id, with_ids = f"cmpl-{key}", bool(body.return_token_ids)
    params = body.to_params()
    session = session or body.user or None
    submissions = tuple(
        Submission(f"{reply_id}-{number}", prompt, params, with_ids, session)
        for number, prompt in enumerate(body.prompts())
    )
    writer = CompletionWriter(reply_id, model, body.with_usage, with_ids)
    return Task(submissions, writer, bool(body.stream), body.with_usage)
