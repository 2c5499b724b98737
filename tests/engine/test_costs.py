"""Curves of measured points, and where they flatten."""

from __future__ import annotations

import pytest

from focus_ray.engine.costs import StepCosts, interpolate, saturation_tokens


def test_costs_between_before_and_behind_the_measured_points() -> None:
    curve = [(10, 1.0), (20, 3.0)]
    assert [interpolate(curve, n) for n in (1, 10, 15, 20, 40)] == [1.0, 1.0, 2.0, 3.0, 6.0]
    measured = StepCosts(evicting_head=[(10, 5.0)], plain_head=[(10, 2.0)], tail=curve)
    assert measured.evicting(10, 15) == 7.0
    assert measured.plain(15) == 3.0 + 2.0


@pytest.mark.parametrize(
    "curve",
    [
        pytest.param([], id="empty"),
        pytest.param([(2, 1.0), (2, 1.0)], id="twice the same count"),
        pytest.param([(2, 1.0), (1, 1.0)], id="descending"),
        pytest.param([(0, 1.0)], id="no tokens"),
        pytest.param([(1, 0.0)], id="no time"),
        pytest.param([(1, float("nan"))], id="no number"),
        pytest.param([(1, float("inf"))], id="no end"),
    ],
)
def test_curves_that_cannot_be_measurements_are_refused(curve: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="tail must be points"):
        StepCosts(evicting_head=[(1, 1.0)], plain_head=[(1, 1.0)], tail=curve)


def test_saturation_is_where_nine_tenths_of_the_best_rate_are_reached() -> None:
    # Seconds 1 up to 100 tokens, then in proportion: the rate is 90 at 90 tokens.
    points = [(1, 0.5), (100, 0.5), (1000, 5.0)]
    assert saturation_tokens(StepCosts(points, points, points)) == 90
    # Never saturated: the largest measured count has the best rate, all to 9/10 of it.
    flat = [(1, 1.0), (1000, 1.0)]
    assert saturation_tokens(StepCosts(flat, flat, flat)) == 900
    # Proportional from the start.
    linear = [(n, 2e-5 * n) for n in (1, 16, 256, 4096)]
    assert saturation_tokens(StepCosts(linear, linear, linear)) == 1
