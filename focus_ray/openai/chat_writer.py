"""Reply bodies of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from focus_ray.openai.answers import Answer
from focus_ray.openai.messages import Chunk, TokenText
from focus_ray.openai.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
    now,
)


class ChatWriter:
    """Writes one chat completion, whole or as chunks.

    Args:
        reply_id: ``id`` of the reply.
        model: name the client asked for.
        with_usage: the stream will end with usage, so earlier chunks carry ``usage: null``.
        with_token_ids: choices carry their token ids.
    """

    def __init__(self, reply_id: str, model: str, with_usage: bool, with_token_ids: bool) -> None:
        self._id = reply_id
        self.model = model
        self._created = now()
        self._with_usage = with_usage
        self._with_token_ids = with_token_ids
        self._begun: set[int] = set()

    def events(self, choice: int, chunk: Chunk) -> Iterator[ChatChunk]:
        """The role first, then content, then the finish reason by itself."""
        if choice not in self._begun:
            self._begun.add(choice)
            begin = self._chunk(choice, ChatDelta(role="assistant", content=""))
            if chunk.prompt_token_ids is not None:
                begin.prompt_token_ids = list(chunk.prompt_token_ids)
            yield begin
        if chunk.text or chunk.logprobs or (self._with_token_ids and chunk.token_ids):
            event = self._chunk(choice, ChatDelta(content=chunk.text))
            if chunk.logprobs is not None:
                event.choices[0].logprobs = _logprobs(chunk.logprobs)
            if self._with_token_ids:
                event.choices[0].token_ids = list(chunk.token_ids)
            yield event
        if chunk.finish_reason is not None:
            event = self._chunk(choice, ChatDelta())
            event.choices[0].finish_reason = chunk.finish_reason
            event.choices[0].stop_reason = chunk.stop_reason
            yield event

    def usage_event(self, usage: Usage) -> ChatChunk:
        """The last chunk: no choices, only counts."""
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self.model,
            choices=[],
            usage=usage,
        )

    def whole(self, answers: Sequence[Answer], usage: Usage) -> ChatCompletion:
        """The reply without streaming."""
        reply = ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self.model,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=usage,
        )
        if answers[0].prompt_token_ids is not None:
            reply.prompt_token_ids = list(answers[0].prompt_token_ids)
        return reply

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        choice = ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=answer.text, refusal=None),
            logprobs=_logprobs(answer.logprobs) if answer.logprobs else None,
            finish_reason=answer.finish_reason or "abort",
            stop_reason=answer.stop_reason,
        )
        if self._with_token_ids:
            choice.token_ids = answer.token_ids
        return choice

    def _chunk(self, choice: int, delta: ChatDelta) -> ChatChunk:
        chunk = ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self.model,
            choices=[ChatChunkChoice(index=choice, delta=delta, logprobs=None, finish_reason=None)],
        )
        if self._with_usage:
            chunk.usage = None  # set, and so written as null
        return chunk


def _logprobs(tokens: Sequence[TokenText]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token.text,
                logprob=token.logprob,
                bytes=list(token.raw),
                top_logprobs=[
                    TopLogprob(token=top.text, logprob=top.logprob, bytes=list(top.raw))
                    for top in token.top
                ],
            )
            for token in tokens
        ]
    )
