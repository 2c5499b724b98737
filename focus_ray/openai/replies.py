"""Reply bodies, in the shapes of the OpenAI API; what vLLM adds has vLLM's names.

Fields that were not set are left out of the JSON, so ``null`` appears exactly where it is given.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "abort"]


class Reply(BaseModel):
    """A part of a reply."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


def now() -> int:
    """Seconds since the epoch, for ``created``."""
    return int(time.time())


class ErrorBody(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Every error of every route."""

    error: ErrorBody


class PromptTokensDetails(Reply):
    cached_tokens: int = Field(description="Prompt tokens whose KV was reused.")


class Usage(Reply):
    """Counts over all prompts and completions of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    denoising_steps: int = Field(description="Denoising steps, summed over completions.")
    processed_tokens: int = Field(description="Tokens that entered layer 0 in decoding.")
    retained_tokens: int = Field(description="Of these, taken past layer 1.")
    evicted_tokens: int = Field(description="Masked tokens that steps left out.")
    decoded_tokens: int = Field(description="Masked tokens that became decoded.")
    edited_tokens: int = Field(description="Decoded tokens that steps replaced.")


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]


class AssistantMessage(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Reply):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Reply):
    """Reply of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(Reply):
    """One event of a streamed chat completion; the usage event has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """A whole completion, or its next piece in a stream, where finish_reason may be null."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Reply):
    """Reply of ``POST /v1/completions``, or one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="Prompt plus output, tokens.")


class ModelList(Reply):
    object: Literal["list"]
    data: list[Model]


class TokenizeReply(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(Reply):
    prompt: str


class VersionReply(Reply):
    version: str


class FileReply(Reply):
    """A file of the Files API."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(Reply):
    object: Literal["list"]
    data: list[FileReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Reply):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchErrorEntry(Reply):
    """What is wrong with a batch's input as a whole, or with a line of it."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(Reply):
    object: Literal["list"]
    data: list[BatchErrorEntry]


class BatchCounts(Reply):
    total: int
    completed: int
    failed: int


class BatchReply(Reply):
    """A batch of the Batch API; times are seconds since the epoch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class BatchList(Reply):
    object: Literal["list"]
    data: list[BatchReply]
    first_id: str | None
    last_id: str | None
    has_more: bool
