"""The columns and strategies of ``slot_words`` as Triton kernels name them.

A kernel holds a pointer to the first word of a slot; position ``b`` of an array is at
``slot_ptr + array_at(DECODED, BLOCK_LENGTH) + b``, a scalar at
``slot_ptr + scalar_at(LIMIT, BLOCK_LENGTH)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from focus_ray.kernels.slot_words import ARRAYS, SCALARS, STRATEGIES

NUM_ARRAYS = tl.constexpr(len(ARRAYS))
NUM_SCALARS = tl.constexpr(len(SCALARS))

TOKEN_IDS = tl.constexpr(ARRAYS.index("token_ids"))
DECODED = tl.constexpr(ARRAYS.index("decoded"))
LOGPROBS = tl.constexpr(ARRAYS.index("logprobs"))
CLOSED_IDS = tl.constexpr(ARRAYS.index("closed_ids"))
CLOSED_LOGPROBS = tl.constexpr(ARRAYS.index("closed_logprobs"))
UNCACHED = tl.constexpr(ARRAYS.index("uncached"))
LEFTOVER = tl.constexpr(ARRAYS.index("leftover"))
FORCED_IDS = tl.constexpr(ARRAYS.index("forced_ids"))

ACTIVE = tl.constexpr(SCALARS.index("active"))
BLOCK_START = tl.constexpr(SCALARS.index("block_start"))
DENOISING_STEP = tl.constexpr(SCALARS.index("denoising_step"))
DENOISING_STEPS = tl.constexpr(SCALARS.index("denoising_steps"))
PROCESSED_TOKENS = tl.constexpr(SCALARS.index("processed_tokens"))
RETAINED_TOKENS = tl.constexpr(SCALARS.index("retained_tokens"))
EVICTED_TOKENS = tl.constexpr(SCALARS.index("evicted_tokens"))
DECODED_TOKENS = tl.constexpr(SCALARS.index("decoded_tokens"))
EDITED_TOKENS = tl.constexpr(SCALARS.index("edited_tokens"))
DECODABLE_TOKENS = tl.constexpr(SCALARS.index("decodable_tokens"))
RECALLED_TOKENS = tl.constexpr(SCALARS.index("recalled_tokens"))
WARM_UP = tl.constexpr(SCALARS.index("warm_up"))
PROGRESS = tl.constexpr(SCALARS.index("progress"))
DECODED_SUM = tl.constexpr(SCALARS.index("decoded_sum"))
PRODUCTIVE_STEPS = tl.constexpr(SCALARS.index("productive_steps"))
POST_STEPS = tl.constexpr(SCALARS.index("post_steps"))
PROMPT_LEN = tl.constexpr(SCALARS.index("prompt_len"))
LIMIT = tl.constexpr(SCALARS.index("limit"))
STRATEGY = tl.constexpr(SCALARS.index("strategy"))
THRESHOLD = tl.constexpr(SCALARS.index("threshold"))
NUM_STEPS = tl.constexpr(SCALARS.index("num_steps"))
EDITING_THRESHOLD = tl.constexpr(SCALARS.index("editing_threshold"))
MAX_POST_STEPS = tl.constexpr(SCALARS.index("max_post_steps"))

STATIC = tl.constexpr(STRATEGIES.index("low_confidence_static"))
SEQUENTIAL = tl.constexpr(STRATEGIES.index("sequential"))
JOINT = tl.constexpr(STRATEGIES.index("joint_threshold"))


@triton.jit
def array_at(ARRAY: tl.constexpr, BLOCK_LENGTH: tl.constexpr):
    """First word of an array."""
    return ARRAY * BLOCK_LENGTH


@triton.jit
def scalar_at(SCALAR: tl.constexpr, BLOCK_LENGTH: tl.constexpr):
    """The word of a scalar."""
    return NUM_ARRAYS * BLOCK_LENGTH + SCALAR


@triton.jit
def stop_ids_at(BLOCK_LENGTH: tl.constexpr):
    """First word of the stop ids."""
    return NUM_ARRAYS * BLOCK_LENGTH + NUM_SCALARS


@triton.jit
def add_to(ptr, value):
    """Add to one word."""
    tl.store(ptr, tl.load(ptr) + value)
