"""What recorded denoising steps say about decoding: where tokens are decoded, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from focus_ray import RequestOutput
from focus_ray.engine.outputs import DenoisingStep


@dataclass(frozen=True)
class PlacedStep:
    """A denoising step with the sequence around it.

    Args:
        block_ids: stood in its block before the step.
        num_left_over: tokens of its block that the step after it computed once more, as the first
            of the next block.
    """

    output: RequestOutput
    step: DenoisingStep
    block_ids: tuple[int, ...]
    num_left_over: int = 0

    def work(self, positions: Sequence[int]) -> int:
        """How many of these positions of the step, and of what it left over, are of its block."""
        in_block = sum(position >= self.step.block_start for position in positions)
        return in_block + self.num_left_over

    @property
    def decoded(self) -> Tensor:
        """Of each masked position, whether the step decoded it."""
        chosen = set(self.step.positions)
        return torch.tensor([position in chosen for position in self.step.masked])


@dataclass(frozen=True)
class Decoding:
    """How blocks were decoded. Ranks count masked tokens from the left, 0 first.

    Work is in tokens of these blocks per decoded token, those included that the next block's first
    step computed once more: all entered layer 0, the retained ones went to the end.
    """

    num_steps: int
    tokens_per_step: float
    leftmost_decoded: float
    rank_below_4: float
    rank_below_8: float
    processed_per_decoded: float
    retained_per_decoded: float


def trace_of(output: RequestOutput) -> tuple[DenoisingStep, ...]:
    """The recorded steps of the first completion."""
    trace = output.outputs[0].trace
    if trace is None:
        raise ValueError("the output has no trace; make the LLM with record_trace=True")
    return trace


def placed_steps(output: RequestOutput, block_length: int, mask_id: int) -> list[PlacedStep]:
    """Replay a completion: which ids stood in the block before each of its steps."""
    prompt = output.prompt_token_ids
    placed: list[PlacedStep] = []
    blocks: dict[int, dict[int, int]] = {}
    for step in trace_of(output):
        start = step.block_start
        if step.leftover:
            placed[-1] = replace(placed[-1], num_left_over=len(step.leftover))
        known = blocks.setdefault(
            start, {p: prompt[p] for p in range(start, min(start + block_length, len(prompt)))}
        )
        ids = tuple(known.get(p, mask_id) for p in range(start, start + block_length))
        placed.append(PlacedStep(output, step, ids))
        known.update(zip(step.positions, step.token_ids, strict=True))
    return placed


def in_full_blocks(
    steps: Sequence[PlacedStep], block_length: int, end_ids: frozenset[int]
) -> list[PlacedStep]:
    """Steps of blocks that hold answer text alone: no prompt, no end token, no padding."""
    chosen = []
    for placed in steps:
        answer = placed.output.outputs[0].token_ids
        text_len = next((i for i, token in enumerate(answer) if token in end_ids), len(answer))
        first = len(placed.output.prompt_token_ids)
        start = placed.step.block_start
        if first <= start and start + block_length <= first + text_len:
            chosen.append(placed)
    return chosen


def decoding_of(placed: Sequence[PlacedStep]) -> Decoding | None:
    """Tokens per step, where they stand and what they cost; None without steps."""
    if not placed:
        return None
    ranks = torch.cat([item.decoded.nonzero()[:, 0] for item in placed])
    num_decoded = len(ranks)
    return Decoding(
        num_steps=len(placed),
        tokens_per_step=num_decoded / len(placed),
        leftmost_decoded=sum(bool(item.decoded[0]) for item in placed) / len(placed),
        rank_below_4=(ranks < 4).float().mean().item(),
        rank_below_8=(ranks < 8).float().mean().item(),
        processed_per_decoded=sum(item.work(item.step.processed) for item in placed) / num_decoded,
        retained_per_decoded=sum(item.work(item.step.retained) for item in placed) / num_decoded,
    )


@dataclass(frozen=True)
class Signal:
    """AUC over steps: does a score rank the tokens decoded in the step above the others?"""

    num_steps: int
    auc_importance_delta: float
    auc_leftness: float


def signal_of(placed: Sequence[PlacedStep]) -> Signal | None:
    """The statistic over the steps that leave something undecoded; None without deltas."""
    deltas, lefts = [], []
    for item in placed:
        step, decoded = item.step, item.decoded
        if not step.importance_deltas or decoded.all():
            continue
        leftness = -torch.arange(len(decoded), dtype=torch.float32)
        deltas.append(area_under_curve(torch.tensor(step.importance_deltas), decoded))
        lefts.append(area_under_curve(leftness, decoded))
    if not deltas:
        return None
    return Signal(len(deltas), sum(deltas) / len(deltas), sum(lefts) / len(lefts))


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative; ties count half."""
    high, low = scores[positive, None], scores[None, ~positive]
    return ((high > low).double() + 0.5 * (high == low).double()).mean().item()
