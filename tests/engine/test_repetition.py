"""Repetition detection against its definition."""

from __future__ import annotations

import random

import pytest

from focus_ray.engine.repetition import RepetitionWatch
from focus_ray.sampling import RepetitionDetection

RULE = RepetitionDetection(min_pattern_size=2, max_pattern_size=4, min_count=3)


def ends_in_repetition(token_ids: list[int], rule: RepetitionDetection) -> bool:
    """The definition, written out."""
    return any(
        size * rule.min_count <= len(token_ids)
        and token_ids[-size * rule.min_count :] == token_ids[-size:] * rule.min_count
        for size in range(rule.min_pattern_size, rule.max_pattern_size + 1)
    )


def is_repeating(token_ids: list[int], rule: RepetitionDetection) -> bool:
    watch = RepetitionWatch(rule)
    return [False, *map(watch.append, token_ids)][-1]


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        pytest.param([], False, id="empty"),
        pytest.param([1, 2, 1, 2], False, id="one repetition short"),
        pytest.param([9, 1, 2, 1, 2, 1, 2], True, id="after other tokens"),
        pytest.param([1, 2, 1, 2, 1, 2, 9], False, id="over by the last token"),
        pytest.param([7] * 6, True, id="a pattern of equal tokens"),
        pytest.param([7] * 5, False, id="a size below the range does not count"),
        pytest.param([1, 2, 3, 4] * 3, True, id="longest pattern"),
        pytest.param([1, 2, 3, 4, 5] * 3, False, id="longer than the range"),
    ],
)
def test_is_repeating(token_ids: list[int], expected: bool) -> None:
    assert is_repeating(token_ids, RULE) is expected
    assert ends_in_repetition(token_ids, RULE) is expected


def test_benchmark_protocol_defaults() -> None:
    pattern = list(range(8))
    assert is_repeating([50, *pattern * 3], RepetitionDetection())
    assert not is_repeating([50, *pattern * 2, *pattern[:7]], RepetitionDetection())


def test_equals_the_definition_after_every_random_token() -> None:
    rng = random.Random(0)
    num_found = 0
    for _ in range(1000):
        rule = RepetitionDetection(
            min_pattern_size=rng.randrange(1, 3),
            max_pattern_size=rng.randrange(3, 6),
            min_count=rng.randrange(2, 5),
        )
        token_ids = rng.choices([0, 1], k=16)
        watch = RepetitionWatch(rule)
        for end, token_id in enumerate(token_ids, start=1):
            expected = ends_in_repetition(token_ids[:end], rule)
            assert watch.append(token_id) is expected
            num_found += expected
    assert num_found > 500
