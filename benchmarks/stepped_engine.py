"""An engine that only takes time: steps as long as a GPU's, without a GPU or its host's work.

Stands where ``Engine`` does, below ``AsyncEngine`` or a ``ClosedLoop``, to measure what surrounds
an engine. Like the real one it is a step ahead: whoever comes back before the next step is over
has cost nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import EngineLoad, GenerationRequest, RequestStats, TokenDelta
from focus_ray.openai.text_engine import EngineFactory
from focus_ray.sampling import SamplingParams

if TYPE_CHECKING:
    from focus_ray.engine.async_engine import AsyncEngine

TOKEN_ID, TOKEN_TEXT = 7, " word"
VOCAB_SIZE, MAX_MODEL_LEN = 4096, 32768


@dataclass(frozen=True)
class Limits:
    """The part of an engine's limits that others look at."""

    max_model_len: int = MAX_MODEL_LEN
    vocab_size: int = VOCAB_SIZE


@dataclass
class Running:
    """A sequence, and what it has sent."""

    request: GenerationRequest
    num_steps: int = 0
    num_tokens: int = 0


class SteppedEngine:
    """Answers of ``max_tokens`` equal tokens.

    Args:
        step_s: of every step, however full.
        tokens_per_step: of each sequence, on average; at least 1, so that each sends text in each
            step, which is the most that a surrounding can be asked for.
        max_num_seqs: sequences that run; others wait.
    """

    tokenizer = None
    default_params = SamplingParams()

    def __init__(self, step_s: float, tokens_per_step: float, max_num_seqs: int) -> None:
        self.limits = Limits()
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[GenerationRequest] = deque()
        self._running: dict[str, Running] = {}
        self._num_steps = 0
        self._step_ends_s = 0.0

    @property
    def running_requests(self) -> Collection[str]:
        """Those that wait, too."""
        return {*self._running, *(request.request_id for request in self._waiting)}

    def add(self, request: GenerationRequest) -> None:
        self._waiting.append(request)

    def abort(self, request_id: str) -> list[TokenDelta]:
        self._running.pop(request_id, None)
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)
        return []

    def has_unfinished(self) -> bool:
        return bool(self._running or self._waiting)

    def step(self) -> list[TokenDelta]:
        while self._waiting and len(self._running) < self._max_num_seqs:
            request = self._waiting.popleft()
            self._running[request.request_id] = Running(request)
        now_s = time.perf_counter()
        self._step_ends_s = max(self._step_ends_s + self._step_s, now_s)
        time.sleep(self._step_ends_s - now_s)
        self._num_steps += 1
        return [self._advance(each) for each in list(self._running.values())]

    def check(self) -> None: ...

    def close(self) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            free_pages=1,
            total_pages=1,
            num_steps=self._num_steps,
            prefill_tokens=0,
            cached_prefix_tokens=0,
            emitted_tokens=0,
            prompt_tokens=0,
            num_preemptions=0,
            finished={},
            step_s=self._step_s,
            epoch=self._num_steps,
        )

    def _advance(self, running: Running) -> TokenDelta:
        request, most = running.request, running.request.params.max_tokens or 1
        running.num_steps += 1
        sent = min(most, int(running.num_steps * self._tokens_per_step))
        count, running.num_tokens = sent - running.num_tokens, sent
        is_last = sent == most
        if is_last:
            del self._running[request.request_id]
        return TokenDelta(
            request_id=request.request_id,
            index=0,
            text=TOKEN_TEXT * count,
            token_ids=(TOKEN_ID,) * count,
            finish_reason="length" if is_last else None,
            stats=RequestStats(
                prompt_tokens=len(request.prompt_token_ids),
                denoising_steps=running.num_steps,
                decoded_tokens=sent,
            )
            if is_last
            else None,
        )


def stepped_factory(step_s: float, tokens_per_step: float, max_num_seqs: int) -> EngineFactory:
    """Makes such engines for replicas, in their processes."""
    return partial(_start, step_s, tokens_per_step, max_num_seqs)


def _start(
    step_s: float, tokens_per_step: float, max_num_seqs: int, config: EngineConfig
) -> AsyncEngine:
    from focus_ray.engine.async_engine import AsyncEngine
    from focus_ray.engine.engine import Engine

    engine = SteppedEngine(step_s, tokens_per_step, max_num_seqs)
    return AsyncEngine(cast(Engine, engine), config.model)
