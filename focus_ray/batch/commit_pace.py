"""When a job commits: often enough that a kill costs little, seldom enough that it costs little."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST_SHARE = 0.05
"""Of the time that commits may take: each rewrites the manifest, which grows with the job."""


class CommitPace:
    """Commits ``every_s`` seconds, or as much later as they take long.

    Args:
        every_s: from the end of one commit to the next.
        clock: seconds of any clock that does not go back.
    """

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._due_s = clock() + every_s

    @property
    def is_due(self) -> bool:
        return self._clock() >= self._due_s

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Around a commit, which decides when the next one is due."""
        began_s = self._clock()
        yield
        ended_s = self._clock()
        wait_s = (ended_s - began_s) * (1 - MOST_SHARE) / MOST_SHARE
        self._due_s = ended_s + max(self._every_s, wait_s)
