"""The offline face: prompts in, finished outputs out, in one process."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from focus_ray.config import DEFAULT_MODEL, EngineConfig
from focus_ray.engine.interrupts import between_steps
from focus_ray.engine.outputs import (
    CompletionOutput,
    EngineLoad,
    GenerationRequest,
    RequestOutput,
    TokenDelta,
)
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.errors import EngineOverloaded, RequestRejected
from focus_ray.sampling import SamplingParams

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None


class SyncEngine(Protocol):
    """The part of ``focus_ray.engine.engine.Engine`` that is used here."""

    tokenizer: Tokenizer | None

    @property
    def default_params(self) -> SamplingParams: ...
    def validate(self, request: GenerationRequest) -> None: ...
    def add(self, request: GenerationRequest) -> None: ...
    def abort(self, request_id: str) -> object: ...
    def has_unfinished(self) -> bool: ...
    def step(self) -> list[TokenDelta]: ...
    def load(self) -> EngineLoad: ...
    def close(self) -> None: ...


class LLM:
    """A model that generates in this process. One thread at a time.

    Args:
        model: bundled name, local directory in Hugging Face layout, or hub id.
        engine_factory: makes the engine; None takes the real one.
        config: the further fields of ``EngineConfig``.

    Raises:
        pydantic.ValidationError: a keyword is no field of ``EngineConfig``, or has a wrong value.
        CheckpointError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        engine_factory: Callable[[EngineConfig], SyncEngine] | None = None,
        **config: Any,
    ) -> None:
        self.config = EngineConfig(model=model, **config)
        self._open_engine: SyncEngine | None = (engine_factory or _real_engine)(self.config)
        self._request_numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt.

        Args:
            prompts: one text, one list of token ids, or a list of these.
            sampling_params: one for all, or one per prompt; None takes the checkpoint's defaults.
            use_tqdm: show a progress bar.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            RequestRejected: a prompt cannot be served; its index is named, and nothing has run.
        """
        return self._run(self._requests(_as_prompts(prompts), sampling_params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer each conversation through the model's chat template.

        Args:
            messages: one conversation, or a list of conversations.
            sampling_params: one for all, or one per conversation; None takes the defaults.
            chat_template_kwargs: further variables of the template, as ``enable_thinking``.
            use_tqdm: show a progress bar.

        Raises:
            RequestRejected: as ``generate``, or the template refuses a conversation.
        """
        conversations = _as_conversations(messages)
        tokenizer = self._need_tokenizer("messages")
        prompts = []
        for i, conversation in enumerate(conversations):
            with _about("conversation", i):
                chat = tokenizer.render_chat(
                    conversation, chat_template_kwargs=chat_template_kwargs
                )
            prompts.append((chat.text, chat.token_ids))
        return self._run(self._requests(prompts, sampling_params), use_tqdm)

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if its folder holds none."""
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request gets that says nothing."""
        return self._engine.default_params

    def load(self) -> EngineLoad:
        """What the engine holds and has done so far."""
        return self._engine.load()

    def close(self) -> None:
        """Let go of the model and its memory; the object is of no use afterwards."""
        engine, self._open_engine = self._open_engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _engine(self) -> SyncEngine:
        if self._open_engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._open_engine

    def _need_tokenizer(self, param: str) -> Tokenizer:
        if (tokenizer := self._engine.tokenizer) is None:
            raise RequestRejected(
                f"model {self.config.model!r} has no tokenizer; pass token ids to generate", param
            )
        return tokenizer

    def _requests(
        self, prompts: Sequence[tuple[str | None, Sequence[int] | None]], sampling_params: Params
    ) -> list[GenerationRequest]:
        """Requests that the engine will take, all checked before any of them runs."""
        requests = []
        each_params = self._params_of_each(sampling_params, len(prompts))
        for i, ((text, token_ids), params) in enumerate(zip(prompts, each_params, strict=True)):
            with _about("prompt", i):
                if token_ids is None:
                    token_ids = self._need_tokenizer("prompt").encode(text or "")
                request = GenerationRequest(
                    request_id=f"llm-{next(self._request_numbers)}",
                    prompt_token_ids=tuple(token_ids),
                    params=params,
                    prompt=text,
                )
                self._engine.validate(request)
            requests.append(request)
        return requests

    def _params_of_each(
        self, sampling_params: Params, num_prompts: int
    ) -> Sequence[SamplingParams]:
        if sampling_params is None:
            sampling_params = self._engine.default_params
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        if len(sampling_params) != num_prompts:
            raise RequestRejected(
                f"sampling_params has {len(sampling_params)} entries for {num_prompts} prompts; "
                "pass one for all, or one per prompt",
                param="sampling_params",
            )
        return sampling_params

    def _run(self, requests: Sequence[GenerationRequest], use_tqdm: bool) -> list[RequestOutput]:
        outputs = {request.request_id: _empty_output(request) for request in requests}
        progress = _Progress(len(requests), enabled=use_tqdm)
        waiting = deque(requests)
        running: set[str] = set()
        try:
            with between_steps() as take_interrupt:
                while waiting or running:
                    self._feed(waiting, running)
                    deltas = self._engine.step()
                    for delta in deltas:
                        output = outputs[delta.request_id]
                        output.outputs[delta.index].append(delta)
                        if output.finished:
                            running.discard(delta.request_id)
                    progress.show(len(requests) - len(waiting) - len(running), deltas)
                    take_interrupt()
        finally:
            for request_id in running:  # none are left unless something was raised
                self._engine.abort(request_id)
            progress.close()
        return list(outputs.values())

    def _feed(self, waiting: deque[GenerationRequest], running: set[str]) -> None:
        """Hand requests over for as long as the engine takes them."""
        while waiting:
            try:
                self._engine.add(waiting[0])
            except EngineOverloaded:
                if not running:  # an empty engine refuses it: it will not fit later either
                    raise
                return
            running.add(waiting.popleft().request_id)


class _Progress:
    """A bar that counts finished prompts and shows tokens per second."""

    def __init__(self, num_requests: int, enabled: bool) -> None:
        self._bar = tqdm(total=num_requests, desc="generating", unit="prompt", disable=not enabled)
        self._started = time.perf_counter()
        self._num_tokens = 0

    def show(self, num_finished: int, deltas: Iterable[TokenDelta]) -> None:
        self._num_tokens += sum(len(delta.token_ids) for delta in deltas)
        rate = self._num_tokens / max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(num_finished - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _real_engine(config: EngineConfig) -> SyncEngine:
    from focus_ray.engine.engine import Engine  # here: it brings torch and the models

    return Engine(config)


def _empty_output(request: GenerationRequest) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[CompletionOutput(index) for index in range(request.params.n)],
    )


def _as_prompts(
    prompts: Prompt | Sequence[Prompt],
) -> list[tuple[str | None, Sequence[int] | None]]:
    """Each prompt as its text or its token ids."""
    if isinstance(prompts, str) or (prompts and _is_token_id(prompts[0])):
        return [_as_prompt(0, prompts)]
    return [_as_prompt(i, prompt) for i, prompt in enumerate(prompts)]


def _as_prompt(i: int, prompt: object) -> tuple[str | None, Sequence[int] | None]:
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, list | tuple) and all(map(_is_token_id, prompt)):
        return None, prompt
    raise RequestRejected(
        f"prompt {i} is a {type(prompt).__name__} that is neither text nor a list of token ids",
        param="prompt",
    )


def _as_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
    for i, conversation in enumerate(conversations):
        if not isinstance(conversation, list | tuple) or not all(
            isinstance(message, Mapping) for message in conversation
        ):
            raise RequestRejected(
                f"conversation {i} is not a list of messages like "
                '{"role": "user", "content": "..."}',
                param="messages",
            )
    return list(conversations)  # type: ignore[arg-type]  # checked above


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def _about(what: str, index: int) -> Iterator[None]:
    """Let a refusal say which input it is about."""
    try:
        yield
    except RequestRejected as error:
        raise RequestRejected(f"{what} {index}: {error}", param=error.param) from error
