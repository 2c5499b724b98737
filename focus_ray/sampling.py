"""How one request wants its tokens chosen. Plain data; names follow vLLM."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from focus_ray.errors import RequestRejected

Unmasking = Literal[
    "low_confidence_dynamic", "low_confidence_static", "sequential", "joint_threshold"
]

MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_POST_STEPS = 1 << 20
"""More than anyone waits for, and a number that the device can count to."""


class RepetitionDetection(BaseModel):
    """End a request whose output repeats itself.

    The request finishes when, for some pattern size in the given range, the last
    ``min_count * size`` tokens are the same ``size`` tokens ``min_count`` times in a row. The
    defaults are those of the FOCUS benchmark protocol (arXiv 2601.23278).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_pattern_size: int = Field(8, ge=1, le=1024, description="Shortest pattern, in tokens.")
    max_pattern_size: int = Field(32, ge=1, le=1024, description="Longest pattern, in tokens.")
    min_count: int = Field(3, ge=2, le=1024, description="Repetitions that end the request.")

    @model_validator(mode="after")
    def _sizes_are_a_range(self) -> Self:
        if self.min_pattern_size > self.max_pattern_size:
            raise RequestRejected(
                f"min_pattern_size {self.min_pattern_size} is above "
                f"max_pattern_size {self.max_pattern_size}",
                "repetition_detection.min_pattern_size",
            )
        return self


class SamplingParams(BaseModel):
    """Sampling and stopping of one request.

    ``None`` means "what the checkpoint or the engine says": temperature, top-p, top-k come from
    the checkpoint's ``generation_config.json`` (greedy where it says nothing, and always under
    ``joint_threshold``), the five unmasking fields from the engine's configuration, ``seed`` is
    drawn, ``max_tokens`` is what is left of the context.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int = Field(1, ge=1, le=128, description="Completions per prompt.")
    max_tokens: int | None = Field(256, ge=1, description="Most tokens to emit.")
    min_tokens: int = Field(0, ge=0, description="Stop tokens are suppressed before this many.")
    temperature: float | None = Field(None, ge=0.0, le=100.0, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0.0, le=1.0, description="Nucleus mass; 1 keeps all.")
    top_k: int | None = Field(None, ge=-1, description="Most likely tokens kept; 0 or -1: all.")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="Floor relative to the best token.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Same seed, same text.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), max_length=16, fail_fast=True, description="Strings that end the text; not part of it."
    )
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        max_length=MAX_STOP_TOKEN_IDS,
        fail_fast=True,
        description="Token ids that end the text.",
    )
    include_stop_str_in_output: bool = Field(False, description="Keep the stop string.")
    ignore_eos: bool = Field(False, description="Go on after end-of-text tokens.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives reported per token; None: nothing."
    )
    repetition_detection: RepetitionDetection | None = Field(
        None, description="End a request that repeats itself."
    )
    unmasking: Unmasking | None = Field(
        None,
        description="Which masked tokens a step decodes. joint_threshold also changes decoded ones "
        "until their block ends; it is greedy, and needs decoding block.",
    )
    confidence_threshold: float | None = Field(
        None,
        ge=0.0,
        description="low_confidence_dynamic, joint_threshold: decode every token above it "
        "(strictly).",
    )
    denoising_steps: int | None = Field(
        None,
        ge=1,
        description="Steps that decode a block; sets the quota of a step. Not for joint_threshold.",
    )
    editing_threshold: float | None = Field(
        None,
        ge=0.0,
        description="joint_threshold: change a decoded token where another one is above it "
        "(strictly).",
    )
    max_post_steps: int | None = Field(
        None,
        ge=1,
        le=MAX_POST_STEPS,
        description="joint_threshold: a block ends after so many steps without a mask, even if "
        "tokens still change.",
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _min_tokens_fit(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestRejected(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}", "min_tokens"
            )
        return self


def fill_in(params: SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """``params`` with what they leave open taken from ``defaults``, except ``max_tokens``.

    ``joint_threshold`` takes over neither a temperature, since it is greedy, nor a number of steps,
    since its blocks take as many as they need.
    """
    left_open = {
        name: getattr(defaults, name)
        for name in SamplingParams.model_fields
        if name != "max_tokens" and getattr(params, name) is None
    }
    if (params.unmasking or defaults.unmasking) == "joint_threshold":
        left_open |= {"denoising_steps": params.denoising_steps}
        if params.temperature is None:
            left_open["temperature"] = 0.0
    return params.model_copy(update=left_open)
