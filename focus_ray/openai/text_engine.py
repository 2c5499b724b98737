"""An engine with text in and text out; every decision is the engine's.

Prompts become token ids where the engine runs: its own tokenizer does it, so that the two can never
disagree, and nobody else needs the model's files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import EngineLoad, GenerationRequest, TokenDelta, TokenLogprob
from focus_ray.errors import RequestRejected
from focus_ray.openai.messages import (
    ChatPrompt,
    Chunk,
    Encoded,
    ModelInfo,
    Prompt,
    Submission,
    TextPrompt,
    TokenPrompt,
    TokenText,
)

# JSON has no -inf; OpenAI writes this for tokens that cannot be.
MIN_LOGPROB = -9999.0


class TokenizerFace(Protocol):
    """The part of ``focus_ray.engine.tokenizer.Tokenizer`` that is needed here."""

    @property
    def has_chat_template(self) -> bool: ...
    @property
    def max_chars_per_token(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]: ...


class EngineFace(Protocol):
    """The part of ``focus_ray.engine.async_engine.AsyncEngine`` that is needed here."""

    @property
    def tokenizer(self) -> TokenizerFace | None: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def generate(
        self, request: GenerationRequest, pause_s: Callable[[], float] = ...
    ) -> AsyncGenerator[TokenDelta, None]: ...
    def load(self) -> EngineLoad: ...
    async def check_alive(self, timeout_s: float) -> None: ...
    def shutdown(self) -> None: ...


EngineFactory = Callable[[EngineConfig], EngineFace]


class TextEngine:
    """What the API asks of an engine, by the engine itself.

    Args:
        engine: generates.
        deltas: how a request is handed to it; None: as it is.
    """

    def __init__(
        self,
        engine: EngineFace,
        deltas: Callable[[GenerationRequest], AsyncGenerator[TokenDelta, None]] | None = None,
    ) -> None:
        self._engine = engine
        self._deltas = deltas or engine.generate

    async def generate(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """Chunks of all completions, interleaved; closing aborts the engine's request."""
        prompt = submission.prompt
        self._refuse_hopeless(prompt)
        if submission.params.stop and self._engine.tokenizer is None:
            raise RequestRejected(
                "stop: this model has no tokenizer, so there is no text to stop at; "
                "use stop_token_ids",
                "stop",
            )
        prompt_token_ids = await asyncio.to_thread(self._encode, prompt)
        request = GenerationRequest(
            request_id=submission.request_id,
            prompt_token_ids=prompt_token_ids,
            params=submission.params,
            prompt=prompt.text if isinstance(prompt, TextPrompt) else None,
            continued=submission.continued,
        )
        untold = set[int]()
        if submission.with_prompt_token_ids:
            untold = {index for index, sent in request.emitted_before.items() if not sent}
        async with aclosing(self._deltas(request)) as deltas:
            async for delta in deltas:
                first = delta.index in untold
                untold.discard(delta.index)
                yield self._chunk(delta, prompt_token_ids if first else None)

    async def describe(self) -> ModelInfo:
        """What this engine serves."""
        tokenizer = self._engine.tokenizer
        return ModelInfo(
            max_model_len=self._engine.max_model_len,
            vocab_size=self._engine.vocab_size,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
        )

    async def encode(self, prompt: Prompt, with_texts: bool) -> Encoded:
        """Token ids of a prompt, and each token as text if wanted."""
        token_ids = await asyncio.to_thread(self._encode, prompt)
        if not with_texts:
            return Encoded(token_ids)
        texts = {token_id: self._token_text(token_id) for token_id in set(token_ids)}
        return Encoded(token_ids, tuple(texts[token_id] for token_id in token_ids))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        outside = next((i for i in token_ids if not 0 <= i < self._engine.vocab_size), None)
        if outside is not None:
            raise RequestRejected(
                f"tokens: id {outside} is outside the vocabulary of {self._engine.vocab_size}",
                "tokens",
            )
        tokenizer = self._need_tokenizer("tokens")
        return await asyncio.to_thread(tokenizer.decode, list(token_ids), skip_special_tokens=False)

    async def check_alive(self, timeout_s: float) -> None:
        """Raises EngineDead."""
        await self._engine.check_alive(timeout_s)

    def _refuse_hopeless(self, prompt: Prompt) -> None:
        """Refuse text that cannot fit the context before it costs seconds to find out by how much.

        Raises:
            RequestRejected: more messages than tokens, or more characters than those can hold.
        """
        context = self._engine.max_model_len
        match prompt:
            case TextPrompt(text):
                param, length = "prompt", len(text)
            case ChatPrompt(messages):
                param, length = "messages", sum(len(turn["content"]) for turn in messages)
                if len(messages) > context:
                    raise RequestRejected(
                        f"messages: {len(messages)} of them are more than the {context} tokens "
                        "that this model takes; send fewer",
                        param,
                    )
            case _:
                return
        tokenizer = self._need_tokenizer(param)
        if length > context * tokenizer.max_chars_per_token:
            raise RequestRejected(
                f"{param}: {length} characters are more than the {context} tokens that this model "
                "takes can hold; shorten them",
                param,
            )

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        match prompt:
            case TokenPrompt(token_ids):
                return token_ids
            case TextPrompt(text, add_special_tokens):
                tokenizer = self._need_tokenizer("prompt")
                return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
            case ChatPrompt(messages, add_generation_prompt, template_kwargs):
                tokenizer = self._need_tokenizer("messages")
                if not tokenizer.has_chat_template:
                    raise RequestRejected(
                        "messages: this model has no chat template; use /v1/completions", "messages"
                    )
                return tuple(
                    tokenizer.apply_chat_template(
                        list(messages),
                        add_generation_prompt=add_generation_prompt,
                        chat_template_kwargs=template_kwargs or None,
                    )
                )

    def _need_tokenizer(self, param: str) -> TokenizerFace:
        if self._engine.tokenizer is None:
            raise RequestRejected(
                f"{param}: this model has no tokenizer, so it takes and gives token ids only; "
                "send a list of token ids as prompt to /v1/completions, with return_token_ids",
                param,
            )
        return self._engine.tokenizer

    def _chunk(self, delta: TokenDelta, prompt_token_ids: tuple[int, ...] | None) -> Chunk:
        logprobs = delta.logprobs
        return Chunk(
            index=delta.index,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=None if logprobs is None else tuple(map(self._with_text, logprobs)),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            stats=delta.stats,
            prompt_token_ids=prompt_token_ids,
        )

    def _with_text(self, token: TokenLogprob) -> TokenText:
        top = tuple(self._token(token_id, logprob) for token_id, logprob in token.top)
        return replace(self._token(token.token_id, token.logprob), top=top)

    def _token(self, token_id: int, logprob: float) -> TokenText:
        text, tokenizer = self._token_text(token_id), self._engine.tokenizer
        raw = text.encode() if tokenizer is None else tokenizer.token_bytes(token_id)
        return TokenText(token_id, text, raw, max(logprob, MIN_LOGPROB))

    def _token_text(self, token_id: int) -> str:
        tokenizer = self._engine.tokenizer
        return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)
