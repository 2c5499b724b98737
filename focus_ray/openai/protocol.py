"""Request bodies of the OpenAI-compatible routes.

What is not a field here is refused by name. Parameters of the OpenAI API that we do not support
are fields which accept the value that changes nothing, because clients send those unasked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from focus_ray.errors import RequestRejected
from focus_ray.openai.messages import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from focus_ray.openai.request_fields import GenerationFields, refuse_too_many
from focus_ray.openai.strict import Listed, StrictModel, neutral
from focus_ray.sampling import SamplingParams

# OpenAI's default for text completions.
DEFAULT_COMPLETION_TOKENS = 16
ADD_SPECIAL_TOKENS = "Frame text as the checkpoint does, as with a first <s>; default true."

NonEmptyText = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[Listed[TokenId], Field(min_length=1)]


class TextPart(StrictModel):
    """A piece of a message's content. Text is the only kind there is."""

    type: Literal["text"]
    text: str


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<string>"
    return "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[Listed[TextPart], Field(min_length=1), Tag("<parts>")],
    Discriminator(
        _content_kind,
        custom_error_type="wrong_type",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class ChatMessage(StrictModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = Field(None, description="Handed to the chat template.")
    tool_call_id: str | None = Field(None, description="Handed to the chat template.")
    # What the official client sends back with an assistant's message that it was given.
    refusal: Annotated[str | None, neutral()] = Field(None, description="Only null.")
    audio: Annotated[Any, neutral()] = Field(None, description="Only null.")
    function_call: Annotated[Any, neutral()] = Field(None, description="Only null.")
    tool_calls: Annotated[list[Any] | None, neutral([])] = Field(None, description="Only empty.")
    annotations: Annotated[list[Any] | None, neutral([])] = Field(None, description="Only empty.")

    def for_template(self) -> dict[str, str]:
        """The message as chat templates expect it: one string, and ``system`` for developers."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return turn | {key: value for key, value in optional.items() if value is not None}


class TemplateFields(StrictModel):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None = Field(
        None, description="End the prompt where the assistant begins; default true."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template."
    )
    continue_final_message: Annotated[bool | None, neutral(False)] = Field(
        None, description="Only false."
    )
    tools: Annotated[list[Any] | None, neutral([])] = Field(None, description="Only empty.")

    def chat_prompt(self, messages: list[ChatMessage]) -> ChatPrompt:
        return ChatPrompt(
            messages=tuple(message.for_template() for message in messages),
            add_generation_prompt=self.add_generation_prompt is not False,
            template_kwargs=self.chat_template_kwargs or {},
        )


class ChatCompletionRequest(TemplateFields, GenerationFields):
    """Body of ``POST /v1/chat/completions``."""

    messages: Listed[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, description="Absent: what is left of the context.")
    max_completion_tokens: int | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Report log-probabilities of the tokens.")
    top_logprobs: int | None = Field(None, description="Alternatives per token, 0 to 20.")

    response_format: Annotated[dict[str, Any] | None, neutral({"type": "text"})] = Field(
        None, description="Only text."
    )
    tool_choice: Annotated[Any, neutral("none", "auto")] = Field(
        None, description="Without tools there is nothing to choose: none or auto."
    )
    parallel_tool_calls: bool | None = Field(None, description="Says nothing without tools.")
    modalities: Annotated[Listed[str] | None, neutral(["text"])] = Field(
        None, description="Only text."
    )
    store: Annotated[bool | None, neutral(False)] = Field(None, description="Only false.")
    service_tier: Annotated[str | None, neutral("auto", "default")] = Field(
        None, description="Only auto or default."
    )
    safety_identifier: str | None = Field(None, description="Accepted and not used.")
    prompt_cache_key: str | None = Field(None, description="As user, and before it.")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        self.check_stream_options()
        refuse_too_many(1, self.n)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestRejected("top_logprobs needs logprobs: true", "top_logprobs")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestRejected(
                f"max_completion_tokens {self.max_completion_tokens} and max_tokens "
                f"{self.max_tokens} contradict each other; send one of them",
                "max_completion_tokens",
            )
        return self

    def client_names(self) -> dict[str, str]:
        """What this client calls fields that others may object to under another name."""
        names = {"logprobs": "top_logprobs", "prompt": "messages"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names

    def to_params(self) -> SamplingParams:
        """What the engine is asked for; raises RequestRejected."""
        newer, older = self.max_completion_tokens, self.max_tokens
        return self.sampling_params(
            older if newer is None else newer,
            (self.top_logprobs or 0) if self.logprobs else None,
            self.client_names(),
        )


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    kinds = {str: "<texts>", int: "<ids>", list: "<lists of ids>"}
    return kinds.get(type(value[0])) if value else "<texts>"


CompletionPrompt = Annotated[
    Annotated[NonEmptyText, Tag("<text>")]
    | Annotated[Listed[NonEmptyText], Field(min_length=1), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[Listed[TokenIds], Field(min_length=1), Tag("<lists of ids>")],
    Discriminator(
        _prompt_kind,
        custom_error_type="wrong_type",
        custom_error_message=(
            "must be a string, a list of strings, a list of token ids, or a list of such lists"
        ),
    ),
]


class CompletionRequest(GenerationFields):
    """Body of ``POST /v1/completions``."""

    prompt: CompletionPrompt
    max_tokens: int | None = Field(None, description="Most tokens to emit; default 16.")
    logprobs: int | None = Field(None, description="Alternatives per token, 0 to 20.")
    add_special_tokens: bool | None = Field(None, description=ADD_SPECIAL_TOKENS)

    echo: Annotated[bool | None, neutral(False)] = Field(None, description="Only false.")
    suffix: Annotated[str | None, neutral("")] = Field(None, description="Only empty.")
    best_of: int | None = Field(None, description="Only 1, or the value of n.")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        self.check_stream_options()
        refuse_too_many(len(self.prompts()), self.n)
        if self.best_of not in (None, self.n or 1):
            raise RequestRejected(
                f"best_of: {self.best_of} is not supported; leave it out or send 1", "best_of"
            )
        return self

    def prompts(self) -> list[Prompt]:
        """One entry per prompt, in the client's order."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [self._text(prompt)]
        if isinstance(prompt[0], int):
            return [TokenPrompt(tuple(prompt))]
        return [self._text(p) if isinstance(p, str) else TokenPrompt(tuple(p)) for p in prompt]

    def to_params(self) -> SamplingParams:
        """What the engine is asked for; raises RequestRejected."""
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling_params(max_tokens, self.logprobs, {})

    def _text(self, text: str) -> TextPrompt:
        return TextPrompt(text, self.add_special_tokens is not False)


class TokenizeRequest(TemplateFields):
    """Body of ``POST /tokenize``: a text, or a conversation."""

    model: str | None = Field(None, description="Served model name; absent: the served one.")
    prompt: str | None = Field(None, description="Ordinary text; special tokens are text too.")
    messages: Listed[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description=ADD_SPECIAL_TOKENS)
    return_token_strs: bool | None = Field(None, description="Also give each token as text.")

    @model_validator(mode="after")
    def _one_kind_of_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestRejected("prompt: send either prompt or messages", "prompt")
        return self

    def to_prompt(self) -> Prompt:
        """What to encode."""
        if self.messages is not None:
            return self.chat_prompt(self.messages)
        return TextPrompt(self.prompt or "", self.add_special_tokens is not False)


class DetokenizeRequest(StrictModel):
    """Body of ``POST /detokenize``."""

    model: str | None = Field(None, description="Served model name; absent: the served one.")
    tokens: Listed[TokenId]


class BatchCreateRequest(StrictModel):
    """Body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(
        None, description="Up to 16 pairs, given back."
    )
    output_expires_after: Annotated[Any, neutral()] = Field(None, description="Only null.")
