"""Slots in the middle of their texts, drawn at random, for tests of what reads and writes them.

M slots, B block length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.kernels.slot_words import STRATEGIES, SlotLayout, SlotWords

MASK_ID = 99
NUM_IDS = 30
"""Ids of texts are 0 to 29; as stop ids some of them are common."""


class Draws:
    """Random tensors, one after the other."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64, ``low`` to ``high - 1``."""
        return torch.randint(low, high, shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """float32, 0 to 1."""
        return torch.rand(shape, generator=self.generator)

    def flags(self, share: float | Tensor, *shape: int) -> Tensor:
        """bool, true in about ``share`` of places."""
        return self.uniform(*shape) < share


def random_words(
    num_slots: int, block_length: int, draws: Draws, num_stop_ids: int = 3
) -> SlotWords:
    """Slots in every state that they can be in, and some that are rare; about one in six is idle.

    Masked tokens are uncached; otherwise flags, counts and parameters have nothing to do with each
    other. Decoded tokens stand anywhere, so many blocks look as if taken up again.
    """
    m, b = num_slots, block_length
    words = SlotWords.allocate(SlotLayout(b, num_stop_ids), m, "cpu")
    decoded_MB = draws.flags(draws.uniform(m, 1), m, b)
    left_over_M1 = draws.flags(0.5, m, 1)
    token_ids_MB = draws.integers(0, NUM_IDS, m, b)
    # the few that have no mask, and those that have nothing but masks
    decoded_MB = (decoded_MB | draws.flags(0.1, m, 1)) & ~draws.flags(0.1, m, 1)
    arrays = {
        "token_ids": torch.where(decoded_MB, token_ids_MB, MASK_ID),
        "decoded": decoded_MB,
        "logprobs": -draws.uniform(m, b),
        "closed_ids": draws.integers(0, NUM_IDS, m, b),
        "closed_logprobs": -draws.uniform(m, b),
        "uncached": ~decoded_MB | draws.flags(0.4, m, b) & ~draws.flags(0.1, m, 1),
        "leftover": draws.flags(draws.uniform(m, 1), m, b) & left_over_M1,
        "forced_ids": torch.where(
            draws.flags(0.2, m, 1) & draws.flags(0.5, m, b),
            draws.integers(0, NUM_IDS, m, b),
            MASK_ID,
        ),
    }
    scalars = {
        "active": ~draws.flags(1 / 6, m),
        "block_start": draws.integers(1, 4, m) * b,
        "denoising_step": draws.integers(0, b, m),
        "denoising_steps": draws.integers(0, 100, m),
        "processed_tokens": draws.integers(0, 1000, m),
        "retained_tokens": draws.integers(0, 1000, m),
        "evicted_tokens": draws.integers(0, 1000, m),
        "decoded_tokens": draws.integers(0, 1000, m),
        "edited_tokens": draws.integers(0, 1000, m),
        "decodable_tokens": draws.integers(0, 1000, m),
        "recalled_tokens": draws.integers(0, 1000, m),
        "warm_up": draws.flags(0.3, m),
        "progress": draws.integers(-1, b, m),
        "decoded_sum": draws.integers(0, b, m),
        "productive_steps": draws.integers(0, 4, m),
        "post_steps": draws.integers(0, 3, m),
        "prompt_len": draws.integers(0, 5 * b, m),
        "limit": draws.integers(b, 6 * b, m),
        "strategy": draws.integers(0, len(STRATEGIES), m),
        "threshold": draws.integers(0, 9, m) / 8,
        "num_steps": draws.integers(1, b + 1, m),
        "editing_threshold": draws.integers(0, 9, m) / 8,
        "max_post_steps": draws.integers(1, 5, m),
    }
    for name, array_MB in arrays.items():
        words.array(name).copy_(array_MB)
    for name, scalar_M in scalars.items():
        words.scalar(name).copy_(scalar_M)
    words.stop_ids_MK.copy_(draws.integers(0, 5 * NUM_IDS, m, num_stop_ids))
    words.stop_ids_MK[:, -1:] = MASK_ID
    return words


def copy_of(words: SlotWords, device: torch.device | str) -> SlotWords:
    """The same words, elsewhere."""
    return SlotWords(words.layout, words.words_MW.to(device, copy=True))
