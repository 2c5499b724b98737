"""What the parts of a step cost on this device, measured at start-up with made-up sequences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from focus_ray.engine.costs import StepCosts
from focus_ray.engine.plan import BlockSnapshot, PrefillChunk, SlotStart, StepPlan
from focus_ray.engine.runner import Runner
from focus_ray.engine.step_parts import PLAIN
from focus_ray.models.parallel import WHOLE, Shards
from focus_ray.sampling import SamplingParams

REPEATS = 3

ENOUGH_S = {"cuda": 1.5, "cpu": 0.4}
"""Steps are measured at no larger size once all measured ones took so long together."""

NO_REPEATS_S = 0.25
"""On a CPU, what takes so long the first time is not measured again."""


@torch.inference_mode()
def measure_costs(runner: Runner, shards: Shards = WHOLE, *, plain_too: bool = True) -> StepCosts:
    """Time head, tail and look with 1, 2, 4, ... whole blocks.

    Every sequence has one; the blocks behind those of all sequences are prefill. All ranks measure
    at the same time, and rank 0 says when it is enough.

    Tokens differ, as those of texts do: many that are alike would all go to the same few experts of
    a mixture, and cost too little. Contexts are short: attention to what lies before the block
    costs the same whether or not a step evicts. Of the tokens that reach the tail, half are taken
    to be masked.

    Args:
        plain_too: also heads that choose nothing, where the policy has others; without, what the
            policy does stands for both.
    """
    policy, parts, passes = runner.policy, runner.parts, runner.parts.passes
    device = runner.state.device
    spent_s = 0.0
    evicting: list[tuple[int, float]] = []
    plain: list[tuple[int, float]] = []
    tail: list[tuple[int, float]] = []
    most = most_blocks(runner)
    for count in sorted({min(1 << i, most) for i in range(most.bit_length() + 1)}):
        runner.state.take(_blocks(runner, count))
        counted = runner.plan_rows(policy.keeping_all(), 0)
        tokens = counted.num_tokens
        size = parts.size(tokens, counted.num_rows)
        runs: list[Callable[[], object]] = []
        if policy.by_importance:
            runs += [partial(parts.head, size, True), partial(passes.compact, size)]
        if plain_too or not policy.by_importance:
            runs.append(partial(parts.head, size, False))
        runs += [partial(parts.tail, size), partial(parts.look, PLAIN, tokens // 2)]

        rounds = []
        if device.type == "cuda" or not tail:  # to compile, or only to warm up
            rounds = [[_seconds(run, device) for run in runs]]
        if device.type == "cuda" or not shards.of_first(sum(map(sum, rounds)) > NO_REPEATS_S):
            rounds = [[_seconds(run, device) for run in runs] for _ in range(REPEATS)]
        spent_s += sum(map(sum, rounds))
        took = [statistics.median(times) for times in zip(*rounds, strict=True)]
        *heads, tail_s, look_s = took
        if policy.by_importance:
            evicting.append((tokens, heads[0] + heads[1]))
            heads = heads[2:]
        plain += [(tokens, head_s) for head_s in heads]
        tail.append((tokens, tail_s + look_s))
        if shards.of_first(spent_s > ENOUGH_S[device.type]):
            break
    runner.state.take(StepPlan(stops=list(range(runner.state.num_slots))))
    return StepCosts(evicting or plain, plain or evicting, tail)


def most_blocks(runner: Runner) -> int:
    """The largest step that would be measured."""
    return len(runner.state.prefill_slot_F)


def _blocks(runner: Runner, count: int) -> StepPlan:
    num_slots, length = runner.state.num_slots, runner.state.block_length
    ids_NB = np.random.default_rng(0).integers(
        runner.vocab_size, size=(count, length), dtype=np.int32
    )
    starts = [_start(runner, slot, ids_B) for slot, ids_B in enumerate(ids_NB[:num_slots])]
    prefill = [PrefillChunk(0, 0, ids_B) for ids_B in ids_NB[num_slots:]]
    return StepPlan(starts=starts, prefill=prefill)


def _start(runner: Runner, slot: int, ids_B: NDArray[np.int32]) -> SlotStart:
    """A sequence at its beginning; all share one page, whose values mean nothing."""
    length = len(ids_B)
    block = BlockSnapshot(
        ids_B,
        np.zeros(length, np.bool_),
        np.zeros(length, np.float32),
        0,
    )
    params = SamplingParams(
        max_tokens=length,
        unmasking="low_confidence_dynamic",
        confidence_threshold=1.0,
        denoising_steps=length,
        editing_threshold=1.0,
        max_post_steps=1,
        temperature=0.0,
        top_p=1.0,
    )
    return SlotStart(slot, block, 0, 0, params, 0, ())


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call, host included, as a step feels it."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
