"""Everything one replica needs to know. Plain data; measured values are not config."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from focus_ray.sampling import MAX_POST_STEPS, Unmasking

DEFAULT_MODEL = "sdar-tiny"

Decoding = Literal["block", "delayed", "focus"]
EvictionPolicy = Literal["delta", "leftmost"]

MAX_BLOCK_LENGTH = 64

DEFAULT_CONFIDENCE_THRESHOLD: dict[Decoding, float] = {"block": 0.9, "delayed": 0.9, "focus": 0.8}
"""The values that FOCUS was published with (arXiv 2601.23278)."""


class EngineConfig(BaseModel):
    """Configuration of one engine. Names follow vLLM where both mean the same thing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(
        DEFAULT_MODEL,
        description="Bundled name, local directory in Hugging Face layout, or hub id.",
    )
    tokenizer: str | None = Field(None, description="Directory or hub id; None: the model's.")
    revision: str | None = Field(None, description="Hub revision of the checkpoint.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if present.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's on a GPU, float32 on a CPU."
    )
    seed: int = Field(0, description="Source of the seeds of requests that bring none.")

    tensor_parallel_size: PositiveInt = Field(
        1, description="GPUs, or on a CPU processes, that share the model."
    )
    rank_timeout_s: PositiveFloat = Field(
        60.0,
        description="Tensor parallel: seconds that a step may take before the engine gives up, as "
        "a rank must hang.",
    )
    check_ranks_every: NonNegativeInt = Field(
        0,
        description="Tensor parallel: in every so many steps compare what the ranks hold, and stop "
        "with what differs; for debugging. 0: never.",
    )

    max_model_len: PositiveInt | None = Field(
        None, description="Prompt plus output, tokens; None: the checkpoint's limit."
    )
    max_num_seqs: PositiveInt = Field(256, description="Sequences that run at once.")
    max_num_batched_tokens: PositiveInt | None = Field(
        None,
        description="Tokens of one step; decoding goes first, prefill takes what is left. "
        "None: 8192 on a GPU, 1024 on a CPU, and more where max_num_seqs needs it.",
    )
    max_occupancy: PositiveFloat | None = Field(
        None,
        description="Sequences are admitted while running ones are predicted to process fewer "
        "tokens a step than this times saturation_tokens, so that with eviction more run at once "
        "than without. None: while there are places and pages.",
    )
    saturation_tokens: PositiveInt | None = Field(
        None,
        description="Tokens of a step from which on larger steps are hardly faster, the unit of "
        "occupancy. None: measured at start, and kept for the next.",
    )
    max_num_waiting: NonNegativeInt = Field(
        4096, description="Sequences that may wait; more are refused as overload."
    )
    page_size: PositiveInt | None = Field(
        None,
        description="Tokens per KV page, a multiple of block_length; prefixes are shared by the "
        "page. None: the least multiple that is 32 or more.",
    )
    gpu_memory_utilization: float = Field(
        0.90, gt=0.0, le=1.0, description="Share of the GPU's memory this engine may fill."
    )
    kv_cache_memory_bytes: PositiveInt | None = Field(
        None, description="Size of the KV pages; None: from free memory on a GPU, 1 GiB on a CPU."
    )
    num_pages: PositiveInt | None = Field(
        None, description="Exact number of KV pages, before any other rule."
    )
    enable_prefix_caching: bool = Field(True, description="Reuse KV pages of equal prefixes.")

    decoding: Decoding = Field(
        "focus",
        description="focus: tokens unlikely to be decoded are left out of the later layers. "
        "delayed: only decoded tokens leave, once their KV is final. block: whole blocks.",
    )
    focus_alpha: float = Field(
        1.5,
        ge=1.0,
        description="focus: masked tokens retained, relative to the mean decoded per step.",
    )
    eviction_policy: EvictionPolicy = Field(
        "delta",
        description="focus: retain by growth of importance from layer 0 to 1 (as published), or "
        "the leftmost masked tokens, the others not computed at all.",
    )
    attend_cached: bool = Field(
        True,
        description="delayed, focus: also see decoded tokens right of the rightmost retained one; "
        "off is the published rule, which gives slightly worse answers in more steps.",
    )
    focus_adaptive: bool | None = Field(
        None,
        description="focus: evict only in steps where it is measured to decode more tokens per "
        "second. A text then depends a little on what else runs; off decides each by itself. "
        "None: on on a GPU, off on a CPU.",
    )
    round_importance: bool = Field(
        True,
        description="focus: round importances to the model's dtype before they are compared, as "
        "published; otherwise compare in float32.",
    )
    diagnose_recall_every: NonNegativeInt = Field(
        0,
        description="focus: in every so many steps run a second pass without eviction and count "
        "how many of the tokens it would decode were retained; changes no token. 0: never.",
    )
    block_length: PositiveInt | None = Field(
        None,
        le=MAX_BLOCK_LENGTH,
        description="Tokens per diffusion block; None: what the checkpoint says.",
    )
    unmasking: Unmasking = Field(
        "low_confidence_dynamic",
        description="Default unmasking rule. joint_threshold, which also changes decoded tokens "
        "until their block ends, needs decoding block.",
    )
    confidence_threshold: float | None = Field(
        None, ge=0.0, description="Default threshold (strict). None: 0.8 for focus, else 0.9."
    )
    denoising_steps: PositiveInt | None = Field(
        None,
        description="Default steps per block; None: block_length, a quota of one. Not for "
        "joint_threshold.",
    )
    editing_threshold: float = Field(
        0.5, ge=0.0, description="joint_threshold: default threshold (strict) of changing a token."
    )
    max_post_steps: PositiveInt = Field(
        16,
        le=MAX_POST_STEPS,
        description="joint_threshold: default number of steps without a mask that end a block.",
    )
    enforce_eager: bool = Field(
        False, description="GPU: launch every kernel from Python instead of from CUDA graphs."
    )
    record_trace: bool = Field(
        False, description="Keep every denoising step of every request, for analysis."
    )

    @model_validator(mode="after")
    def _pages_hold_whole_blocks(self) -> Self:
        if self.block_length and self.page_size and self.page_size % self.block_length:
            raise ValueError(
                f"page_size {self.page_size} is not a multiple of block_length {self.block_length}"
            )
        return self

    @model_validator(mode="after")
    def _joint_threshold_has_whole_blocks_and_no_schedule(self) -> Self:
        if self.unmasking != "joint_threshold":
            return self
        if self.decoding != "block":
            raise ValueError(
                f"unmasking joint_threshold changes decoded tokens, which decoding {self.decoding} "
                "leaves out; use decoding block"
            )
        if self.denoising_steps is not None:
            raise ValueError(
                f"denoising_steps {self.denoising_steps} does not go with unmasking "
                "joint_threshold, whose blocks take as many steps as they need; leave it out"
            )
        return self
