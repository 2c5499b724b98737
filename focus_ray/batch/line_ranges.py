"""Sets of line numbers, kept as ranges: what is done of a file of millions of lines."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Range = tuple[int, int]
"""First and last, both in it."""


class LineRanges:
    """A set of line numbers.

    Args:
        ranges: disjoint or not, in any order.
    """

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._ranges = _joined(ranges)

    @property
    def ranges(self) -> list[Range]:
        """Disjoint, ascending, as few as possible."""
        return list(self._ranges)

    def __contains__(self, line: int) -> bool:
        index = bisect_right(self._ranges, line, key=lambda each: each[0]) - 1
        return index >= 0 and line <= self._ranges[index][1]

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self._ranges)

    def __or__(self, other: LineRanges) -> LineRanges:
        return LineRanges([*self._ranges, *other._ranges])

    @classmethod
    def of(cls, lines: Iterable[int]) -> LineRanges:
        return cls((line, line) for line in lines)


def _joined(ranges: Iterable[Range]) -> list[Range]:
    joined: list[Range] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined
