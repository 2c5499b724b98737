"""What ``focus-ray trace`` writes and draws: a header, one record per step, a summary.

Plain data, made from an engine's trace; one JSON object per line. A step's lists are aligned with
its ``positions``, which are those of the current block: what lies left of it is committed after the
step, what lies right of it has not begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from focus_ray.config import Decoding, EvictionPolicy
from focus_ray.engine.outputs import CompletionOutput, DenoisingStep
from focus_ray.sampling import Unmasking

TokenText = Callable[[int], str]

State = Literal["masked", "evicted", "retained", "decoded"]
"""Of a position, after a step.

masked: still masked; the step computed it in full, under a decoding that evicts nothing.
evicted: still masked; the step left it out, after layer 1 or (not processed) before layer 0.
retained: still masked; the step computed it in full.
decoded: has its token, from this step, from an earlier one, or from the prompt. Under
    joint_threshold a later step may replace it.
"""


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """What was run. ``eviction_policy`` and ``focus_alpha`` are None where nothing is evicted, and
    ``denoising_steps`` under joint_threshold.

    ``version`` is of focus-ray; ``prompt`` is as given, the tokens are with the chat template.
    """

    version: str
    model: str
    decoding: Decoding
    eviction_policy: EvictionPolicy | None
    focus_alpha: float | None
    unmasking: Unmasking
    confidence_threshold: float
    denoising_steps: int | None
    editing_threshold: float
    max_post_steps: int
    temperature: float
    seed: int | None
    block_length: int
    prompt: str
    prompt_token_ids: tuple[int, ...]
    prompt_tokens: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """One step of the current block.

    Args:
        step: counts all steps, from 1.
        leftover: positions of the block before, wholly decoded, whose KV the step computed once
            more and so made final.
        processed: entered layer 0.
        newly_decoded: has its token from this step.
        edited: had another token before this step.
        token_ids, tokens: None where masked after the step.
        confidence: probability in [0, 1] of the token that the step proposed; None where it
            proposed none, as for evicted tokens, and for those that keep theirs.
        delta: importance in layer 1 less that in layer 0; None where none was computed.
        processed_tokens, retained_tokens, evicted_tokens, decoded_tokens, edited_tokens: of this
            step, the leftover ones included; retained ones went past layer 1, decoded tokens of the
            processing set among them.
    """

    step: int
    block_start: int
    leftover: tuple[int, ...]
    positions: tuple[int, ...]
    states: tuple[State, ...]
    processed: tuple[bool, ...]
    newly_decoded: tuple[bool, ...]
    edited: tuple[bool, ...]
    token_ids: tuple[int | None, ...]
    tokens: tuple[str | None, ...]
    confidence: tuple[float | None, ...]
    delta: tuple[float | None, ...]
    processed_tokens: int
    retained_tokens: int
    evicted_tokens: int
    decoded_tokens: int
    edited_tokens: int


@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """The answer and what it took; ``token_ids`` end with the stop token, where one ended it.

    ``decoded_tokens`` may be more than the answer has: the rest of its last block.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    finish_reason: str | None
    denoising_steps: int
    processed_tokens: int
    retained_tokens: int
    evicted_tokens: int
    decoded_tokens: int
    edited_tokens: int
    tokens_per_step: float

    @property
    def totals(self) -> str:
        """The counts as a sentence."""
        return (
            f"{self.denoising_steps} denoising steps decoded {self.decoded_tokens} tokens, "
            f"{self.tokens_per_step:.2f} per step; "
            f"{self.processed_tokens} tokens processed, {self.retained_tokens} of them retained; "
            f"{self.evicted_tokens} evicted"
            + (f"; {self.edited_tokens} decoded tokens edited" if self.edited_tokens else "")
        )


@dataclass(frozen=True)
class Trace:
    """A whole run."""

    header: TraceHeader
    steps: tuple[TraceStep, ...]
    summary: TraceSummary

    def lines(self) -> Iterator[str]:
        """JSON objects, without line ends."""
        yield json.dumps({"type": "header", **asdict(self.header)})
        for step in self.steps:
            yield json.dumps({"type": "step", **asdict(step)})
        yield json.dumps({"type": "summary", **asdict(self.summary)})


def trace_of(header: TraceHeader, output: CompletionOutput, token_text: TokenText) -> Trace:
    """The records of a finished completion whose engine ran under ``record_trace``."""
    steps = tuple(_steps(header, output.trace or (), token_text))
    stats = output.stats
    summary = TraceSummary(
        text=output.text,
        token_ids=tuple(output.token_ids),
        tokens=tuple(map(token_text, output.token_ids)),
        finish_reason=output.finish_reason,
        denoising_steps=stats.denoising_steps,
        processed_tokens=stats.processed_tokens,
        retained_tokens=stats.retained_tokens,
        evicted_tokens=stats.evicted_tokens,
        decoded_tokens=stats.decoded_tokens,
        edited_tokens=stats.edited_tokens,
        tokens_per_step=stats.tokens_per_step,
    )
    return Trace(header, steps, summary)


def _steps(
    header: TraceHeader, recorded: tuple[DenoisingStep, ...], token_text: TokenText
) -> Iterator[TraceStep]:
    known = dict(enumerate(header.prompt_token_ids))
    computed: State = "retained" if header.decoding == "focus" else "masked"
    for number, step in enumerate(recorded, start=1):
        known |= zip(step.positions, step.token_ids, strict=True)
        known |= zip(step.edited, step.edited_token_ids, strict=True)
        positions = range(step.block_start, step.block_start + header.block_length)
        processed, retained, new = set(step.processed), set(step.retained), set(step.positions)
        edited = set(step.edited)
        evicted = set(step.masked) - retained
        confidence = dict(zip(step.masked, step.masked_confidences, strict=True))
        confidence |= zip(step.edited, step.edited_confidences, strict=True)
        deltas = step.importance_deltas or (None,) * len(step.masked)
        delta = dict(zip(step.masked, deltas, strict=True))
        states: dict[int, State] = {
            position: "evicted" if position in evicted else computed
            for position in step.masked
            if position not in new
        }
        token_ids = tuple(known.get(position) for position in positions)
        yield TraceStep(
            step=number,
            block_start=step.block_start,
            leftover=step.leftover,
            positions=tuple(positions),
            states=tuple(states.get(position, "decoded") for position in positions),
            processed=tuple(position in processed for position in positions),
            newly_decoded=tuple(position in new for position in positions),
            edited=tuple(position in edited for position in positions),
            token_ids=token_ids,
            tokens=tuple(None if i is None else token_text(i) for i in token_ids),
            confidence=tuple(confidence.get(position) for position in positions),
            delta=tuple(delta.get(position) for position in positions),
            processed_tokens=len(processed),
            retained_tokens=len(retained),
            evicted_tokens=len(evicted),
            decoded_tokens=len(new),
            edited_tokens=len(edited),
        )
