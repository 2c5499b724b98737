"""What the device keeps about every running sequence: one row of 32-bit words per slot.

M slots, B block length, K stop ids, W words. A slot is one row, so that a sequence takes it with
one copy to the device and everything about it comes back with one copy to the host. Kernels take
the words and the numbers below; everyone else takes ``SlotWords``, which names the columns.

Two blocks of a sequence matter at a time: the current one, and the one before it, which is closed:
wholly decoded, but with tokens left over whose keys and values are not final before one more pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns that are B words wide: number i starts at word ``i * B``.
ARRAYS = (
    "token_ids",  # of the current block; the mask id where masked
    "decoded",  # 0 or 1
    "logprobs",  # float32, of decoded tokens
    "closed_ids",  # of the block before
    "closed_logprobs",  # float32
    "uncached",  # 0 or 1: keys and values of the current block that are not final
    "leftover",  # 0 or 1: tokens of the closed block that the next step still processes
    "forced_ids",  # what tokens of the current block must become; the mask id where any may
)
# Columns of one word, from word ``len(ARRAYS) * B`` on, in this order.
SCALARS = (
    "active",  # 0 or 1: decodes; the device sets it to 0 when the text is final
    "block_start",  # absolute position of the current block's first token
    "denoising_step",  # steps of the current block so far
    "denoising_steps",  # from here on eight counts, as in ``DecodingCounts``
    "processed_tokens",
    "retained_tokens",
    "evicted_tokens",
    "decoded_tokens",
    "edited_tokens",
    "decodable_tokens",
    "recalled_tokens",
    "warm_up",  # 0 or 1: the current block had no step yet
    "progress",  # rightmost position of the block ever computed past layer 1; -1: none
    "decoded_sum",  # tokens decoded in the current block by steps, the prompt's not counted
    "productive_steps",  # of the current block: steps that decoded something
    "post_steps",  # of the current block under joint_threshold: steps that found no mask
    "prompt_len",
    "limit",  # first position that may not be emitted
    "strategy",  # of ``STRATEGIES``
    "threshold",  # float32
    "num_steps",  # denoising steps that the request allows a block; joint_threshold: B
    "editing_threshold",  # float32; this and the next one are of joint_threshold
    "max_post_steps",
    "temperature",  # float32
    "top_p",  # float32
    "top_k",
    "min_p",  # float32
    "seed_low",  # the seed's lower 32 bits
    "seed_high",
    "suppress_before",  # position before which stop ids may not be chosen
)
# From word ``len(ARRAYS) * B + len(SCALARS)`` on: K stop ids, padded with the mask id.

FLOATS = frozenset(
    {
        *("logprobs", "closed_logprobs", "threshold", "editing_threshold"),
        *("temperature", "top_p", "min_p"),
    }
)
COUNTS = SCALARS[SCALARS.index("denoising_steps") : SCALARS.index("recalled_tokens") + 1]

STRATEGIES = ("low_confidence_dynamic", "low_confidence_static", "sequential", "joint_threshold")


@dataclass(frozen=True)
class SlotLayout:
    """Where each column lies.

    Args:
        block_length: B.
        num_stop_ids: K, room for a request's own stop ids and the checkpoint's.
    """

    block_length: int
    num_stop_ids: int

    @property
    def num_words(self) -> int:
        """W."""
        return len(ARRAYS) * self.block_length + len(SCALARS) + self.num_stop_ids

    @property
    def stop_ids(self) -> slice:
        """The columns of the stop ids."""
        first = len(ARRAYS) * self.block_length + len(SCALARS)
        return slice(first, first + self.num_stop_ids)

    @property
    def counts(self) -> slice:
        """The columns of ``COUNTS``, in that order."""
        first = self.word(COUNTS[0])
        return slice(first, first + len(COUNTS))

    def array(self, name: str) -> slice:
        """The B columns of one of ``ARRAYS``."""
        first = ARRAYS.index(name) * self.block_length
        return slice(first, first + self.block_length)

    def word(self, name: str) -> int:
        """The column of one of ``SCALARS``."""
        return len(ARRAYS) * self.block_length + SCALARS.index(name)


class SlotWords:
    """The words of some slots, ``[M, W]`` int32, with a view for every column.

    ``words.array("decoded")`` is ``[M, B]``, ``words.scalar("limit")`` is ``[M]``: int32, or
    float32 for the columns in ``FLOATS``; writing to them writes the words.
    """

    def __init__(self, layout: SlotLayout, words_MW: Tensor) -> None:
        self.layout = layout
        self.words_MW = words_MW

    @classmethod
    def allocate(cls, layout: SlotLayout, num_slots: int, device: torch.device | str) -> SlotWords:
        """All zero: nobody is active."""
        shape = (num_slots, layout.num_words)
        return cls(layout, torch.zeros(shape, dtype=torch.int32, device=device))

    @property
    def num_slots(self) -> int:
        return self.words_MW.shape[0]

    @property
    def counts_MC(self) -> Tensor:
        """``[M, C]`` int32, C counts of ``COUNTS``."""
        return self.words_MW[:, self.layout.counts]

    @property
    def stop_ids_MK(self) -> Tensor:
        """``[M, K]`` int32."""
        return self.words_MW[:, self.layout.stop_ids]

    @property
    def seed_M(self) -> Tensor:
        """``[M]`` int64, a copy."""
        low_M, high_M = self.scalar("seed_low").long(), self.scalar("seed_high").long()
        return (low_M & 0xFFFFFFFF) | (high_M << 32)

    def array(self, name: str) -> Tensor:
        """One of ``ARRAYS``, ``[M, B]``."""
        return self._typed(name)[:, self.layout.array(name)]

    def scalar(self, name: str) -> Tensor:
        """One of ``SCALARS``, ``[M]``."""
        return self._typed(name)[:, self.layout.word(name)]

    def _typed(self, name: str) -> Tensor:
        return self.words_MW.view(torch.float32) if name in FLOATS else self.words_MW
