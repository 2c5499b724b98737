"""The parts of a step at the sizes that they were recorded at.

On a GPU a step of some tokens runs as one of the next larger bucket, so that a few CUDA graphs
serve all steps; elsewhere, exactly as large as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from focus_ray.engine.buckets import bucket_of
from focus_ray.engine.choosing import Choosing
from focus_ray.engine.cuda_graphs import Body, CudaGraphs, Recording
from focus_ray.engine.passes import Passes, StepSize
from focus_ray.engine.plan import StepPlan

PLAIN = StepPlan()
"""What is recorded: greedy, nothing suppressed, no alternatives. Other steps choose unrecorded."""


class StepParts:
    """Head, tail and choice of a step, replayed from graphs where there are some.

    Args:
        num_rows: most rows of a step.
        buckets: ascending token counts; None: sizes are taken as they are.
        whole_blocks: see ``advance_blocks``.
    """

    def __init__(
        self,
        passes: Passes,
        choosing: Choosing,
        graphs: CudaGraphs,
        *,
        num_rows: int,
        buckets: list[int] | None,
        whole_blocks: bool,
    ) -> None:
        self.passes = passes
        self.choosing = choosing
        self.graphs = graphs
        self._num_rows = num_rows
        self._buckets = buckets
        self._whole_blocks = whole_blocks

    def size(self, num_tokens: int, num_rows: int) -> StepSize:
        """What so many tokens in so many rows run as."""
        if self._buckets is None:
            return StepSize(num_tokens, num_rows)
        return self._padded(bucket_of(self._buckets, num_tokens))

    def head(self, size: StepSize, by_importance: bool) -> None:
        """Up to the keys and values of layer 1; with ``by_importance``, who is retained."""
        self.graphs.run(
            ("head", by_importance, size.num_tokens),
            lambda cut: self.passes.head(size, by_importance, cut),
        )

    def tail(self, size: StepSize) -> None:
        """The later layers, for what ``passes.compact`` or a head that keeps all has left."""
        self.graphs.run(("tail", size.num_tokens), lambda cut: self.passes.tail(size, cut))

    def choose(
        self, plan: StepPlan, num_open: int, decodable_MB: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Logits of the open tokens that are left, and the step's end; see ``Choosing.look``."""
        recorded = (
            not (plan.any_sampled or plan.any_filtered or plan.any_suppressed)
            and plan.num_top_logprobs is None
            and decodable_MB is None
        )
        if self._buckets is not None and num_open:
            num_open = bucket_of(self._buckets, num_open)
        if recorded:
            key = ("choose", num_open)
            self.graphs.run(key, lambda _: self._choose(PLAIN, num_open, None))
            return None
        return self._choose(plan, num_open, decodable_MB)

    def look(self, plan: StepPlan, num_open: int) -> tuple[Tensor, Tensor] | None:
        """Tokens and confidences of the open tokens that are left."""
        kept = self.passes.kept
        return self.choosing.look(
            self.passes.hidden_CD,
            kept.open_row_Q[:num_open],
            kept.open_place_Q[:num_open],
            plan,
        )

    def record(self, by_importance: Sequence[bool]) -> None:
        """Record everything at every size.

        Args:
            by_importance: which kinds of head will be asked for.
        """
        assert self._buckets is not None, "only padded sizes can be recorded"
        self.graphs.record(self._recordings(by_importance))

    def _recordings(self, by_importance: Sequence[bool]) -> Iterator[Recording]:
        assert self._buckets is not None
        most_open = bucket_of(self._buckets, self.choosing.num_places)
        for bucket in (0, *self._buckets):
            size = self._padded(bucket)
            if bucket <= most_open:
                yield Recording(("choose", bucket), bucket, self._chooses(bucket))
            if bucket:
                yield Recording(("tail", bucket), bucket, partial(self.passes.tail, size))
                for compares in by_importance:
                    head = partial(self.passes.head, size, compares)
                    yield Recording(("head", compares, bucket), bucket, head)

    def _chooses(self, num_open: int) -> Body:
        return lambda _: self._choose(PLAIN, num_open, None)

    def _choose(
        self, plan: StepPlan, num_open: int, decodable_MB: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        top = self.look(plan, num_open)
        self.choosing.advance(self.passes.kept_SB, self._whole_blocks, decodable_MB)
        return top

    def _padded(self, bucket: int) -> StepSize:
        return StepSize(bucket, min(bucket, self._num_rows))
