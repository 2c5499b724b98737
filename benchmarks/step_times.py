"""How long a step of so many tokens takes, from a recorded throughput run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SATURATED = 0.9
"""Share of the best tokens per second that a step at the saturation budget reaches."""

BOUND_BY_TOKENS = 1.5
"""Steps that take so many times the shortest one tell of tokens rather than of the floor."""


@dataclass(frozen=True)
class StepTimes:
    """A step takes ``fixed_s + per_token_s`` for each of its tokens, and at least ``floor_s``."""

    floor_s: float
    fixed_s: float
    per_token_s: float

    def of(self, num_tokens: float) -> float:
        """Seconds of a step."""
        return max(self.floor_s, self.fixed_s + self.per_token_s * num_tokens)

    @property
    def saturation_tokens(self) -> float:
        """The smallest step that reaches nine tenths of the best tokens per second."""
        under_floor = SATURATED * self.floor_s
        on_line = SATURATED / (1.0 - SATURATED) * self.fixed_s
        return max(under_floor, on_line) / self.per_token_s

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> StepTimes:
        """Least squares of relative errors.

        Args:
            points: tokens of a step and its seconds.

        Raises:
            ValueError: too few points, or none from which a slope can be told.
        """
        floor_s = min((seconds for _, seconds in points), default=0.0)
        bound = [(n, s) for n, s in points if s > BOUND_BY_TOKENS * floor_s]
        if len({n for n, _ in bound}) < 2:
            raise ValueError(
                f"{len(bound)} of {len(points)} steps take more than {BOUND_BY_TOKENS} times the "
                "shortest one; the slope needs two of different sizes: record more concurrencies"
            )
        weights = [1.0 / s**2 for _, s in bound]
        total = sum(weights)
        mean_n = sum(w * n for w, (n, _) in zip(weights, bound, strict=True)) / total
        mean_s = sum(w * s for w, (_, s) in zip(weights, bound, strict=True)) / total
        pairs = list(zip(weights, bound, strict=True))
        slope = sum(w * (n - mean_n) * (s - mean_s) for w, (n, s) in pairs) / sum(
            w * (n - mean_n) ** 2 for w, (n, _) in pairs
        )
        if slope <= 0.0:
            raise ValueError(f"larger steps are not slower: {slope:.3g} s a token")
        return cls(floor_s, max(0.0, mean_s - slope * mean_n), slope)

    @classmethod
    def read(cls, path: Path) -> StepTimes:
        """From the JSON of ``focus-ray bench throughput``, all of its rows.

        Raises:
            ValueError: it has no rows, or they do not suffice.
        """
        rows = json.loads(path.read_text()).get("rows")
        if not rows:
            raise ValueError(f"{path} has no rows; give it what bench throughput --json wrote")
        steady = [row.get("steady") or row for row in rows]
        return cls.fit([(each["layer_tokens"] / each["steps"], each["step_s"]) for each in steady])
