"""Schedules of blocks in any state, for tests of what is decided about them; by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from focus_ray.engine.policy import DecodingPolicy
from focus_ray.kernels.rows import RowRule
from focus_ray.sampling import Unmasking

STRATEGIES: tuple[Unmasking, ...] = (
    "low_confidence_dynamic",
    "low_confidence_static",
    "sequential",
)


@dataclass(frozen=True)
class Member:
    """One sequence of a schedule.

    ``known`` positions of its first block are decoded when it starts: the leftmost ones, which the
    prompt ends in, or any, where a block in progress is taken up again after preemption.
    """

    known: int
    taken_up_again: bool
    unmasking: Unmasking
    threshold: float
    denoising_steps: int


@dataclass(frozen=True)
class Schedule:
    """What hypothesis chooses; bulk values follow from ``seed``.

    ``levels`` is the number of different importances (few: ties are common), ``unknown`` the share
    of blocks with a NaN among them, ``presence`` the share of sequences that take part in a step: a
    full step puts the others off.
    """

    block_length: int
    members: tuple[Member, ...]
    policy: DecodingPolicy
    levels: int
    unknown: float
    presence: float
    seed: int


def evicting(
    attend_cached: bool = False,
    alpha: float | None = 1.5,
    *,
    leftmost: bool = False,
    importance_dtype: torch.dtype = torch.bfloat16,
) -> DecodingPolicy:
    """A policy without a configuration; no alpha: everything goes through all layers."""
    return DecodingPolicy(
        RowRule(False, leftmost, attend_cached, alpha),
        by_importance=alpha is not None and not leftmost,
        importance_dtype=importance_dtype,
    )


@st.composite
def policies(draw: st.DrawFn) -> DecodingPolicy:
    attend_cached = draw(st.booleans())
    alpha = draw(st.sampled_from([1.0, 1.2, 1.5, 3.0]))
    importance_dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    by_delta = evicting(attend_cached, alpha, importance_dtype=importance_dtype)
    others = [evicting(attend_cached, None), evicting(attend_cached, alpha, leftmost=True)]
    return draw(st.sampled_from([by_delta, by_delta, *others]))


@st.composite
def schedules(draw: st.DrawFn, taken_up_again: bool) -> Schedule:
    block_length = draw(st.integers(4, 64))
    member = st.builds(
        Member,
        known=st.integers(0, block_length - 1),
        taken_up_again=st.just(taken_up_again),
        unmasking=st.sampled_from(STRATEGIES),
        threshold=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        denoising_steps=st.integers(1, block_length),
    )
    return Schedule(
        block_length=block_length,
        members=tuple(draw(st.lists(member, min_size=1, max_size=4))),
        policy=draw(policies()),
        levels=draw(st.sampled_from([1, 2, 5, 10_000])),
        unknown=draw(st.sampled_from([0.0, 0.1])),
        presence=draw(st.sampled_from([0.5, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
