"""From final tokens to final text: detokenising, and every way a completion can end."""

from __future__ import annotations

from dataclasses import dataclass

from focus_ray.engine.detokenizer import new_detokenizer
from focus_ray.engine.emission import NewTokens
from focus_ray.engine.outputs import FinishReason, TokenDelta, TokenLogprob
from focus_ray.engine.repetition import RepetitionWatch
from focus_ray.engine.request import Sequence
from focus_ray.engine.stop_strings import StopStrings
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.errors import RequestRejected

REPETITION = "repetition"
"""``stop_reason`` of a completion that repetition detection ended."""


@dataclass(frozen=True)
class _End:
    reason: FinishReason
    stop_reason: int | str | None = None


class Completion:
    """The outgoing side of one sequence.

    What it returns is final: text that may be the start of a stop string, or half of a character,
    is held back until that is decided.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        self.sequence = sequence
        params = sequence.params
        detokenizer = new_detokenizer(tokenizer, params)
        self._append, self._finish = detokenizer.append, detokenizer.finish
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        assert params.max_tokens is not None, "parameters are resolved at admission"
        self._num_tokens, self._max_tokens = 0, params.max_tokens
        rule = params.repetition_detection
        self._repetition = None if rule is None else RepetitionWatch(rule)
        # whether only ids can end the text, so that tokens need not be looked at one by one
        self._ends_by_ids = not params.stop and rule is None
        if sequence.num_continued:
            self._repeat(sequence.continued_token_ids)

    def _repeat(self, token_ids: tuple[int, ...]) -> None:
        """Come to where another engine was when it had emitted these, without giving any text.

        What is held back of a text depends on its tokens alone, not on how they came in deltas.

        Raises:
            RequestRejected: the text had ended with them, or before.
        """
        _, num_taken, end = self._take_runs(token_ids)
        if end is not None or self._num_tokens >= self._max_tokens:
            raise RequestRejected(
                f"continued[{self.sequence.index}] has {len(token_ids)} tokens, but the text ends "
                f"with the first {num_taken}; leave out completions that have ended",
                "continued",
            )

    def take(self, new: NewTokens) -> TokenDelta:
        """The delta for tokens that became final; carries a finish reason if they end it."""
        sequence, token_ids, logprobs = new
        if self._ends_by_ids and sequence.stop_token_ids.isdisjoint(token_ids):
            # what nearly every delta is: hundreds of them in a step, so it takes no detours
            self._num_tokens += len(token_ids)
            text, end = self._append(token_ids), None
        else:
            text, num_taken, end = self._take_runs(token_ids)
            token_ids = token_ids[:num_taken]
            logprobs = logprobs and logprobs[:num_taken]
        if end is None:
            if self._num_tokens < self._max_tokens:
                return TokenDelta(sequence.request_id, sequence.index, text, token_ids, logprobs)
            end = _End("length")
        return self._last_delta(text + self._flush(), token_ids, logprobs, end)

    def _take_runs(self, token_ids: tuple[int, ...]) -> tuple[str, int, _End | None]:
        """The text, how many tokens it took, and the end if it came to one."""
        text, num_taken = "", 0
        end: _End | None = None
        for run in self._runs(token_ids):
            num_taken += len(run)
            self._num_tokens += len(run)
            run_text, end = self._take_run(run)
            text += run_text
            if end is not None:
                break
        return text, num_taken, end

    def abort(self) -> TokenDelta:
        """The last delta of a completion that was cut off."""
        return self._last_delta(self._flush(), (), None, _End("abort"))

    def _runs(self, token_ids: tuple[int, ...]) -> list[tuple[int, ...]]:
        """One run, or token by token where the exact token that ends the text must be known."""
        if not self._ends_by_ids:
            return [(token_id,) for token_id in token_ids]
        for i, token_id in enumerate(token_ids):
            if token_id in self.sequence.stop_token_ids:
                return [token_ids[: i + 1]]
        return [token_ids]

    def _take_run(self, run: tuple[int, ...]) -> tuple[str, _End | None]:
        params = self.sequence.params
        if run[-1] in self.sequence.stop_token_ids:
            shown = run if params.include_stop_str_in_output else run[:-1]
            return self._show(shown), _End("stop", run[-1])
        text = self._show(run)
        if self._stops.matched is not None:
            return text, _End("stop", self._stops.matched)
        if self._repetition is not None and self._repetition.append(run[-1]):
            return text, _End("stop", REPETITION)
        return text, None

    def _show(self, token_ids: tuple[int, ...]) -> str:
        text = self._append(token_ids)
        if self._num_tokens <= self.sequence.params.min_tokens:
            return text
        return self._stops.append(text)

    def _flush(self) -> str:
        return self._stops.append(self._finish()) + self._stops.finish()

    def _last_delta(
        self,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] | None,
        end: _End,
    ) -> TokenDelta:
        name, index = self.sequence.request_id, self.sequence.index
        return TokenDelta(name, index, text, token_ids, logprobs, end.reason, end.stop_reason)
