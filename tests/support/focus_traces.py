"""Replay of whole requests: block states, processing sets, kept sets and statistics per step.

The model's outputs are given; everything that is decided between them is ours. All steps are
compared but the prefill's, and those behind the reference's own ending of a request. What eviction
keeps is decided for all steps at once, from what the file says of each block before the step; the
replay then holds its own state to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from conformance_report import Difference, Report
from focus_backend import Arrays, Backend, Block, Selected, from_bits, select
from torch import Tensor

from focus_ray.kernels.delayed_cache import after_step, processing_set
from focus_ray.kernels.unmasking import choose_unmasked, quota

PLAIN, DELAYED, FOCUS = 0, 1, 2

Problem = tuple[str, object, object]
"""What differs: its name, what was expected, what was found."""


@dataclass(frozen=True)
class Step:
    """One recorded step, cut out of the flat arrays."""

    index: int
    ids_in_B: Tensor
    state_in_B: Tensor
    ids_out_B: Tensor
    state_out_B: Tensor
    uncached_after_B: Tensor
    processed: list[int]
    kept: list[int]
    tokens: Tensor
    confidences: Tensor
    importances: tuple[Tensor, Tensor]

    @property
    def decoded_B(self) -> Tensor:
        return self.state_in_B != 0


@dataclass(frozen=True)
class Request:
    """How one recorded request is decoded."""

    mode: int
    strategy_N: Tensor
    threshold_N: Tensor
    steps_N: Tensor
    alpha: float
    steps: list[Step]


@dataclass
class BlockState:
    """What decoding keeps about the current block."""

    decoded_B: Tensor
    uncached_B: Tensor = field(init=False)
    warm_up: bool = True
    progress: int = -1
    decoded_tokens: int = 0
    productive_steps: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        self.uncached_B = torch.ones_like(self.decoded_B)

    @property
    def mean_decoded(self) -> float:
        return self.decoded_tokens / self.productive_steps if self.productive_steps else 1.0


def requests_of(arrays: Arrays) -> Iterator[Request]:
    """Every request with its steps."""
    step = block = proc = kept = mask = 0
    for sequence, count in enumerate(arrays["seq_n_steps"]):
        length = int(arrays["seq_B"][sequence])
        steps = []
        for _ in range(int(count)):
            blocks = slice(block, block + length)
            procs = slice(proc, proc + int(arrays["step_n_proc"][step]))
            keeps = slice(kept, kept + int(arrays["step_n_kept"][step]))
            masks = slice(mask, mask + int(arrays["step_n_mask"][step]))
            steps.append(_step(arrays, step, blocks, procs, keeps, masks))
            step, block, proc = step + 1, blocks.stop, procs.stop
            kept, mask = keeps.stop, masks.stop
        yield Request(
            mode=int(arrays["seq_mode"][sequence]),
            strategy_N=torch.tensor([int(arrays["seq_strat"][sequence])]),
            threshold_N=torch.tensor([float(arrays["seq_thr"][sequence])]),
            steps_N=torch.tensor([int(arrays["seq_denoise_steps"][sequence])]),
            alpha=float(arrays["seq_alpha"][sequence]),
            steps=steps,
        )


def _step(
    arrays: Arrays, index: int, blocks: slice, procs: slice, keeps: slice, masks: slice
) -> Step:
    def block(name: str) -> Tensor:
        return torch.from_numpy(arrays[name][blocks].astype(np.int64))

    def importance(name: str) -> Tensor:
        return from_bits(arrays[name][masks]).float()

    return Step(
        index=index,
        ids_in_B=block("blk_ids_in"),
        state_in_B=block("blk_mask_in"),
        ids_out_B=block("blk_ids_out"),
        state_out_B=block("blk_mask_out"),
        uncached_after_B=block("blk_uncached_after") > 0,
        processed=arrays["rag_proc"][procs].tolist(),
        kept=arrays["rag_kept"][keeps].tolist(),
        tokens=torch.from_numpy(arrays["rag_tok"][keeps].astype(np.int64)),
        confidences=torch.from_numpy(arrays["rag_conf"][keeps]),
        importances=(importance("rag_imp0"), importance("rag_imp1")),
    )


def check_traces(report: Report, arrays: Arrays, backend: Backend, every: int = 1) -> None:
    """Follow one of so many requests; the first step that differs ends the comparison of it."""
    requests = list(requests_of(arrays))[::every]
    evicting = [
        (request, step)
        for request in requests
        if request.mode == FOCUS
        for step in request.steps
        if arrays["step_decoding"][step.index]
    ]
    found = select(backend, [_recorded(request, step, arrays) for request, step in evicting])
    selected = {step.index: one for (_, step), one in zip(evicting, found, strict=True)}
    for number, request in enumerate(requests):
        _follow_request(report, number, request, arrays, selected)


def _recorded(request: Request, step: Step, arrays: Arrays) -> Block:
    masked = np.flatnonzero(~step.decoded_B.numpy())
    # importances are not recorded where nobody evicts; any value does there
    unknown = torch.zeros(len(masked))
    return Block(
        block_length=len(step.state_in_B),
        processed=np.asarray(step.processed),
        masked=masked,
        importances=step.importances if len(step.importances[0]) else (unknown, unknown),
        mean_decoded=float(arrays["step_avg"][step.index]),
        alpha=request.alpha,
        progress=int(arrays["step_progress_in"][step.index]),
    )


def _follow_request(
    report: Report, number: int, request: Request, arrays: Arrays, selected: dict[int, Selected]
) -> None:
    block: BlockState | None = None
    for step_number, step in enumerate(request.steps):
        if not arrays["step_decoding"][step.index]:
            block = BlockState(torch.zeros_like(step.decoded_B))
            if not bool((step.state_out_B == 2).all()):
                block.decoded_B = step.state_out_B != 0
            continue
        assert block is not None, "a request starts with its prefill"
        report.checked["trace steps"] += 1
        problem = _follow(block, step, request, arrays, selected.get(step.index))
        if problem is not None:
            what, expected, found = problem
            fragile = request.mode == FOCUS and not arrays["step_robust"][step.index]
            where = f"trace {number}, step {step_number}, {what}"
            difference = Difference(where, str(expected), str(found), bool(fragile))
            report.differences.append(difference)
            return
        if bool(step.decoded_B.all()):
            block = BlockState(torch.zeros_like(block.decoded_B))


def _follow(
    block: BlockState, step: Step, request: Request, arrays: Arrays, selected: Selected | None
) -> Problem | None:
    """Decide one step and move the block on; what differs, if anything."""
    decoded_B = step.decoded_B
    if not torch.equal(block.decoded_B, decoded_B):
        return "state before", _positions(decoded_B), _positions(block.decoded_B)
    processed_B = torch.ones_like(decoded_B)
    if request.mode != PLAIN:
        processed_B = processing_set(block.uncached_B[None], torch.tensor([block.warm_up]))[0]
    if _positions(processed_B) != step.processed:
        return "processing set", step.processed, _positions(processed_B)
    kept = step.processed
    if selected is not None:
        index, kept = step.index, selected.kept
        if abs(block.mean_decoded - float(arrays["step_avg"][index])) > 1e-6:
            return "mean decoded", arrays["step_avg"][index], block.mean_decoded
        if block.progress != int(arrays["step_progress_in"][index]):
            return "progress", arrays["step_progress_in"][index], block.progress
        if selected.target != int(arrays["step_target"][index]):
            return "target", arrays["step_target"][index], selected.target
    if kept != step.kept:
        return "kept", step.kept, kept

    confidence_NB, token_B = torch.zeros(1, len(decoded_B)), torch.zeros_like(step.ids_in_B)
    kept_B = torch.zeros_like(decoded_B)
    kept_B[kept] = True
    confidence_NB[0, kept_B], token_B[kept_B] = step.confidences, step.tokens
    chosen_B = choose_unmasked(
        confidence_NB,
        (kept_B & ~decoded_B)[None],
        strategy_N=request.strategy_N,
        threshold_N=request.threshold_N,
        quota_N=quota(len(decoded_B), request.steps_N, torch.tensor([block.step])),
    )[0]
    mask_id = int(arrays["vocab"][1])
    ids_B = torch.where(chosen_B, token_B, torch.where(decoded_B, step.ids_in_B, mask_id))
    if not torch.equal(ids_B, step.ids_out_B):
        return "ids after", step.ids_out_B.tolist(), ids_B.tolist()
    return _move_on(block, step, request.mode, chosen_B, max(kept), arrays)


def _move_on(
    block: BlockState, step: Step, mode: int, chosen_B: Tensor, rightmost: int, arrays: Arrays
) -> Problem | None:
    was_decoded_B = block.decoded_B
    block.uncached_B = after_step(block.uncached_B[None], was_decoded_B[None])[0]
    block.warm_up = False
    block.progress = max(block.progress, rightmost)
    block.step += 1
    block.decoded_tokens += int(chosen_B.sum())
    block.productive_steps += bool(chosen_B.any())
    block.decoded_B = was_decoded_B | chosen_B
    progress = int(arrays["step_progress_out"][step.index])
    if mode == FOCUS and block.progress != progress:
        return "progress after", progress, block.progress
    if bool(was_decoded_B.all()):  # committed: the file goes on with a new block
        block = BlockState(torch.zeros_like(was_decoded_B))
    counts = [int(arrays[name][step.index]) for name in ("step_tok_sum", "step_steps_cnt")]
    if mode == FOCUS and counts != [block.decoded_tokens, block.productive_steps]:
        return "counts after", counts, [block.decoded_tokens, block.productive_steps]
    if mode != PLAIN and not torch.equal(block.uncached_B, step.uncached_after_B):
        return "uncached after", _positions(step.uncached_after_B), _positions(block.uncached_B)
    return None


def _positions(mask_B: Tensor) -> list[int]:
    return mask_B.nonzero()[:, 0].tolist()
