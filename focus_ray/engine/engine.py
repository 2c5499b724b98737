"""The engine: requests in, final text out, one denoising step at a time. One thread only."""

from __future__ import annotations

import logging
import random
import time
import weakref
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from hashlib import blake2b

import numpy as np

from focus_ray.config import EngineConfig
from focus_ray.engine.admission import RequestLimits, resolve
from focus_ray.engine.assembly import EngineParts, assemble
from focus_ray.engine.completion import Completion
from focus_ray.engine.outputs import EngineLoad, GenerationRequest, TokenDelta
from focus_ray.engine.ranks import RankGroup
from focus_ray.engine.request import Sequence
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.errors import EngineOverloaded, RequestRejected
from focus_ray.sampling import SamplingParams, fill_in

logger = logging.getLogger(__name__)

STEP_TIME_WEIGHT = 0.1
"""Weight of the newest step in the running average of step time."""


class Engine:
    """Generates with one model, on one device or on several that share it.

    Args:
        config: what to load and how much may run at once.
        parts: the assembled scheduler, runner and facts; made from ``config`` when absent.

    Raises:
        CheckpointError: the model cannot be loaded.
        ValueError: the configuration does not fit the model or the memory.
        EngineDead: another rank of the engine could not start.
    """

    def __init__(self, config: EngineConfig, parts: EngineParts | None = None) -> None:
        self.config = config
        parts = parts or assemble(config)
        self.tokenizer: Tokenizer | None = parts.tokenizer
        self.limits: RequestLimits = parts.limits
        self._runner = parts.runner
        self._ranks = parts.ranks
        # Also when nobody closes it: a rank is a process.
        self._close = weakref.finalize(self, _close_ranks, parts.ranks)
        self._scheduler = parts.scheduler
        self._saturation_tokens = parts.saturation_tokens
        self._epoch = 0
        self._stop_token_ids = parts.stop_token_ids
        self._seeds = random.Random(config.seed)
        self._completions: dict[str, dict[int, Completion]] = {}
        self._finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})
        self._totals: Counter[str] = Counter()
        self._step_s = 0.0
        self._host_s = 0.0

    @property
    def default_params(self) -> SamplingParams:
        """What a request gets for the fields it leaves open."""
        return fill_in(SamplingParams(), self.limits.defaults)

    @property
    def running_requests(self) -> Collection[str]:
        """Ids of the requests that have not finished."""
        return self._completions.keys()

    def validate(self, request: GenerationRequest) -> None:
        """Raise RequestRejected if ``add`` would."""
        self._completions_of(request, self._resolve(request), seed=0)

    def add(self, request: GenerationRequest) -> None:
        """Queue the completions of a request.

        Raises:
            RequestRejected: it can never run as it stands.
            EngineOverloaded: the queue is full now.
        """
        params = self._resolve(request)
        waiting = len(self._scheduler.waiting) + len(request.emitted_before)
        room = self.config.max_num_waiting + self._scheduler.num_free_places
        if waiting > room:
            raise EngineOverloaded(
                f"{len(self._scheduler.waiting)} sequences wait already, this engine queues "
                f"{self.config.max_num_waiting}; try again later or raise max_num_waiting"
            )
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        completions = self._completions_of(request, params, seed)
        self._completions[request.request_id] = completions
        for completion in completions.values():
            self._scheduler.add(completion.sequence)
        self._totals["prompt_tokens"] += len(request.prompt_token_ids)
        logger.debug("request %s added, n=%d", request.request_id, params.n)

    def abort(self, request_id: str) -> list[TokenDelta]:
        """End a request now; its pages are free at once. Unknown ids are ignored.

        Returns:
            The last delta of each completion that was still running.
        """
        running = self._completions.pop(request_id, {})
        return [self._finish(completion, completion.abort()) for completion in running.values()]

    def has_unfinished(self) -> bool:
        """Whether ``step`` has something to do: requests, or a pass that was not taken up yet."""
        return self._scheduler.has_unfinished()

    def step(self) -> list[TokenDelta]:
        """Launch the next forward pass over everything that runs, then take up the one before it.

        While the device computes the new pass, the host turns what the pass before it found into
        text, so a result is returned one call after its pass was launched.

        Returns:
            What became final, at most one delta per completion.
        """
        started, waited = time.monotonic(), self._runner.waited_s
        is_due = self._scheduler.num_in_flight > 0
        plan = self._scheduler.plan()
        if plan is not None:
            self._runner.launch(plan)
            self._totals["prefill_tokens"] += plan.num_prefill_tokens
        deltas = self._collect() if is_due else []
        if is_due or plan is not None:
            self._took(time.monotonic() - started, self._runner.waited_s - waited)
        return deltas

    def _collect(self) -> list[TokenDelta]:
        """Take up the oldest pass in flight."""
        result = self._runner.collect()
        self._totals["steps"] += result.num_tokens > 0
        num_emitted, deltas = 0, []
        for new in self._scheduler.apply(result):
            sequence = new.sequence
            completion = self._completions[sequence.request_id][sequence.index]
            delta = completion.take(new)
            num_emitted += len(delta.token_ids)
            if sequence.first_token_at is None:
                sequence.first_token_at = time.monotonic()
            if delta.finish_reason is not None:
                delta = self._finish(completion, delta)
                self._forget(completion)
            deltas.append(delta)
        self._totals["emitted_tokens"] += num_emitted
        return deltas

    def _took(self, elapsed_s: float, waited_s: float) -> None:
        self._host_s += elapsed_s - waited_s
        self._step_s += (elapsed_s - self._step_s) * (STEP_TIME_WEIGHT if self._step_s else 1.0)

    def check(self) -> None:
        """Raise EngineDead if a rank of this engine failed while nobody stepped."""
        if self._ranks is not None:
            self._ranks.check()

    def close(self) -> None:
        """End the further ranks, if there are any; the engine is of no use afterwards."""
        self._close()

    def load(self) -> EngineLoad:
        """What the engine holds now and has done so far."""
        pool = self._scheduler.pool
        self._epoch += 1
        return EngineLoad(
            num_running=self._scheduler.num_running,
            num_waiting=len(self._scheduler.waiting),
            free_pages=pool.num_free,
            total_pages=pool.num_pages,
            page_size=pool.page_size,
            num_steps=self._totals["steps"],
            prefill_tokens=self._totals["prefill_tokens"],
            cached_prefix_tokens=self._scheduler.num_cached_tokens,
            emitted_tokens=self._totals["emitted_tokens"],
            prompt_tokens=self._totals["prompt_tokens"],
            num_preemptions=self._scheduler.num_preemptions,
            finished=dict(self._finished),
            step_s=self._step_s,
            host_s=self._host_s,
            epoch=self._epoch,
            saturation_tokens=self._saturation_tokens,
            **vars(self._scheduler.forecast()),
            **asdict(self._scheduler.counts),
        )

    def _resolve(self, request: GenerationRequest) -> SamplingParams:
        params = resolve(request, self.limits)
        if request.request_id in self._completions:
            raise RequestRejected(
                f"request_id {request.request_id!r} is running already; choose another",
                "request_id",
            )
        return params

    def _completions_of(
        self, request: GenerationRequest, params: SamplingParams, seed: int
    ) -> dict[int, Completion]:
        return {
            index: Completion(self._sequence(request, params, index, seed), self.tokenizer)
            for index in request.emitted_before
        }

    def _sequence(
        self, request: GenerationRequest, params: SamplingParams, index: int, seed: int
    ) -> Sequence:
        assert params.max_tokens is not None
        block_length = self.limits.block_length
        prompt_len = len(request.prompt_token_ids)
        num_blocks = -(-(prompt_len + params.max_tokens) // block_length)
        canvas = np.zeros(num_blocks * block_length, np.int32)
        known = request.prompt_token_ids + request.emitted_before[index][: params.max_tokens]
        canvas[: len(known)] = known
        stops = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= self._stop_token_ids
        sequence = Sequence(
            request_id=request.request_id,
            index=index,
            params=params,
            seed=_seed_of_completion(seed, index),
            prompt_len=prompt_len,
            canvas=canvas,
            block_length=block_length,
            stop_token_ids=stops,
            num_continued=len(known) - prompt_len,
        )
        sequence.num_emitted = sequence.num_continued
        sequence.num_committed = len(known) // block_length * block_length
        return sequence

    def _finish(self, completion: Completion, delta: TokenDelta) -> TokenDelta:
        """Free what the sequence holds and complete its last delta."""
        sequence = completion.sequence
        self._scheduler.finish(sequence)
        assert delta.finish_reason is not None
        self._finished[delta.finish_reason] += 1
        trace = tuple(sequence.trace) if self.config.record_trace else None
        return delta._replace(stats=sequence.stats(), trace=trace)

    def _forget(self, completion: Completion) -> None:
        sequence = completion.sequence
        rest = self._completions[sequence.request_id]
        del rest[sequence.index]
        if not rest:
            del self._completions[sequence.request_id]


def _close_ranks(ranks: RankGroup | None) -> None:
    if ranks is not None:
        ranks.close()


def _seed_of_completion(seed: int, index: int) -> int:
    """A hash in int64, as the device keeps it.

    Completions of one request differ from each other and from those of the neighbouring seeds,
    which ``seed + index`` would repeat.
    """
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
