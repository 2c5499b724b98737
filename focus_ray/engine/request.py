"""One completion on its way: its tokens, its place, its counts. Token ids only; no text."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from focus_ray.engine.outputs import COUNT_NAMES, DenoisingStep, RequestStats
from focus_ray.engine.pages import ROOT, PrefixMatch, TokenArray
from focus_ray.engine.plan import BlockSnapshot
from focus_ray.sampling import SamplingParams


class SequenceState(Enum):
    """WAITING -> PREFILLING -> DECODING -> FINISHED; preemption leads back to WAITING."""

    WAITING = auto()
    PREFILLING = auto()
    DECODING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """One of the ``n`` completions of a request.

    Args:
        request_id: the request it belongs to.
        index: which of the request's completions it is.
        params: resolved, without a None that the engine or the checkpoint can fill.
        seed: what its draws depend on, besides position and step.
        prompt_len: tokens.
        canvas: ``[blocks * block_length]`` prompt and output of closed blocks; final in
            ``[0, num_committed)``, in the prompt and in what another engine emitted.
        stop_token_ids: ids that end it; empty under ``ignore_eos`` without own stop ids.
        num_continued: tokens that another engine had emitted when this one took over.
        num_committed: tokens of the blocks that are closed: wholly decoded, and behind the current
            block. The KV of some of the last one's may not be final yet.
        num_emitted: tokens that had left when it last gave up a slot, or another engine.
        count_C: what decoding did until then, as in ``DecodingCounts``.
        num_computed: tokens whose KV is final for whoever reads it in a later step, or, while it is
            prefilled, later in the same step.
    """

    request_id: str
    index: int
    params: SamplingParams
    seed: int
    prompt_len: int
    canvas: TokenArray
    block_length: int
    stop_token_ids: frozenset[int]
    num_continued: int = 0
    state: SequenceState = SequenceState.WAITING
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_committed: int = 0
    num_computed: int = 0
    num_registered_pages: int = 0
    prefix_node: int = ROOT
    num_emitted: int = 0
    saved_block: BlockSnapshot | None = None
    top_logprobs: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    trace: list[DenoisingStep] = field(default_factory=list)

    count_C: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(COUNT_NAMES), np.int64))
    committed_blocks: int = 0
    prefill_tokens: int = 0
    cached_prefix_tokens: int = 0
    preemptions: int = 0
    arrived_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None

    @property
    def limit(self) -> int:
        """First position that may not be emitted any more."""
        assert self.params.max_tokens is not None
        return self.prompt_len + self.params.max_tokens

    @property
    def continued_token_ids(self) -> tuple[int, ...]:
        """What another engine had emitted."""
        end = self.prompt_len + self.num_continued
        return tuple(self.canvas[self.prompt_len : end].tolist())

    @property
    def num_left(self) -> int:
        """Tokens that it may still emit, while it has no slot."""
        return self.limit - self.prompt_len - self.num_emitted

    @property
    def remaining_prefill(self) -> int:
        """Committed tokens whose KV is neither in the pages nor planned; 0 once it decodes."""
        if self.state is SequenceState.DECODING:
            return 0
        return self.num_committed - self.num_computed

    def admit(self, slot: int, pages: list[int], cached_tokens: int, node: int) -> None:
        """WAITING -> PREFILLING, or DECODING when nothing is left to prefill."""
        assert self.state is SequenceState.WAITING
        self.slot, self.pages = slot, pages
        self.num_computed = cached_tokens
        self.prefix_node = node
        self.cached_prefix_tokens += cached_tokens
        if self.admitted_at is None:
            self.admitted_at = time.monotonic()
        self.state = SequenceState.PREFILLING if self.remaining_prefill else SequenceState.DECODING

    def share(self, match: PrefixMatch, num_tokens: int) -> list[int]:
        """Go on with the pages of others that hold the next tokens; returns the own to free."""
        assert self.state is SequenceState.PREFILLING
        places = slice(self.num_registered_pages, self.num_registered_pages + len(match.pages))
        own, self.pages[places] = self.pages[places], match.pages
        self.num_registered_pages = places.stop
        self.prefix_node = match.node
        self.num_computed += num_tokens
        self.cached_prefix_tokens += num_tokens
        if not self.remaining_prefill:
            self.state = SequenceState.DECODING
        return own

    def computed(self, num_tokens: int) -> None:
        """A prefill chunk is planned; PREFILLING -> DECODING when it was the last."""
        assert self.state is SequenceState.PREFILLING
        self.num_computed += num_tokens
        self.prefill_tokens += num_tokens
        if not self.remaining_prefill:
            self.state = SequenceState.DECODING

    def close_block(self, token_ids: TokenArray) -> None:
        """The current block's tokens are final; its last KV is with the next block's first step."""
        assert self.state is SequenceState.DECODING
        end = self.num_committed + self.block_length
        self.canvas[self.num_committed : end] = token_ids
        self.num_committed = end
        self.committed_blocks += 1

    def preempt(self, block: BlockSnapshot) -> list[int]:
        """Back to WAITING; returns the pages to free. Tokens decoded so far are not lost."""
        pages = self._leave_slot()
        self.saved_block = block
        self.num_computed = 0
        self.preemptions += 1
        self.state = SequenceState.WAITING
        return pages

    def finish(self) -> list[int]:
        """Any state -> FINISHED; returns the pages to free."""
        pages = self._leave_slot()
        self.state = SequenceState.FINISHED
        return pages

    def _leave_slot(self) -> list[int]:
        pages, self.pages, self.slot = self.pages, [], -1
        self.num_registered_pages, self.prefix_node = 0, ROOT
        return pages

    def new_block(self, mask_token_id: int) -> BlockSnapshot:
        """The block after the committed ones: rest of the prompt, then masks."""
        start = self.num_committed
        token_ids = np.full(self.block_length, mask_token_id, dtype=np.int32)
        known = max(0, min(self.prompt_len - start, self.block_length))
        token_ids[:known] = self.canvas[start : start + known]
        decoded = np.arange(self.block_length) < known
        return BlockSnapshot(token_ids, decoded, np.zeros(self.block_length, np.float32), 0)

    def forced_ids(self, mask_token_id: int) -> TokenArray | None:
        """What tokens of the current block must become, the mask id where any may; None: any.

        The block that another engine was interrupted in is decoded again, from its first step, so
        that it comes to what it would have come to there. What had left of it stays as it was, even
        if a token would come out otherwise here.
        """
        end = self.prompt_len + self.num_continued
        if end <= self.num_committed:
            return None
        first = max(self.prompt_len - self.num_committed, 0)
        forced_B = np.full(self.block_length, mask_token_id, np.int32)
        forced_B[first : end - self.num_committed] = self.canvas[self.num_committed + first : end]
        return forced_B

    def stats(self) -> RequestStats:
        """Work and time so far."""
        now = time.monotonic()
        return RequestStats(
            prompt_tokens=self.prompt_len,
            **dict(zip(COUNT_NAMES, self.count_C.tolist(), strict=True)),
            committed_blocks=self.committed_blocks,
            prefill_tokens=self.prefill_tokens,
            cached_prefix_tokens=self.cached_prefix_tokens,
            preemptions=self.preemptions,
            queue_s=(self.admitted_at or now) - self.arrived_at,
            first_token_s=(self.first_token_at or now) - self.arrived_at,
            total_s=now - self.arrived_at,
        )
