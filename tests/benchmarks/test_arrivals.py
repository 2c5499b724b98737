"""Arrival times against the distribution that they are said to have."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from focus_ray.benchmarks.arrivals import arrival_times

MANY = 40_000


@pytest.mark.parametrize(
    ("rate", "burstiness"),
    [
        pytest.param(4.0, 1.0, id="Poisson"),
        pytest.param(50.0, 0.25, id="in bursts"),
        pytest.param(0.5, 9.0, id="nearly even"),
    ],
)
def test_gaps_have_the_mean_and_the_variation_of_the_gamma_distribution(rate, burstiness):
    gaps = [b - a for a, b in pairwise(arrival_times(MANY, rate, burstiness, seed=1))]
    variation = 1 / math.sqrt(burstiness)
    # Four standard errors of the mean; those of the variation are wider for heavy tails.
    assert fmean(gaps) == pytest.approx(1 / rate, rel=4 * variation / math.sqrt(MANY))
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, rel=0.05)


def test_poisson_arrivals_are_memoryless():
    """Of gaps that last longer than the mean, the rest lasts as long again."""
    gaps = [b - a for a, b in pairwise(arrival_times(MANY, 1.0, 1.0, seed=2))]
    assert fmean(gap - 1.0 for gap in gaps if gap > 1.0) == pytest.approx(1.0, rel=0.05)


def test_an_infinite_rate_sends_all_at_once():
    assert arrival_times(3, math.inf, 1.0, seed=0) == (0.0, 0.0, 0.0)


def test_infinite_burstiness_is_a_metronome():
    assert arrival_times(4, 2.0, math.inf, seed=0) == (0.0, 0.5, 1.0, 1.5)


def test_a_seed_is_a_schedule():
    assert arrival_times(9, 2.0, 0.5, seed=3) == arrival_times(9, 2.0, 0.5, seed=3)
    assert arrival_times(9, 2.0, 0.5, seed=3) != arrival_times(9, 2.0, 0.5, seed=4)


@pytest.mark.parametrize(
    ("rate", "burstiness", "words"),
    [
        pytest.param(0.0, 1.0, "request rate must be above 0, got 0.0", id="no rate"),
        pytest.param(math.nan, 1.0, "request rate must be above 0, got nan", id="not a number"),
        pytest.param(1.0, -1.0, "burstiness must be above 0, got -1.0", id="negative shape"),
    ],
)
def test_what_is_no_rate_is_refused(rate, burstiness, words):
    with pytest.raises(ValueError, match=words):
        arrival_times(2, rate, burstiness, seed=0)
