"""Block-diffusion decoding of many prompts at once, for measuring a model while it is trained.

Greedy, strict threshold, at least one token per step. There is no KV cache: under the block-causal
mask a whole pass over the canvas gives the same numbers, and this is the plain form of the engine's
algorithm that its results can be compared with.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from model import Sdar, layer_forward, rotary_tables
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One denoising step of one sequence.

    Args:
        block_start: position of the block.
        decoded: ``[n]`` bool over the masked tokens before the step, from the left.
        delta: ``[n]`` float32, importance in layer 1 minus importance in layer 0.
    """

    block_start: int
    decoded: NDArray[np.bool_]
    delta: NDArray[np.float32]


@dataclass
class Completion:
    """Answer ids up to the end token, and the steps that decoded them."""

    prompt_len: int
    ids: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    finished: bool = False

    def full_block_steps(self, block: int) -> list[Step]:
        """Steps in blocks that hold answer text alone, no prompt and no padding."""
        end = self.prompt_len + len(self.ids)
        return [
            step
            for step in self.steps
            if step.block_start >= self.prompt_len and step.block_start + block <= end
        ]


def importance(q: Tensor, k: Tensor, masked: Tensor) -> Tensor:
    """Attention the masked tokens of a block receive from each other (FOCUS, arXiv 2601.23278).

    Args:
        q: ``[N, H, B, d]`` after norm and rotation; k: ``[N, K, B, d]``; masked: ``[N, B]``.

    Returns:
        ``[N, B]`` float32: over the masked tokens alone, scores are max-pooled over three
        neighbours, softmaxed, and summed over heads and queries; 0 where not masked.
    """
    _, heads, block, head_dim = q.shape
    k = k.repeat_interleave(heads // k.shape[1], 1)
    order = torch.argsort((~masked).int(), dim=1, stable=True)
    counts = masked.sum(1)
    valid = torch.arange(block, device=q.device) < counts[:, None]
    scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(head_dim)
    scores = scores.gather(2, order[:, None, :, None].expand_as(scores))
    scores = scores.gather(3, order[:, None, None, :].expand_as(scores))
    scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    pooled = F.max_pool1d(scores.flatten(0, 2)[:, None], 3, 1, 1).view_as(scores)
    shares = pooled.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1).nan_to_num()
    received = (shares * valid[:, None, :, None]).sum((1, 2))
    return torch.zeros_like(received).scatter(1, order, received)


class Generator:
    """Decodes batches of prompts with one model in float32."""

    def __init__(
        self, model: Sdar, block: int, threshold: float, max_new_tokens: int = 1024
    ) -> None:
        self.model, self.block, self.threshold = model, block, threshold
        self.max_new_tokens = max_new_tokens
        device = model.lm_head.weight.device
        self.cos, self.sin = rotary_tables(model.shape, device)
        self.device = device

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], deadline: float = math.inf) -> list[Completion]:
        """One completion per prompt; unfinished ones after ``time.monotonic()`` passes deadline."""
        shape, block = self.model.shape, self.block
        count = len(prompts)
        longest = max(map(len, prompts)) + self.max_new_tokens
        width = min(shape.max_position_embeddings, math.ceil(longest / block) * block)
        canvas = torch.full((count, width), shape.mask_token_id, device=self.device)
        for row, prompt in enumerate(prompts):
            canvas[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
        completions = [Completion(len(prompt)) for prompt in prompts]
        starts = torch.tensor(
            [len(prompt) // block * block for prompt in prompts], device=self.device
        )
        running = torch.arange(count, device=self.device)
        offsets = torch.arange(block, device=self.device)
        while len(running) and time.monotonic() < deadline:
            columns = starts[running, None] + offsets
            ids = canvas[running[:, None], columns]
            masked = ids == shape.mask_token_id
            logits, delta = self._forward(canvas[running], columns, masked)
            confidence, best = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1.0)
            chosen = confidence > self.threshold
            chosen |= F.one_hot(confidence.argmax(1), block).bool()
            canvas[running[:, None], columns] = torch.where(chosen & masked, best, ids)
            self._record(completions, running, starts, masked, chosen & masked, delta)
            complete = (~masked | chosen).all(1)
            over = self._finish(completions, canvas, running[complete], starts)
            starts[running[complete]] += block
            ended = torch.isin(running, torch.tensor(over, device=self.device, dtype=running.dtype))
            running = running[~ended]
        for row, completion in enumerate(completions):
            completion.ids = self._answer(canvas[row, completion.prompt_len :].tolist())
        return completions

    def _forward(self, canvas: Tensor, columns: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[N, B, V]`` and importance delta ``[N, B]`` of the current blocks."""
        model, shape = self.model, self.model.shape
        length = int(columns.max()) + 1
        blocks = torch.arange(length, device=self.device) // self.block
        visible = blocks[None, :] <= blocks[:, None]
        received: list[Tensor] = []

        def run_layer(index: int, x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> Tensor:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if index < 2:
                    at = columns[:, None, :, None]
                    own_q = q.gather(2, at.expand(-1, q.shape[1], -1, q.shape[3]))
                    own_k = k.gather(2, at.expand(-1, k.shape[1], -1, k.shape[3]))
                    received.append(importance(own_q, own_k, masked))
                # heads repeated by hand: enable_gqa with a mask falls back to whole score matrices
                group = q.shape[1] // k.shape[1]
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

            return layer_forward(x, cos, sin, attend, shape.head_dim, shape.rms_norm_eps, *weights)

        rows = canvas.shape[0]
        cos = self.cos[:length].expand(rows, -1, -1)
        sin = self.sin[:length].expand(rows, -1, -1)
        hidden = model.hidden(canvas[:, :length], cos, sin, run_layer, torch.float32)
        own = hidden.gather(1, columns[:, :, None].expand(-1, -1, hidden.shape[2]))
        logits = F.linear(own, model.lm_head.weight)
        logits[..., shape.mask_token_id] = -torch.inf
        return logits, received[1] - received[0]

    def _record(
        self,
        completions: list[Completion],
        running: Tensor,
        starts: Tensor,
        masked: Tensor,
        chosen: Tensor,
        delta: Tensor,
    ) -> None:
        rows, at = running.tolist(), starts[running].tolist()
        was_masked, decoded, deltas = (
            masked.cpu().numpy(),
            chosen.cpu().numpy(),
            delta.cpu().numpy(),
        )
        for i, (row, start) in enumerate(zip(rows, at, strict=True)):
            if was_masked[i].any():
                step = Step(start, decoded[i][was_masked[i]], deltas[i][was_masked[i]])
                completions[row].steps.append(step)

    def _finish(
        self, completions: list[Completion], canvas: Tensor, complete: Tensor, starts: Tensor
    ) -> list[int]:
        """Rows that end with the block just completed."""
        over = []
        ends = (self.model.shape.end_of_turn_id, self.model.shape.eos_token_id)
        for row, start in zip(complete.tolist(), starts[complete].tolist(), strict=True):
            completion = completions[row]
            first = max(start, completion.prompt_len)
            written = canvas[row, first : start + self.block].tolist()
            completion.finished = any(token in ends for token in written)
            spent = start + self.block - completion.prompt_len >= self.max_new_tokens
            full = start + 2 * self.block > canvas.shape[1]
            if completion.finished or spent or full:
                over.append(row)
        return over

    def _answer(self, tokens: list[int]) -> list[int]:
        shape = self.model.shape
        ends = (shape.end_of_turn_id, shape.eos_token_id, shape.mask_token_id)
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[:stop]
