"""What a replica tells the routers and the autoscaler about its work. Plain numbers, sent often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

from focus_ray.engine.outputs import EngineLoad


@dataclass(frozen=True)
class ReplicaLoad:
    """One replica's load, in tokens that denoising steps process.

    Args:
        epoch: grows with every snapshot of one replica.
        next_step_tokens: what the next step will process of the sequences that run, each by its own
            average after eviction.
        waiting_tokens: the same of sequences that wait, once they run.
        saturation_tokens: tokens of a step from which on larger steps are hardly faster.
        tokens_per_sequence: average of what a sequence adds to a step.
        remaining_tokens: estimate of what all of its sequences have still to process.
        num_running, num_waiting: sequences.
        free_pages, total_pages: of the KV cache.
        page_size: tokens of a page.
        step_s: average time of a step, seconds.
    """

    epoch: int
    next_step_tokens: float
    waiting_tokens: float
    saturation_tokens: float
    tokens_per_sequence: float
    remaining_tokens: float
    num_running: int
    num_waiting: int
    free_pages: int
    total_pages: int
    page_size: int
    step_s: float

    @property
    def occupancy(self) -> float:
        """Effective batch occupancy: predicted tokens of a step over the saturation budget."""
        return (self.next_step_tokens + self.waiting_tokens) / self.saturation_tokens

    @classmethod
    def of(cls, load: EngineLoad) -> Self:
        """The part of an engine's load that says how busy it is; the names are the same."""
        return cls(**{field.name: getattr(load, field.name) for field in fields(cls)})

    def as_routing_stats(self) -> dict[str, float]:
        """What Ray Serve passes on to routers."""
        return asdict(self)

    @classmethod
    def from_routing_stats(cls, stats: Mapping[str, float]) -> Self:
        """Raises TypeError where fields are missing or unknown."""
        return cls(**stats)  # type: ignore[arg-type]  # numbers that asdict made
