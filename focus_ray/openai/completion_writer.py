"""Reply bodies of ``/v1/completions``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from focus_ray.openai.answers import Answer
from focus_ray.openai.messages import Chunk, TokenText
from focus_ray.openai.replies import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Usage,
    now,
)


class CompletionWriter:
    """Writes one reply to a completion request, whole or as chunks.

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
        self._text_len: Counter[int] = Counter()

    def events(self, choice: int, chunk: Chunk) -> Iterator[Completion]:
        """One event per chunk; none for a chunk that says nothing."""
        says_ids = self._with_token_ids and (chunk.token_ids or chunk.prompt_token_ids)
        if not (chunk.text or chunk.logprobs or chunk.finish_reason or says_ids):
            return
        part = CompletionChoice(
            index=choice,
            text=chunk.text,
            logprobs=self._logprobs(choice, chunk.logprobs),
            finish_reason=chunk.finish_reason,
            stop_reason=chunk.stop_reason,
        )
        self._add_ids(part, chunk.token_ids, chunk.prompt_token_ids)
        event = self._reply([part])
        if self._with_usage:
            event.usage = None  # set, and so written as null
        yield event

    def usage_event(self, usage: Usage) -> Completion:
        """The last event: no choices, only counts."""
        reply = self._reply([])
        reply.usage = usage
        return reply

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Completion:
        """The reply without streaming."""
        reply = self._reply([self._choice(index, answer) for index, answer in enumerate(answers)])
        reply.usage = usage
        return reply

    def _choice(self, index: int, answer: Answer) -> CompletionChoice:
        reason: FinishReason = answer.finish_reason or "abort"
        choice = CompletionChoice(
            index=index,
            text=answer.text,
            logprobs=self._logprobs(index, answer.logprobs or None),
            finish_reason=reason,
            stop_reason=answer.stop_reason,
        )
        self._add_ids(choice, answer.token_ids, answer.prompt_token_ids)
        return choice

    def _add_ids(
        self,
        choice: CompletionChoice,
        token_ids: Sequence[int],
        prompt_token_ids: Sequence[int] | None,
    ) -> None:
        if self._with_token_ids:
            choice.token_ids = list(token_ids)
            if prompt_token_ids is not None:
                choice.prompt_token_ids = list(prompt_token_ids)

    def _logprobs(
        self, choice: int, tokens: Sequence[TokenText] | None
    ) -> CompletionLogprobs | None:
        if tokens is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._text_len[choice])
            self._text_len[choice] += len(token.text)
        return CompletionLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            # With the emitted token, as OpenAI does: up to one more than was asked for.
            top_logprobs=[
                {top.text: top.logprob for top in token.top} | {token.text: token.logprob}
                for token in tokens
            ],
            text_offset=offsets,
        )

    def _reply(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self.model,
            choices=choices,
        )
