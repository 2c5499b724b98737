"""What travels between the ingress and a replica. Plain data: no Ray, no HTTP, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from focus_ray.engine.outputs import FinishReason, RequestStats
from focus_ray.sampling import SamplingParams


@dataclass(frozen=True)
class TextPrompt:
    """Ordinary text; special tokens spelled in it are text too.

    ``add_special_tokens`` puts the checkpoint's own frame around it, where it has one.
    """

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation for the model's chat template."""

    messages: tuple[dict[str, str], ...]
    add_generation_prompt: bool = True
    template_kwargs: dict[str, Any] = field(default_factory=dict)


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True)
class Submission:
    """One prompt and what is wanted of it.

    ``continued`` is as in ``GenerationRequest``: what another replica has sent of it. Requests that
    belong together share their ``session``.
    """

    request_id: str
    prompt: Prompt
    params: SamplingParams
    with_prompt_token_ids: bool = False
    session: str | None = None
    continued: Mapping[int, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class TokenText:
    """A token as text, with its natural-log probability.

    ``raw`` is its part of the text in UTF-8, ``text`` shows part of a character as U+FFFD.
    """

    token_id: int
    text: str
    raw: bytes
    logprob: float
    top: tuple[TokenText, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """New final text of completion ``index`` of a submission.

    The last chunk of a completion carries ``finish_reason`` and ``stats``; its first one carries
    ``prompt_token_ids`` if those were asked for. ``num_handovers``: engines that had begun with the
    request and died.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenText, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stats: RequestStats | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    num_handovers: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """What a replica serves. Lengths are tokens."""

    max_model_len: int
    vocab_size: int
    has_tokenizer: bool
    has_chat_template: bool


@dataclass(frozen=True)
class Encoded:
    """A prompt as the engine would get it; ``texts`` holds each token as text."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...] | None = None
