"""What is predicted of coming steps equals its definition, sequence by sequence."""

from __future__ import annotations

import numpy as np
import pytest

from focus_ray.engine.occupancy import (
    DECODED,
    ENGINE_STEPS,
    ENTERED,
    OWN_STEPS,
    PRIOR_STEPS,
    PROCESSED,
    STEPS,
    EnginePace,
    Pace,
    SlotPaces,
    places_left,
    tokens_to_process,
)
from focus_ray.engine.outputs import COUNT_NAMES

PRIOR = Pace(entered=30.0, processed=20.0, decoded=2.0)


def counted(**counts: int) -> np.ndarray:
    return np.array([counts.get(name, 0) for name in COUNT_NAMES])


def step(processed: int, decoded: int) -> np.ndarray:
    return counted(
        denoising_steps=1,
        processed_tokens=processed + 5,
        retained_tokens=processed,
        decoded_tokens=decoded,
    )


def test_a_sequences_average_is_its_mean_and_then_forgets() -> None:
    paces = SlotPaces(1)
    values = np.random.default_rng(0).integers(1, 32, 3 * OWN_STEPS).tolist()
    mean = 0.0
    for number, value in enumerate(values, 1):
        paces.take(step(value, 3)[None], np.array([number]))
        if number <= OWN_STEPS:
            mean = sum(values[:number]) / number
        else:
            mean += (value - mean) / OWN_STEPS
        processed_M, decoded_M = paces.predicted(np.array([number]), PRIOR)
        of_prior = PRIOR_STEPS / (number + PRIOR_STEPS)
        assert processed_M[0] == pytest.approx(of_prior * 20.0 + (1 - of_prior) * mean)
        assert decoded_M[0] == pytest.approx(of_prior * 2.0 + (1 - of_prior) * 3.0)


def test_slots_do_not_know_each_other_and_who_sits_out_learns_nothing() -> None:
    paces = SlotPaces(3)
    idle = np.zeros(len(COUNT_NAMES), np.int64)
    paces.take(np.stack([step(10, 4), step(14, 2), step(32, 1)]), np.array([1, 1, 1]))
    paces.take(np.stack([step(12, 4), idle, step(30, 1)]), np.array([2, 1, 2]))
    means = [(10 + 12) / 2, 14, (32 + 30) / 2]
    shares = [2 / (2 + PRIOR_STEPS), 1 / (1 + PRIOR_STEPS), 2 / (2 + PRIOR_STEPS)]
    processed_M, _ = paces.predicted(np.array([2, 1, 2]), PRIOR)
    assert processed_M.tolist() == pytest.approx(
        [20 + share * (mean - 20) for share, mean in zip(shares, means, strict=True)]
    )


def test_who_comes_to_a_slot_is_not_taken_for_who_left_it() -> None:
    paces = SlotPaces(1)
    paces.take(step(31, 9)[None], np.array([1]))
    assert [values.item() for values in paces.predicted(np.array([0]), PRIOR)] == [20.0, 2.0]
    paces.take(step(11, 4)[None], np.array([1]))
    share = 1 / (1 + PRIOR_STEPS)
    processed_M, _ = paces.predicted(np.array([1]), PRIOR)
    assert processed_M[0] == pytest.approx(20 + share * (11 - 20))


def test_the_engines_average_is_over_sequences_with_old_steps_fading() -> None:
    pace = EnginePace(block_length=32)
    assert pace.now == Pace(entered=32.0, processed=32.0, decoded=1.0)
    sums = {STEPS: 1.0, ENTERED: 32.0, PROCESSED: 32.0, DECODED: 1.0}
    rng = np.random.default_rng(0)
    for _ in range(2 * ENGINE_STEPS):
        slots = [step(int(value), 3) for value in rng.integers(5, 20, rng.integers(1, 9))]
        pace.take(sum(slots))
        for column in sums:
            fresh = sum(int(slot[column]) for slot in slots)
            sums[column] = sums[column] * (1 - 1 / ENGINE_STEPS) + fresh
    assert pace.now.entered == pytest.approx(sums[ENTERED] / sums[STEPS])
    assert pace.now.processed == pytest.approx(sums[PROCESSED] / sums[STEPS])
    assert pace.now.decoded == pytest.approx(sums[DECODED] / sums[STEPS])
    assert 10 < pace.now.processed < 14, "the first guess is still there"


def test_steps_that_only_prefill_change_no_average() -> None:
    pace = EnginePace(block_length=32)
    for _ in range(200_000):  # fading alone would end in nothing over nothing
        pace.take(counted())
    assert pace.now == Pace(32.0, 32.0, 1.0)


def test_remaining_work_is_what_may_be_emitted_times_what_each_token_takes() -> None:
    left = np.array([100, 0, 7, 5])
    processed, decoded = np.array([8.0, 8.0, 32.0, 6.0]), np.array([2.0, 2.0, 1.0, 0.0])
    assert tokens_to_process(left, processed, decoded) == 100 * 4 + 7 * 32 + 5 * 6
    nobody = np.zeros(0)
    assert tokens_to_process(nobody.astype(np.int64), nobody, nobody) == 0.0


@pytest.mark.parametrize(
    ("left", "each", "anybody", "places"),
    [
        pytest.param(40.0, 8.0, True, 5, id="exactly as many as fit"),
        pytest.param(39.0, 8.0, True, 4, id="a part of one does not come"),
        pytest.param(7.0, 8.0, True, 0, id="not one fits"),
        pytest.param(-30.0, 8.0, True, 0, id="over the bound already"),
        pytest.param(4.0, 8.0, False, 1, id="one is more than the bound, yet runs alone"),
        pytest.param(80.0, 8.0, False, 10, id="several at once to begin with"),
    ],
)
def test_places_are_what_fits_under_the_bound(
    left: float, each: float, anybody: bool, places: int
) -> None:
    assert places_left(left, each, anybody_runs=anybody) == places
