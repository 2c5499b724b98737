"""One engine behind a client interface; every decision is the engine's.

Prompts become token ids here, not in the ingress: the engine's own tokenizer does it, so the two
can never disagree, the ingress needs no model files, and its event loop never tokenises.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from prometheus_client import Metric

from focus_ray.cluster.telemetry import GpuTelemetry
from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import EngineLoad, GenerationRequest, TokenDelta, TokenLogprob
from focus_ray.errors import RequestRejected
from focus_ray.serve.autoscaling import OCCUPANCY
from focus_ray.serve.gpu_metrics import gpu_families
from focus_ray.serve.messages import (
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
from focus_ray.serve.metrics import ReplicaMetrics
from focus_ray.serve.replica_load import ReplicaLoad

logger = logging.getLogger(__name__)

# About half of what one ingress passes on, which takes 0.5 ms of a core for each.
MAX_CHUNKS_PER_S = 1000.0
# JSON has no -inf; OpenAI writes this for tokens that cannot be.
MIN_LOGPROB = -9999.0


class TokenizerFace(Protocol):
    """The part of ``focus_ray.engine.tokenizer.Tokenizer`` that serving needs."""

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
    """The part of ``focus_ray.engine.async_engine.AsyncEngine`` that serving needs."""

    @property
    def tokenizer(self) -> TokenizerFace | None: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]: ...
    def load(self) -> EngineLoad: ...
    async def check_alive(self, timeout_s: float) -> None: ...
    def shutdown(self) -> None: ...


EngineFactory = Callable[[EngineConfig], EngineFace]


def start_engine(config: EngineConfig) -> EngineFace:
    """The real engine. Imported here: torch is loaded where the engine runs and nowhere else."""
    from focus_ray.engine.async_engine import AsyncEngine

    if config.tensor_parallel_size == 1:
        return AsyncEngine.start(config)
    from focus_ray.cluster.rank_actors import RayRanks

    return AsyncEngine.start(config, RayRanks(config))


class Replica:
    """An engine with text in and text out.

    Args:
        config: the engine's.
        model_name: label of the metrics.
        replica_name: label of the metrics; tells replicas of one deployment apart.
        engine_factory: loads the model and starts the engine's step thread.
        max_chunks_per_s: of all requests together, and each gets its share of it. So many requests
            that each of them has text in every step get it less often, several steps at once.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_name: str,
        replica_name: str = "0",
        engine_factory: EngineFactory = start_engine,
        max_chunks_per_s: float = MAX_CHUNKS_PER_S,
    ) -> None:
        self._engine = engine_factory(config)
        self._chunk_s = 1.0 / max_chunks_per_s
        self._num_streams = 0
        self._metrics = ReplicaMetrics(self._engine.load, model_name, replica_name)
        self._telemetry = GpuTelemetry(os.environ) if config.device != "cpu" else None

    async def generate(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """Chunks of all completions, interleaved; closing aborts the engine's request."""
        with self._metrics.count_refusal():
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
            if request.continued is not None:
                self._metrics.count_taken_over()
                logger.info(
                    "request %s goes on here, behind %d tokens",
                    request.request_id,
                    sum(map(len, request.continued.values())),
                )
            untold = set[int]()
            if submission.with_prompt_token_ids:
                untold = {index for index, sent in request.emitted_before.items() if not sent}
            async with aclosing(self._deltas(request)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is not None:
                        logger.debug(
                            "request %s, completion %d ended: %s, %s",
                            request.request_id,
                            delta.index,
                            delta.finish_reason,
                            delta.stats,
                        )
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

    def num_engines(self) -> int:
        """It is one."""
        return 1

    async def states(self) -> dict[str, int]:
        """It runs, as it answers."""
        return {"RUNNING": 1}

    async def metrics(self) -> list[Metric]:
        """This engine's metric families, and those of its GPUs."""
        families = self._metrics.collect()
        if self._telemetry is not None:
            readings = await asyncio.to_thread(self._telemetry.read)
            families += gpu_families(readings, *self._metrics.labels)
        return families

    def record_routing_stats(self) -> dict[str, float]:
        """This engine's load for routers; Ray Serve asks often and passes it on."""
        return ReplicaLoad.of(self._engine.load()).as_routing_stats()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve hands to the autoscaling policy."""
        return {OCCUPANCY: ReplicaLoad.of(self._engine.load()).occupancy}

    def shutdown(self) -> None:
        """Stop the engine."""
        self._engine.shutdown()

    async def _deltas(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """The engine's deltas, as often as this request's share of all chunks allows.

        What the engine decodes meanwhile is in the next delta.
        """
        observer = self._metrics.observer()
        clock = asyncio.get_running_loop().time
        self._num_streams += 1
        try:
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    next_s = clock() + self._num_streams * self._chunk_s
                    observer.take(delta)
                    yield delta
                    if delta.finish_reason is None:
                        await asyncio.sleep(max(0.0, next_s - clock()))
        finally:
            self._num_streams -= 1

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
