"""Exact match, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from focus_ray.tasks import Task

Z_95 = 1.959964


@dataclass(frozen=True)
class Score:
    """Exact match of one kind of task with its 95 % Wilson interval."""

    num_right: int
    num_problems: int

    @property
    def share(self) -> float:
        return self.num_right / self.num_problems

    @property
    def interval(self) -> tuple[float, float]:
        n, p = self.num_problems, self.share
        middle = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
        return middle - half, middle + half

    def as_json(self) -> dict[str, object]:
        return {
            "num_right": self.num_right,
            "num_problems": self.num_problems,
            "share": self.share,
            "interval_95": self.interval,
        }


def scores_of(answers: Iterable[tuple[Task, str]]) -> dict[str, Score]:
    """Exact match over all, then per kind of task in the order of their first problems."""
    hits: dict[str, list[bool]] = {"all": []}
    for task, text in answers:
        right = task.is_right(text)
        hits["all"].append(right)
        hits.setdefault(task.name, []).append(right)
    return {name: Score(sum(right), len(right)) for name, right in hits.items() if right}
