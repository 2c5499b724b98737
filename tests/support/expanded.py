"""What a small model and one expanded from it have in common, and how to ask both the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus_ray import LLM, SamplingParams
from focus_ray.models.loading import LoadedModel

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "sdar"

# Of the largest logit, in float32; the same sums in another order differ by 6e-6.
LOGIT_TOLERANCE = 1e-4


def large_ids(small: LoadedModel, large: LoadedModel, token_ids: Tensor) -> Tensor:
    masked = token_ids == small.spec.mask_token_id
    return token_ids.masked_fill(masked, large.spec.mask_token_id)


def split_logits(small: LoadedModel, large: LoadedModel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the small model's tokens, and of all others."""
    token_ids = large_ids(small, large, torch.arange(small.spec.vocab_size))
    surplus = torch.ones(logits.shape[1], dtype=torch.bool)
    surplus[token_ids] = False
    return logits[:, token_ids], logits[:, surplus]


def half_masked(small: LoadedModel) -> Tensor:
    """Whole blocks of ordinary tokens, then masked ones with a few decoded among them."""
    ids = torch.randint(0, 500, (44,), generator=torch.Generator().manual_seed(1))
    ids[20:] = torch.where(torch.arange(24) % 5 == 3, ids[20:], small.spec.mask_token_id)
    return ids


@dataclass(frozen=True)
class Generated:
    """An answer, and what it took."""

    token_ids: tuple[int, ...]
    num_steps: int
    processed_tokens: int
    retained_tokens: int


def generate(model: str, decoding: str) -> list[Generated]:
    """Greedy answers of the engine to two questions at once."""
    config: dict[str, Any] = {"decoding": decoding, "max_num_seqs": 4, "num_pages": 24}
    llm = LLM(model=model, device="cpu", focus_adaptive=False, **config)
    messages = [
        [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many are there now?"}],
        [{"role": "user", "content": "Sort these numbers: 7, 2, 9, 4."}],
    ]
    params = SamplingParams(max_tokens=64, temperature=0.0)
    answers = llm.chat(messages, params, use_tqdm=False)
    return [
        Generated(
            tuple(answer.outputs[0].token_ids),
            answer.stats.denoising_steps,
            answer.stats.processed_tokens,
            answer.stats.retained_tokens,
        )
        for answer in answers
    ]
