"""The fields that chat and text completions share, and their way into ``SamplingParams``.

Only types are checked here; ranges are the business of ``SamplingParams``, whose findings are
reported under the names the client used.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationError

from focus_ray.errors import RequestRejected
from focus_ray.openai.strict import Listed, StrictModel, neutral, refuse
from focus_ray.sampling import RepetitionDetection, SamplingParams, Unmasking

# Most completions one HTTP request may ask for: prompts times n.
MAX_COMPLETIONS = 1024


class StrictRepetitionDetection(RepetitionDetection):
    """The same rule with JSON's types taken at their word."""

    model_config = ConfigDict(strict=True)


class StreamOptions(StrictModel):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(None, description="Send token counts as the last chunk.")
    include_obfuscation: Annotated[bool | None, neutral(False)] = Field(
        None, description="Not supported; only false."
    )


def _stop_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<string>"
    return "<list>" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[Listed[str], Tag("<list>")],
    Discriminator(
        _stop_kind,
        custom_error_type="wrong_type",
        custom_error_message="must be a string or a list of strings",
    ),
]


class GenerationFields(StrictModel):
    """Everything about a request except its prompt."""

    model: str | None = Field(None, description="Served model name; absent: the served one.")
    n: int | None = Field(None, description="Completions per prompt; default 1.")
    temperature: float | None = Field(
        None, description="0 is greedy; absent: what the checkpoint recommends, else greedy."
    )
    top_p: float | None = Field(None, description="Nucleus mass in (0, 1].")
    top_k: int | None = Field(None, description="Most likely tokens kept; 0 or -1: all.")
    min_p: float | None = Field(None, description="Floor relative to the best token, 0 to 1.")
    seed: int | None = Field(None, description="The same seed gives the same text.")
    stop: Stop | None = Field(None, description="Up to 16 strings that end the text.")
    stop_token_ids: Listed[int] | None = Field(None, description="Token ids that end the text.")
    min_tokens: int | None = Field(None, description="No stop before this many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on after end-of-text tokens.")
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text; default true."
    )
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string.")
    repetition_detection: StrictRepetitionDetection | None = Field(
        None, description="End a completion that repeats itself."
    )
    unmasking: Unmasking | None = Field(
        None,
        description="Which masked tokens a denoising step decodes; joint_threshold also changes "
        "decoded ones until their block ends.",
    )
    confidence_threshold: float | None = Field(
        None,
        description="low_confidence_dynamic, joint_threshold: decode every token above it.",
    )
    denoising_steps: int | None = Field(
        None, description="Denoising steps per block; not for joint_threshold."
    )
    editing_threshold: float | None = Field(
        None, description="joint_threshold: change a decoded token where another is above it."
    )
    max_post_steps: int | None = Field(
        None, description="joint_threshold: steps without a mask after which a block ends."
    )
    stream: bool | None = Field(None, description="Send server-sent events as text is final.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    return_token_ids: bool | None = Field(
        None, description="Add token_ids and prompt_token_ids to the choices, as vLLM does."
    )
    user: str | None = Field(
        None, description="Requests of one user go to one engine where loads allow."
    )
    metadata: dict[str, str] | None = Field(None, description="Accepted and not used.")

    frequency_penalty: Annotated[float | None, neutral(0)] = Field(None, description="Only 0.")
    presence_penalty: Annotated[float | None, neutral(0)] = Field(None, description="Only 0.")
    repetition_penalty: Annotated[float | None, neutral(1)] = Field(None, description="Only 1.")
    logit_bias: Annotated[dict[str, Any] | None, neutral({})] = Field(
        None, description="Only empty."
    )

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        """Refuse options of a stream where there is none."""
        if self.stream_options is not None and not self.stream:
            raise RequestRejected(
                "stream_options is only allowed with stream: true", "stream_options"
            )

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, rename: dict[str, str]
    ) -> SamplingParams:
        """What the engine is asked for.

        Args:
            max_tokens: tokens; None for what is left of the context.
            logprobs: alternatives per token; None for no log-probabilities.
            rename: the client's names for fields of ``SamplingParams``, where they differ.

        Raises:
            RequestRejected: a value is out of range.
        """
        asked = {
            name: value
            for name in SamplingParams.model_fields
            if (value := getattr(self, name, None)) is not None
        }
        try:
            return SamplingParams(**{**asked, "max_tokens": max_tokens, "logprobs": logprobs})
        except ValidationError as error:
            refuse(error.errors(include_url=False), rename)


def refuse_too_many(num_prompts: int, n: int | None) -> None:
    """Bound what one HTTP request may ask for."""
    wanted = num_prompts * (n or 1)
    if wanted > MAX_COMPLETIONS:
        raise RequestRejected(
            f"{num_prompts} prompts times n={n or 1} are {wanted} completions, "
            f"one request may ask for {MAX_COMPLETIONS}; send several requests",
            "n" if num_prompts == 1 else "prompt",
        )
