"""What is learnt from a batch of packed rows: next tokens, then masked tokens of blocks.

Letters: R rows, C clean positions, N noisy positions; a diffusion row is ``[noisy | clean]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from attention import KeyRanges
from shards import Batch
from torch import Tensor

MAX_WEIGHT = 8.0
"""Cap of the diffusion weight 1/t: without it a few almost clean blocks dominate the gradient."""
PADDING_WEIGHT = 0.1
"""Weight of end-of-text padding as a next token."""


class Problem(NamedTuple):
    """Inputs of the model and what its first outputs are compared with.

    Args:
        ids: ``[R, T]`` int64.
        positions: ``[R, T]`` int64, within each document.
        ranges: what each position sees.
        targets: ``[R, O]`` int64, for the first O positions.
        weights: ``[R, O]`` float32, of the cross-entropy; they sum to about 1.
        counted: ``[R, O]`` bool, where plain loss and accuracy are reported.
    """

    ids: Tensor
    positions: Tensor
    ranges: KeyRanges
    targets: Tensor
    weights: Tensor
    counted: Tensor


def _positions(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Start of the document, position in it, block length; ``[R, C]`` int64."""
    start, block = batch["start"].long(), batch["block"].long()
    return start, torch.arange(start.shape[1], device=start.device) - start, block


def next_tokens(batch: Batch, fill_id: int) -> Problem:
    """Plain causal language modelling of whole documents."""
    ids = batch["clean"].long()
    start, positions, _ = _positions(batch)
    targets = ids.roll(-1, 1)
    same_document = start.roll(-1, 1) == start
    same_document[:, -1] = False
    weights = torch.where(targets == fill_id, PADDING_WEIGHT, 1.0) * same_document
    query = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32).expand_as(ids)
    nothing = torch.zeros_like(query)
    ranges = KeyRanges(start.int(), query + 1, nothing, nothing)
    counted = same_document & (targets != fill_id)
    return Problem(ids, positions, ranges, targets, weights / weights.sum(), counted)


def masked_blocks(batch: Batch, mask_id: int) -> Problem:
    """Block diffusion without a logit shift.

    A noise level t is drawn per block; the first copy of the block masks each answer token with
    chance t, the second exactly the others. A noisy block sees itself and the clean blocks before
    it; a clean block sees the clean blocks up to itself, as committed blocks do in decoding.
    """
    clean = batch["clean"].long()
    start, position, block = _positions(batch)
    source, copy = batch["source"].long(), batch["copy"]
    num_noisy = source.shape[1]
    place = torch.arange(num_noisy, device=clean.device)

    in_document, length = position.gather(1, source), block.gather(1, source)
    in_block = in_document % length
    block_start = source - in_block
    level = torch.rand(clean.shape, device=clean.device).gather(1, block_start)
    draw = torch.rand(clean.shape, device=clean.device).gather(1, source)
    learnt = (batch["answer"].gather(1, source) > 0) & (copy > 0)
    first_copy = copy == 1
    masked = torch.where(first_copy, draw < level, draw >= level) & learnt
    chance = torch.where(first_copy, level, 1 - level)
    weights = (1 / chance.clamp_min(1e-4)).clamp_max(MAX_WEIGHT) * masked / learnt.sum()

    targets = clean.gather(1, source)
    ids = torch.cat([targets.masked_fill(masked, mask_id), clean], 1)
    used = copy > 0
    near = torch.where(used, place - in_block, place)
    low = torch.where(used, num_noisy + start.gather(1, source), 0)
    high = torch.where(used, num_noisy + block_start, 0)
    clean_high = num_noisy + start + (position // block + 1) * block
    nothing = torch.zeros_like(start)
    ranges = KeyRanges(
        torch.cat([low, num_noisy + start], 1).int(),
        torch.cat([high, clean_high], 1).int(),
        torch.cat([near, nothing], 1).int(),
        torch.cat([near + torch.where(used, length, 1), nothing], 1).int(),
    )
    return Problem(ids, torch.cat([in_document, position], 1), ranges, targets, weights, masked)


def head_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy, and plain cross-entropy and accuracy where ``counted``."""
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    losses = F.cross_entropy(
        logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
    ).view(targets.shape)
    right = (logits.argmax(-1) == targets) & counted
    total = counted.sum()
    return (
        (losses * weights).sum(),
        ((losses * counted).sum() / total).detach(),
        right.sum() / total,
    )


@cache
def compiled_head_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``head_loss`` without the float32 logits in memory; compiled once per batch shape."""
    return torch.compile(head_loss, dynamic=False)
