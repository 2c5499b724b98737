"""Replay of whole requests: block states, processing sets, kept sets and statistics per step.

The model's outputs are given; everything that is decided between them is ours. All steps are
compared but the prefill's, and those behind the reference's own ending of a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from conformance_report import Difference, Report
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.engine.decoding import choose_unmasked, quota
from focus_ray.engine.delayed import after_step, processing_set
from focus_ray.kernels.retain import eviction_target, retain

Arrays = dict[str, NDArray[Any]]
PLAIN, DELAYED, FOCUS = 0, 1, 2


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
    kept: Tensor
    tokens: Tensor
    confidences: Tensor
    importances: tuple[Tensor, Tensor]


@dataclass
class Block:
    """What decoding keeps about the current block."""

    decoded_B: Tensor
    uncached_B: Tensor = field(init=False)
    warm_up: bool = True
    progress: int = -1
    decoded_tokens: float = 0.0
    productive_steps: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        self.uncached_B = torch.ones_like(self.decoded_B)

    @property
    def mean_decoded(self) -> Tensor:
        steps = self.productive_steps
        return torch.tensor([self.decoded_tokens / steps if steps else 1.0], dtype=torch.float32)


def steps_of(arrays: Arrays) -> Iterator[tuple[int, list[Step]]]:
    """Sequence number and its steps."""
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
        yield sequence, steps


def _step(
    arrays: Arrays, index: int, blocks: slice, procs: slice, keeps: slice, masks: slice
) -> Step:
    def block(name: str) -> Tensor:
        return torch.from_numpy(arrays[name][blocks].astype(np.int64))

    def importance(name: str) -> Tensor:
        bits = arrays[name][masks].astype(np.uint32) << 16
        return torch.from_numpy(bits.view(np.float32))

    return Step(
        index=index,
        ids_in_B=block("blk_ids_in"),
        state_in_B=block("blk_mask_in"),
        ids_out_B=block("blk_ids_out"),
        state_out_B=block("blk_mask_out"),
        uncached_after_B=block("blk_uncached_after") > 0,
        processed=arrays["rag_proc"][procs].tolist(),
        kept=torch.from_numpy(arrays["rag_kept"][keeps].astype(np.int64)),
        tokens=torch.from_numpy(arrays["rag_tok"][keeps].astype(np.int64)),
        confidences=torch.from_numpy(arrays["rag_conf"][keeps]),
        importances=(importance("rag_imp0"), importance("rag_imp1")),
    )


def check_traces(report: Report, arrays: Arrays, device: str) -> None:
    """Follow every request; the first step that differs ends the comparison of its request."""
    mask_id = int(arrays["vocab"][1])
    for sequence, steps in steps_of(arrays):
        settings = {
            "mode": int(arrays["seq_mode"][sequence]),
            "strategy_N": torch.tensor([int(arrays["seq_strat"][sequence])]),
            "threshold_N": torch.tensor([float(arrays["seq_thr"][sequence])]),
            "steps_N": torch.tensor([int(arrays["seq_denoise_steps"][sequence])]),
            "alpha_N": torch.tensor([float(arrays["seq_alpha"][sequence])]),
        }
        block: Block | None = None
        for number, step in enumerate(steps):
            if not arrays["step_decoding"][step.index]:
                block = Block(torch.zeros_like(step.state_out_B, dtype=torch.bool))
                if not bool((step.state_out_B == 2).all()):
                    block.decoded_B = step.state_out_B != 0
                continue
            assert block is not None, "a request starts with its prefill"
            report.checked["trace steps"] += 1
            problem = follow(block, step, settings, arrays, mask_id)
            if problem is not None:
                what, expected, found = problem
                where = f"trace {sequence}, step {number}, {what}"
                fragile = settings["mode"] == FOCUS and not arrays["step_robust"][step.index]
                report.differences.append(Difference(where, expected, found, bool(fragile)))
                break
            if bool((step.state_in_B != 0).all()):
                block = Block(torch.zeros_like(block.decoded_B))


def follow(
    block: Block, step: Step, settings: dict[str, Any], arrays: Arrays, mask_id: int
) -> tuple[str, str, str] | None:
    """Decide one step and move the block on; what differs, if anything."""
    mode, decoded_B = settings["mode"], step.state_in_B != 0
    if not torch.equal(block.decoded_B, decoded_B):
        return "state before", _list(decoded_B), _list(block.decoded_B)
    processed_B = torch.ones_like(decoded_B)
    if mode != PLAIN:
        processed_B = processing_set(block.uncached_B[None], torch.tensor([block.warm_up]))[0]
    if _positions(processed_B) != step.processed:
        return "processing set", str(step.processed), _list(processed_B)
    kept_B = processed_B
    if mode == FOCUS:
        problem, kept_B = _evict(block, step, settings, arrays, processed_B)
        if problem is not None:
            return problem
    if _positions(kept_B) != step.kept.tolist():
        return "kept", str(step.kept.tolist()), _list(kept_B)

    confidence_NB, token_B = torch.zeros(1, len(decoded_B)), torch.zeros_like(step.ids_in_B)
    confidence_NB[0, step.kept], token_B[step.kept] = step.confidences, step.tokens
    chosen_B = choose_unmasked(
        confidence_NB,
        (kept_B & ~decoded_B)[None],
        strategy_N=settings["strategy_N"],
        threshold_N=settings["threshold_N"],
        quota_N=quota(len(decoded_B), settings["steps_N"], torch.tensor([block.step])),
    )[0]
    ids_B = torch.where(chosen_B, token_B, torch.where(decoded_B, step.ids_in_B, mask_id))
    if not torch.equal(ids_B, step.ids_out_B):
        return "ids after", str(step.ids_out_B.tolist()), str(ids_B.tolist())
    return _move_on(block, step, chosen_B, kept_B, arrays, mode)


def _evict(
    block: Block, step: Step, settings: dict[str, Any], arrays: Arrays, processed_B: Tensor
) -> tuple[tuple[str, str, str] | None, Tensor]:
    masked_B = ~block.decoded_B
    mean_N = block.mean_decoded
    given = float(arrays["step_avg"][step.index])
    if abs(mean_N.item() - given) > 1e-6:
        return ("mean decoded", str(given), str(mean_N.item())), processed_B
    target_N = eviction_target(masked_B.sum()[None], mean_N, settings["alpha_N"])
    first_NB, second_NB = torch.zeros(2, 1, len(masked_B))
    if len(step.importances[0]):
        first_NB[0, masked_B], second_NB[0, masked_B] = step.importances
    retained = retain(
        first_NB,
        second_NB,
        processed_B[None],
        masked_B[None],
        target_N,
        torch.tensor([block.progress]),
        importance_dtype=torch.bfloat16,
        attend_cached=False,
    )
    return None, retained.kept_NB[0]


def _move_on(
    block: Block, step: Step, chosen_B: Tensor, kept_B: Tensor, arrays: Arrays, mode: int
) -> tuple[str, str, str] | None:
    was_decoded_B = block.decoded_B
    block.uncached_B = after_step(block.uncached_B[None], was_decoded_B[None])[0]
    block.warm_up = False
    block.progress = max(block.progress, max(_positions(kept_B)))
    block.step += 1
    block.decoded_tokens += int(chosen_B.sum())
    block.productive_steps += bool(chosen_B.any())
    block.decoded_B = was_decoded_B | chosen_B
    if mode == FOCUS and block.progress != int(arrays["step_progress_out"][step.index]):
        expected = str(arrays["step_progress_out"][step.index])
        return "progress", expected, str(block.progress)
    committed = bool(was_decoded_B.all())
    uncached_B = torch.ones_like(kept_B) if committed else block.uncached_B
    if mode != PLAIN and not torch.equal(uncached_B, step.uncached_after_B):
        return "uncached after", _list(step.uncached_after_B), _list(uncached_B)
    return None


def _positions(mask_B: Tensor) -> list[int]:
    return mask_B.nonzero()[:, 0].tolist()


def _list(mask_B: Tensor) -> str:
    return str(_positions(mask_B))
