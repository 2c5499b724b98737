"""Sizes that steps are padded to: every size fits one, and little is lost."""

import pytest

from focus_ray.engine.buckets import bucket_of, token_buckets


@pytest.mark.parametrize(
    "most",
    [
        pytest.param(1, id="one token"),
        pytest.param(96, id="one sequence"),
        pytest.param(1000, id="between two buckets"),
        pytest.param(18432, id="a full GPU"),
    ],
)
def test_every_size_runs_at_the_least_bucket_that_holds_it(most):
    buckets = token_buckets(most)
    assert buckets == sorted(set(buckets))
    for size in range(1, most + 1):
        found = bucket_of(buckets, size)
        assert found == min(bucket for bucket in buckets if bucket >= size)


def test_padding_is_small_where_time_grows_with_tokens():
    buckets = token_buckets(20000)
    for size in range(512, 20000):
        assert bucket_of(buckets, size) <= size * 1.13
    mean = sum(bucket_of(buckets, size) / size for size in range(2048, 8192)) / (8192 - 2048)
    assert mean < 1.03


def test_few_buckets_serve_a_large_step():
    assert len(token_buckets(18432)) < 150
