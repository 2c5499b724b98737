"""Commits come as often as asked for, and take a small share of the time however long they are."""

from __future__ import annotations

import pytest

from focus_ray.batch.commit_pace import MOST_SHARE, CommitPace


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.mark.parametrize(
    ("commit_s", "wait_s"),
    [
        pytest.param(0.01, 5.0, id="short commits: as often as asked for"),
        pytest.param(2.0, 38.0, id="long commits: a twentieth of the time"),
    ],
)
def test_the_next_commit_is_due(commit_s, wait_s):
    clock = Clock()
    pace = CommitPace(5.0, clock)
    assert not pace.is_due
    clock.now_s += 5.0
    assert pace.is_due
    with pace.committing():
        clock.now_s += commit_s
    ended_s = clock.now_s
    clock.now_s = ended_s + wait_s - 0.01
    assert not pace.is_due
    clock.now_s = ended_s + wait_s + 0.01
    assert pace.is_due
    assert commit_s / (commit_s + wait_s) <= MOST_SHARE + 1e-9
